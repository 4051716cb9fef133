#include "moe_nccl/options.h"

#include <CLI/CLI.hpp>

#include "moe_nccl/device.h"
#include "moe_nccl/layer.h"

namespace fusco::bench::moe {

bool parseOptions(int count, char** arguments, Options& options, int* exitCode) {
  CLI::App app(
      "The step of a mixture-of-experts layer that was written against NCCL, in three states: unchanged; "
      "with its permutes replaced by gatherSend and scatterRecv; with fuscoDispatch and fuscoCombine");
  app.add_option("--device", options.device, "where tensors lie")->check(CLI::IsMember(deviceNames()));
  app.add_option("--ranks", options.ranks, "processes on this machine")->check(CLI::Range(1, 64));
  app.add_option("--tokens", options.tokens, "tokens of each rank")->check(CLI::Range(1, 1 << 20));
  app.add_option("--hidden", options.hidden, "BF16 elements of a token")->check(CLI::Range(1, 1 << 16));
  CLI::Option* const topk = app.add_option("--topk", options.topk)->check(CLI::Range(1, 64));
  CLI::Option* const experts = app.add_option("--experts", options.experts)->check(CLI::Range(1, 4096));
  app.add_option("--inner", options.inner, "an expert is two matrices, hidden x inner and back; 0: it scales its rows")
      ->check(CLI::Range(0, 1 << 16));
  app.add_option("--routing", options.routing, "as shuffle_perf's: uniform, zipf:S, counts:..., trace:...");
  app.add_option("--states", options.states)->delimiter(',')->check(CLI::IsMember(layerNames()));
  app.add_option("--seed", options.seed);
  app.add_option("-w,--warmup", options.warmup, "steps before each round's timed ones")->check(CLI::Range(0, 1000));
  app.add_option("-n,--iterations", options.iterations, "timed steps of a state in a round")
      ->check(CLI::Range(1, 1000));
  app.add_option("--rounds", options.rounds, "the states take turns in each")->check(CLI::Range(1, 1000));
  app.add_option("--timeout", options.timeoutSeconds, "seconds for all")->check(CLI::Range(1, 3600));
  app.add_option("--corrupt", options.corrupt, "spoils one byte of this state's output, to see that it is found")
      ->check(CLI::IsMember(layerNames()));
  app.option_defaults()->always_capture_default();
  try {
    app.parse(count, arguments);
  } catch (const CLI::ParseError& error) {
    *exitCode = app.exit(error) == 0 ? 0 : 2;
    return false;
  }
  options.topkGiven = topk->count() > 0;
  options.expertsGiven = experts->count() > 0;
  return true;
}

}  // namespace fusco::bench::moe
