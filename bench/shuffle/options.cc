#include "shuffle/options.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <sstream>
#include <stdexcept>

#include "flags.h"

namespace fusco::bench {
namespace {

struct TypeName {
  const char* name;
  Type type;
  std::size_t bytes;
};
constexpr TypeName kTypes[] = {
    {"uint8", Type::u8, 1},    {"fp8_e4m3", Type::fp8, 1}, {"bfloat16", Type::bf16, 2}, {"half", Type::f16, 2},
    {"float", Type::f32, 4},   {"u8", Type::u8, 1},        {"fp8", Type::fp8, 1},       {"bf16", Type::bf16, 2},
    {"float16", Type::f16, 2}, {"fp16", Type::f16, 2},     {"float32", Type::f32, 4},   {"fp32", Type::f32, 4},
};
constexpr Op kOps[] = {Op::dispatch, Op::combine, Op::alltoallv, Op::gathersend, Op::sendrecv};

Type typeNamed(const std::string& name) {
  for (const TypeName& t : kTypes)
    if (name == t.name) return t.type;
  throw UsageError("--dtype", "'" + name + "' is not one of uint8 fp8_e4m3 bfloat16 half float");
}

Op opNamed(const std::string& name) {
  for (Op op : kOps)
    if (name == nameOf(op)) return op;
  throw UsageError("--op", "'" + name + "' is not one of dispatch combine alltoallv gathersend sendrecv");
}

std::int64_t integer(const std::string& flag, const std::string& text) {
  std::size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    throw UsageError(flag, "'" + text + "' is not a number");
  }
  std::string unit = text.substr(used);
  if (unit == "k" || unit == "K")
    value *= 1024;
  else if (unit == "m" || unit == "M")
    value *= 1024.0 * 1024;
  else if (unit == "g" || unit == "G")
    value *= 1024.0 * 1024 * 1024;
  else if (!unit.empty())
    throw UsageError(flag, "'" + text + "' ends in something else than K, M or G");
  if (!(value >= 0 && value < 9e15)) throw UsageError(flag, "'" + text + "' is out of range");
  return static_cast<std::int64_t>(value);
}

Sweep sweepOf(const std::string& flag, const std::string& text) {
  std::vector<std::string> parts = splitList(text, ':');
  if (parts.empty() || parts.size() > 3) throw UsageError(flag, "wants MIN[:MAX[:FACTOR]]");
  Sweep sweep;
  sweep.from = sweep.to = integer(flag, parts[0]);
  if (parts.size() > 1) sweep.to = integer(flag, parts[1]);
  if (parts.size() > 2) sweep.factor = static_cast<double>(integer(flag, parts[2]));
  return sweep;
}

void oneOf(const std::string& flag, const std::string& value, std::initializer_list<const char*> allowed) {
  std::string list;
  for (const char* a : allowed) {
    if (value == a) return;
    list += std::string(" ") + a;
  }
  throw UsageError(flag, "'" + value + "' is not one of" + list);
}

void checkTogether(Options& o, const std::string& tokens, const std::string& type, const std::string& memory,
                   const std::vector<std::string>& ops, const std::string& from, const std::string& to,
                   const std::string& factor) {
  o.tokens = sweepOf("--tokens", tokens);
  o.type = typeNamed(type);
  oneOf("--memory", memory, {"window", "private"});
  o.memory = memory == "window" ? Memory::window : Memory::privately;
  oneOf("--device", o.device, {"host", "cuda"});
  oneOf("--balance", o.balance, {"none", "paper", "full"});
  oneOf("--net", o.net, {"auto", "tcp", "shm", "verbs"});
  oneOf("--dedup", o.dedup, {"none", "node", "full", "auto"});
  for (const std::string& impl : o.impls)
    if (o.device == "cuda")
      oneOf("--impl", impl, {"fusco", "limit", "staged", "nccl"});
    else
      oneOf("--impl", impl, {"fusco", "limit", "mpi-alltoallv", "mpi-alltoallw", "mpi-sendrecv"});
  // A name that nothing has would spoil nothing, and look as if the checks found nothing.
  if (!o.corrupt.empty() && o.corrupt.rfind("limit-", 0) != 0 &&
      std::find(o.impls.begin(), o.impls.end(), o.corrupt) == o.impls.end())
    throw UsageError("--corrupt", "'" + o.corrupt + "' is not one of --impl, and neither limit-nt nor limit-plain");
  o.ops.clear();
  for (const std::string& name : ops) o.ops.push_back(opNamed(name));
  o.bytes = {integer("-b", from), integer("-e", to), static_cast<double>(integer("-f", factor))};
  if (o.tokens.to < o.tokens.from) throw UsageError("--tokens", "MAX is below MIN");
  if (o.tokens.factor < 2 || o.bytes.factor < 2) throw UsageError("factor", "steps need a factor of 2 or more");
  if (o.nodes > o.ranks) throw UsageError("--nodes", "more nodes than ranks");
  for (Op op : o.ops)
    if (op == Op::combine && (o.type == Type::u8 || o.type == Type::fp8))
      throw UsageError("--dtype", "combine sums bfloat16, half or float");
}

void checkCuda(Options& o, const std::vector<std::string>& sms) {
  const bool cuda = o.device == "cuda";
  o.sms.clear();
  for (const std::string& text : sms) {
    const std::int64_t value = integer("--sms", text);
    if (value > 1024) throw UsageError("--sms", "'" + text + "': no GPU has so many");
    o.sms.push_back(static_cast<int>(value));
  }
  if (!cuda && (o.graph || o.scales || o.gpus > 0 || o.sms != std::vector<int>{0}))
    throw UsageError("--device", "--gpus, --sms, --graph and --scales want --device cuda");
  if (!cuda) return;
  for (const Op op : o.ops)
    if (!isShuffle(op)) throw UsageError("--op", "on GPUs dispatch and combine are measured");
  if (o.nodes > 1) throw UsageError("--nodes", "on GPUs one node is measured");
  if (o.kind == RankKind::processes && o.scales)
    throw UsageError("--processes", "--scales wants all ranks in one process");
  if (o.graph && o.planOnce) throw UsageError("--graph", "a replay plans anew each time: no --plan-once");
}

}  // namespace

const char* nameOf(Op op) {
  switch (op) {
    case Op::dispatch:
      return "dispatch";
    case Op::combine:
      return "combine";
    case Op::alltoallv:
      return "alltoallv";
    case Op::gathersend:
      return "gathersend";
    case Op::sendrecv:
      return "sendrecv";
  }
  return "?";
}

const char* nameOf(Type type) {
  for (const TypeName& t : kTypes)
    if (t.type == type) return t.name;
  return "?";
}

const char* nameOf(Memory memory) { return memory == Memory::window ? "window" : "private"; }

std::size_t bytesOf(Type type) {
  for (const TypeName& t : kTypes)
    if (t.type == type) return t.bytes;
  return 0;
}

std::vector<std::int64_t> valuesOf(const Sweep& sweep) {
  std::vector<std::int64_t> values;
  for (std::int64_t v = sweep.from; v <= sweep.to;) {
    values.push_back(v);
    auto next = static_cast<std::int64_t>(std::llround(static_cast<double>(v) * sweep.factor));
    v = next > v ? next : v + 1;
  }
  return values;
}

std::vector<std::string> splitList(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

ParsedOptions parseOptions(const std::vector<std::string>& words) {
  ParsedOptions parsed;
  Options& o = parsed.options;
  std::string tokens = "1024", type = "bfloat16", memory = "window", from = "1M", to = "64M", factor = "4";
  std::vector<std::string> ops{"dispatch", "combine"}, sms{"0"};
  int checked = 1;
  bool threads = false, processes = false;

  Flags flags(
      "shuffle_perf",
      "shuffle_perf: how fast MoE tokens reach their experts and come back, beside the limit of this machine and the "
      "peers\n"
      "that users would take otherwise. Every row is checked against a naive shuffle before it is timed.\n"
      "Formulas and method: docs/benchmark.md");
  flags.add("--ranks", o.ranks, "Ranks, each a process (or thread) that this program starts")
      .within(1, 128)
      .showDefault();
  flags.add("--nodes", o.nodes, "Emulated nodes: ranks are dealt to them in blocks, on this one machine")
      .within(1, 128)
      .showDefault();
  flags.add("--tokens", tokens, "Tokens of a rank: MIN[:MAX[:FACTOR]] (dispatch, combine)").showDefault();
  flags.add("--hidden", o.hidden, "Elements of a row").within(1, 1 << 24).showDefault();
  flags.add("--dtype", type, "uint8 fp8_e4m3 bfloat16 half float").showDefault();
  const Flags::Flag topk = flags.add("--topk", o.topk, "Experts of a token").within(1, 1024).showDefault();
  const Flags::Flag experts =
      flags.add("--experts", o.experts, "Experts of all ranks").within(1, 1 << 20).showDefault();
  flags.add("--op", ops, "dispatch,combine,alltoallv,gathersend,sendrecv").commas().showDefault();
  flags.add("-b,--minbytes", from, "Smallest send buffer of a rank (alltoallv, gathersend, sendrecv)").showDefault();
  const Flags::Flag largest =
      flags.add("-e,--maxbytes", to, "Largest send buffer; -b where it is below that by default").showDefault();
  flags.add("-f,--stepfactor", factor, "From one size to the next").showDefault();
  flags.add("--memory", memory, "window (fuscoMemAlloc) or private (the rank's own, as malloc gives)").showDefault();
  const Flags::Flag impls =
      flags
          .add("--impl", o.impls,
               "fusco,mpi-alltoallv,mpi-alltoallw,mpi-sendrecv (cuda: fusco,staged,nccl); the limit "
               "always runs beside them")
          .commas()
          .showDefault();
  flags
      .add("--routing", o.routing,
           "uniform | single-node | other-node | imbalanced | masked | one-expert | zipf:S | "
           "counts:FILE#MODEL/SET/LAYER | "
           "trace:FILE[#LAYER]")
      .showDefault();
  flags.add("--device", o.device, "host or cuda").showDefault();
  flags.add("--gpus", o.gpus, "cuda: GPUs that ranks are dealt to; 0: all, at most one a rank")
      .within(0, 64)
      .showDefault();
  flags.add("--sms", sms, "cuda: multiprocessors of a GPU that fusco may take, one after the other; 0: all")
      .commas()
      .showDefault();
  flags.add("--graph", o.graph, "cuda: plan in capacity mode, captured in a CUDA graph and replayed");
  flags.add("--scales", o.scales, "cuda: dispatch brings an FP32 scale for each 128 elements beside the rows");
  flags.add("--balance", o.balance, "Choice of forwarders between nodes: none paper full").showDefault();
  flags
      .add("--dedup", o.dedup,
           "Copies of a token: none (K), node (one a node), full (one a rank), auto (the library's)")
      .showDefault();
  flags
      .add("--net", o.net,
           "Between nodes: auto, tcp, shm or verbs (FUSCO_NET); with tcp the MPI peers use it as well; with tcp "
           "and verbs the wire alone is measured")
      .showDefault();
  flags.add("--hca", o.hca,
            "RDMA devices of each node where one machine stands for several: FUSCO_IB_HCA of the first node / of "
            "the second ...");
  flags.add("--netns", o.netns, "bench/cluster gives it: rank r enters the network namespace of its node").hidden();
  flags.add("--emulated", o.emulated, "bench/cluster gives it: what the nodes and lanes are").hidden();
  flags.add("--plan-once", o.planOnce, "Make the plan once, outside the timed part of dispatch (peers too)");
  flags.add("--processes", processes, "Ranks are forked processes (default)");
  flags.add("--threads", threads, "Ranks are threads of this process").excludes("--processes");
  flags.add("--seed", o.seed, "Of routing and data").showDefault();
  flags.add("-w,--warmup_iters", o.warmup, "Untimed iterations before each round").within(0, 10000).showDefault();
  flags.add("-n,--iters", o.iterations, "Timed iterations of a round").within(1, 10000).showDefault();
  flags.add("--rounds", o.rounds, "Rounds, in which all implementations take turns").within(1, 1000).showDefault();
  flags.add("-c,--check", checked, "1: compare every result with the naive shuffle, 0: do not")
      .within(0, 1)
      .showDefault();
  flags.add("--timeout", o.timeoutSeconds, "Seconds that one step may take before all ranks are ended")
      .within(1, 86400)
      .showDefault();
  flags.add("-J,--json", o.jsonFile, "Write the rows to FILE as a JSON array");
  flags.add("--mpi-peer", o.mpiPeer, "The peer program (default: shuffle_mpi_peer beside this one)");
  flags.add("-v,--verbose", o.verbose, "A second line for each row: stages, rounds");
  flags.add("--corrupt", o.corrupt, "Spoil one byte of this implementation's checked output, to see it found");

  const auto check = [&] {
    if (o.device == "cuda" && !impls.given()) o.impls = {"fusco", "staged", "nccl"};
    checkTogether(o, tokens, type, memory, ops, from, to, factor);
    if (o.bytes.to < o.bytes.from) {
      if (largest.given()) throw UsageError("-e", "is below -b");
      o.bytes.to = o.bytes.from;
    }
    o.kind = threads || (o.device == "cuda" && !processes) ? RankKind::threads : RankKind::processes;
    checkCuda(o, sms);
  };
  parsed.leave = !flags.parse(words, &parsed.exitCode, check);
  if (parsed.leave) return parsed;
  o.check = checked != 0;
  o.topkGiven = topk.given();
  o.expertsGiven = experts.given();
  return parsed;
}

std::vector<Case> casesOf(const Options& options) {
  std::vector<Case> cases;
  for (Op op : options.ops) {
    if (isShuffle(op)) {
      for (std::int64_t tokens : valuesOf(options.tokens))
        for (int sms : options.sms) cases.push_back({op, tokens, 0, sms});
    } else {
      for (std::int64_t bytes : valuesOf(options.bytes)) cases.push_back({op, 0, bytes, 0});
    }
  }
  return cases;
}

}  // namespace fusco::bench
