#include "moe_nccl/options.h"

#include "flags.h"
#include "moe_nccl/device.h"
#include "moe_nccl/layer.h"

namespace fusco::bench::moe {

bool parseOptions(int count, char** arguments, Options& options, int* exitCode) {
  Flags flags("moe_nccl",
              "The step of a mixture-of-experts layer that was written against NCCL, in three states: unchanged; "
              "with its permutes replaced by gatherSend and scatterRecv; with fuscoDispatch and fuscoCombine");
  flags.add("--device", options.device, "where tensors lie").oneOf(deviceNames());
  flags.add("--ranks", options.ranks, "processes on this machine").within(1, 64);
  flags.add("--tokens", options.tokens, "tokens of each rank").within(1, 1 << 20);
  flags.add("--hidden", options.hidden, "BF16 elements of a token").within(1, 1 << 16);
  const Flags::Flag topk = flags.add("--topk", options.topk).within(1, 64);
  const Flags::Flag experts = flags.add("--experts", options.experts).within(1, 4096);
  flags.add("--inner", options.inner, "an expert is two matrices, hidden x inner and back; 0: it scales its rows")
      .within(0, 1 << 16);
  flags.add("--routing", options.routing, "as shuffle_perf's: uniform, zipf:S, counts:..., trace:...");
  flags.add("--states", options.states).commas().oneOf(layerNames());
  flags.add("--seed", options.seed);
  flags.add("-w,--warmup", options.warmup, "steps before each round's timed ones").within(0, 1000);
  flags.add("-n,--iterations", options.iterations, "timed steps of a state in a round").within(1, 1000);
  flags.add("--rounds", options.rounds, "the states take turns in each").within(1, 1000);
  flags.add("--timeout", options.timeoutSeconds, "seconds for all").within(1, 3600);
  flags.add("--corrupt", options.corrupt, "spoils one byte of this state's output, to see that it is found")
      .oneOf(layerNames());
  if (!flags.parse({arguments, arguments + count}, exitCode)) return false;
  options.topkGiven = topk.given();
  options.expertsGiven = experts.given();
  return true;
}

}  // namespace fusco::bench::moe
