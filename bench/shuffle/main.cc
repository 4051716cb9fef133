#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <stdexcept>

#include "printed.h"
#if defined(FUSCO_BENCH_HAS_CUDA)
#include "shuffle/cuda/process_rank.h"
#include "shuffle/cuda/run.h"
#endif
#include "shuffle/harness.h"
#include "shuffle/impl_fusco.h"
#include "shuffle/json.h"
#include "shuffle/limit.h"
#include "shuffle/measure.h"
#include "shuffle/table.h"

namespace fusco::bench {
namespace {

bool isPeer(const std::string& impl) { return impl.rfind("mpi-", 0) == 0; }

// What a rank of this program does from its first to its last moment.
int rankMain(Session& session, const Options& options, int rank) {
#if defined(FUSCO_BENCH_HAS_CUDA)
  if (options.device == "cuda") {
    std::unique_ptr<gpu::ProcessRank> ofGpu;
    return serveRank(session, options, kOwnGroup, rank, [&](const std::string&, const CaseContext& context) {
      if (!ofGpu) ofGpu = std::make_unique<gpu::ProcessRank>(session, options, rank);
      return ofGpu->make(context);
    });
  }
#endif
  FuscoRank fusco(session, options, rank);
  return serveRank(session, options, kOwnGroup, rank, [&](const std::string& name, const CaseContext& context) {
    return isLimit(name) ? makeLimit(name, context) : fusco.make(context);
  });
}

struct Prepared {
  std::vector<Case> cases;
  std::vector<CaseSize> sizes;
  std::uint64_t windowBytes = 1, outputBytes = 1;
};

Prepared prepare(const Options& options, const RoutingSource* routing) {
  Prepared prepared;
  prepared.cases = casesOf(options);
  for (const Case& which : prepared.cases) {
    CaseSize size = sizeOf(makeCase(options, routing, which, 0), options.impls);
    prepared.windowBytes = std::max(prepared.windowBytes, size.windowBytes);
    prepared.outputBytes = std::max(prepared.outputBytes, size.outputBytes);
    prepared.sizes.push_back(size);
  }
  return prepared;
}

// Starts the peers, if any are wanted and can be; says in `header` which are missing.
void startPeers(Harness& harness, const Options& options, bool underMpirun, Header& header,
                std::vector<std::string>& impls) {
  auto useful = [&](const std::string& impl) {
    return isPeer(impl) &&
           std::any_of(options.ops.begin(), options.ops.end(), [&](Op op) { return carriesOut(impl, op); });
  };
  if (std::none_of(impls.begin(), impls.end(), useful)) return;
  std::string reason = "this program runs under mpirun itself; start it directly to have the MPI peers beside it";
  if (!underMpirun)
    reason = harness.startPeers(options.mpiPeer.empty() ? programFolder() + "/shuffle_mpi_peer" : options.mpiPeer);
  if (reason.empty()) {
    header.peerCommand = harness.peerCommand();
    return;
  }
  for (const std::string& impl : impls)
    if (useful(impl)) header.missing.push_back(impl + ": " + reason);
  impls.erase(std::remove_if(impls.begin(), impls.end(), isPeer), impls.end());
}

int measureAll(Harness& harness, const Options& options, const Prepared& prepared, Header header, bool underMpirun) {
  std::vector<std::string> impls = options.impls;
#if defined(FUSCO_BENCH_HAS_CUDA)
  if (options.device == "cuda") {
    // Not before the ranks are there: the driver does not survive a fork.
    try {
      gpu::describeGpus(options, header.machine);
    } catch (const std::exception& error) {
      fmt::print("# missing: device cuda: {}\n# 0 rows\n", error.what());
      return 0;
    }
    for (const std::string& impl : impls)
      if (impl != "fusco") header.missing.push_back(impl + ": it runs where all ranks are in one process (--threads)");
    impls = {"fusco"};
  }
#endif
  startPeers(harness, options, underMpirun, header, impls);
  header.versions = versionsOf(harness.session().header().peerVersion);
  printHeader(options, header);

  Measurer measurer(harness, options);
  measurer.setImpls(impls);
  std::vector<Row> rows;
  std::uint64_t wrongRows = 0;
  bool failed = false;
  std::string fatal;
  for (std::size_t i = 0; i < prepared.cases.size() && fatal.empty(); ++i) {
    try {
      CaseResult result = measurer.measure(static_cast<std::uint32_t>(i), prepared.cases[i], prepared.sizes[i]);
      printRows(options, result);
      for (const Row& row : result.rows) wrongRows += row.wrong > 0;
      rows.insert(rows.end(), result.rows.begin(), result.rows.end());
      failed = failed || result.failed;
    } catch (const GroupFailure& failure) {
      fatal = failure.what();
    }
  }
  if (!fatal.empty()) fmt::print("# ended: {}\n", fatal);
  printEnd(options, rows.size(), wrongRows, failed || !fatal.empty());
  if (!options.jsonFile.empty()) writeJson(options.jsonFile, jsonOf(options, header, rows));
  requirePrinted();
  return failed || !fatal.empty() || wrongRows > 0 ? 1 : 0;
}

int coordinate(const Options& options, const std::vector<std::string>& words, const Launched& launched) {
  bool shuffles = std::any_of(options.ops.begin(), options.ops.end(), isShuffle);
  std::optional<RoutingSource> routing;
  if (shuffles) routing.emplace(makeRoutingSource(options));
  Prepared prepared = prepare(options, routing ? &*routing : nullptr);
  Header header;
  header.machine = thisMachine();
  header.command = commandLine(words);
  header.date = utcNow();
  if (routing) {
    header.topk = routing->topk();
    header.experts = routing->experts();
    header.routingRemark = routing->remark();
  }
  Harness harness(Session::create(words, options.ranks, options.iterations, prepared.windowBytes, prepared.outputBytes),
                  options);
  auto main = [&options](Session& session, int rank) { return rankMain(session, options, rank); };
  if (launched.active) {
    publishSession(launched, harness.session().path());
    harness.startLaunched(main);
    withdrawSession(launched);
  } else {
    harness.startRanks(main, options.kind);
  }
  return measureAll(harness, options, prepared, header, launched.active);
}

int run(const std::vector<std::string>& words) {
  Launched launched = launchedByMpirun();
  bool speaks = !launched.active || launched.rank == 0;
  ParsedOptions parsed = parseOptions(words);
  if (parsed.leave) return parsed.exitCode;
  Options& options = parsed.options;
  if (launched.active) {
    if (!launched.problem.empty()) throw std::runtime_error(launched.problem);
    options.ranks = launched.ranks;
    if (options.nodes > options.ranks) throw std::runtime_error("--nodes: more nodes than mpirun has ranks");
    options.kind = RankKind::processes;
  }
  if (speaks && !options.jsonFile.empty()) checkWritable(options.jsonFile);
  if (options.device == "cuda") {
#if defined(FUSCO_BENCH_HAS_CUDA)
    if (options.kind == RankKind::threads) return gpu::run(options, words);
#else
    if (speaks)
      fmt::print(
          "# missing: device cuda: this shuffle_perf was built without CUDA, it drives host memory (--device host)\n# "
          "0 rows\n");
    return 0;
#endif
  }
  if (speaks) return coordinate(options, words, launched);
  Session session = Session::attach(awaitSession(launched, options.timeoutSeconds));
  return rankMain(session, options, launched.rank);
}

}  // namespace
}  // namespace fusco::bench

int main(int argc, char** argv) {
  try {
    return fusco::bench::run(std::vector<std::string>(argv, argv + argc));
  } catch (const std::exception& error) {
    fmt::print(stderr, "shuffle_perf: {}\n", error.what());
    return 2;
  }
}
