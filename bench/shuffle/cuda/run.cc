#include "shuffle/cuda/run.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <optional>

#include "shuffle/cuda/implementation.h"
#include "shuffle/cuda/measure.h"
#include "shuffle/json.h"
#include "shuffle/table.h"

namespace fusco::bench::gpu {

namespace {

// The same shape with other experts for each token, so that a replay has something new to plan.
RoutingSource otherRouting(const Options& options) {
  Options other = options;
  ++other.seed;
  return makeRoutingSource(other);
}

int runOn(const Options& options, const std::vector<std::string>& words, World& world, Watchdog& watchdog) {
  const RoutingSource routing = makeRoutingSource(options), other = otherRouting(options);
  Header header;
  header.machine = thisMachine();
  header.machine.gpu = gpuName(0);
  header.machine.driver = driverName();
  header.machine.gpus = world.gpus();
  header.command = commandLine(words);
  header.date = utcNow();
  header.topk = routing.topk();
  header.experts = routing.experts();
  header.routingRemark = routing.remark();
  header.versions = versionsOf("");
  std::vector<std::string> impls = options.impls;
  std::shared_ptr<Nccl> nccl;
  if (std::find(impls.begin(), impls.end(), "nccl") != impls.end()) {
    watchdog.step("opening NCCL");
    try {
      nccl = openNccl(world);
      header.versions.nccl = ncclVersion(*nccl);
    } catch (const std::exception& error) {
      header.missing.push_back(fmt::format("nccl: {}", error.what()));
    }
  }
  printHeader(options, header);

  std::vector<Row> rows;
  std::uint64_t wrongRows = 0;
  bool failed = false;
  Measurer measurer(world, options, watchdog, impls, nccl);
  for (const Case& which : casesOf(options)) {
    const CaseContext context = makeCase(options, &routing, which, 0);
    const ShuffleMap second = naiveShuffle(other, which.tokens, options.ranks);
    const CaseResult result = measurer.measure(context, second);
    printRows(options, result);
    for (const Row& row : result.rows) wrongRows += row.wrong > 0;
    rows.insert(rows.end(), result.rows.begin(), result.rows.end());
    failed = failed || result.failed;
    // What has been seen is kept, should a later case end the program.
    if (!options.jsonFile.empty()) writeJson(options.jsonFile, jsonOf(options, header, rows));
  }
  printEnd(options, rows.size(), wrongRows, failed);
  return failed || wrongRows > 0 ? 1 : 0;
}

}  // namespace

int run(const Options& options, const std::vector<std::string>& words) {
  Watchdog watchdog(options.timeoutSeconds);
  watchdog.step("finding GPUs");
  std::optional<World> world;
  try {
    world.emplace(options.ranks, options.gpus);
  } catch (const std::exception& error) {
    fmt::print("# missing: device cuda: {}\n# 0 rows\n", error.what());
    return 0;
  }
  return runOn(options, words, *world, watchdog);
}

}  // namespace fusco::bench::gpu
