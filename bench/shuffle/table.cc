#include "shuffle/table.h"

#include <fmt/format.h>

#include <cstdio>

namespace fusco::bench {
namespace {

std::string bandwidth(double gbps) { return gbps >= 100 ? fmt::format("{:.1f}", gbps) : fmt::format("{:.2f}", gbps); }

std::string microseconds(double us) { return us >= 1000 ? fmt::format("{:.0f}", us) : fmt::format("{:.1f}", us); }

}  // namespace

void printHeader(const Options& o, const Header& h) {
  fmt::print("# shuffle_perf, fusco {} ({}), {}\n", h.versions.library, h.versions.compiler, h.date);
  const bool cuda = o.device == "cuda";
  fmt::print("# machine: {}, {} cores, {:.0f} GB, {}, {}; ", h.machine.cpu, h.machine.cores, h.machine.memoryGb,
             h.machine.os, h.machine.kernel);
  if (cuda)
    fmt::print("{} x {}, {}\n", h.machine.gpus, h.machine.gpu, h.machine.driver);
  else
    fmt::print("the limit uses {} stores\n", h.machine.stores);
  fmt::print("# {} ranks as {} on {}; device {}, {} memory, rows of {} {} ({} bytes)\n", o.ranks,
             o.kind == RankKind::threads ? "threads" : "processes",
             o.nodes == 1 ? std::string("one node") : fmt::format("{} EMULATED nodes of this one machine", o.nodes),
             o.device, cuda ? "GPU" : nameOf(o.memory), o.hidden, nameOf(o.type),
             o.hidden * static_cast<std::int64_t>(bytesOf(o.type)));
  if (h.topk > 0)
    fmt::print("# routing {}: top-{} of {} experts{}{}; dedup {}, balance {}; dispatch {}\n", o.routing, h.topk,
               h.experts, h.routingRemark.empty() ? "" : "; ", h.routingRemark, o.dedup, o.balance,
               o.planOnce ? "with a plan made before (--plan-once)" : "includes making its plan");
  if (!o.emulated.empty()) fmt::print("# EMULATED cluster: {}\n", o.emulated);
  if (o.nodes > 1) fmt::print("# between nodes: net {}\n", o.net);
  if (cuda && o.kind == RankKind::threads)
    fmt::print(
        "# {} rounds, all implementations in turn; a time is that of {} iterations {}, divided, from CUDA event to "
        "event; p50: median of the rounds, p99: of all of them\n",
        o.rounds, o.iterations, o.graph ? "replayed as one graph" : "launched one behind the other");
  else
    fmt::print(
        "# {} rounds of {} + {} iterations, all implementations in turn; p50: median of the rounds, p99: of all "
        "iterations; a time runs from the first rank's start to the last one's end\n",
        o.rounds, o.warmup, o.iterations);
  fmt::print("# {}\n",
             o.check ? "every result compared with a naive shuffle before and after it was timed (#wrong: elements)"
                     : "results NOT checked (-c 0)");
  if (h.machine.load > 0.5 * h.machine.cores)
    fmt::print("# this machine is busy (load {:.1f} on {} cores): trust ratios of one run, not times\n", h.machine.load,
               h.machine.cores);
  if (!cuda && o.ranks > h.machine.cores)
    fmt::print("# {} ranks share {} cores: times include their taking turns\n", o.ranks, h.machine.cores);
  if (!h.peerCommand.empty()) fmt::print("# peers: {}: {}\n", h.versions.mpi, h.peerCommand);
  for (const std::string& missing : h.missing) fmt::print("# missing: {}\n", missing);
  fmt::print("#\n# {:>10} {:>10} {:>9} {:>10} {:>7} {:<14} {:>10} {:>10} {:>8} {:>8} {:>7} {:>7} {:>9}\n", "size",
             "count", "type", "op", "tokens", "impl", "p50", "p99", "algbw", "busbw", "%limit", "#wrong", "plan");
  fmt::print("# {:>10} {:>10} {:>9} {:>10} {:>7} {:<14} {:>10} {:>10} {:>8} {:>8} {:>7} {:>7} {:>9}\n", "(B)",
             "(rows|el)", "", "", "", "", "(us)", "(us)", "(GB/s)", "(GB/s)", "", "", "(us)");
  std::fflush(stdout);
}

namespace {

void printColumns(const Options& o, const Row& row) {
  fmt::print("  {:>10} {:>10} {:>9} {:>10} {:>7} {:<14} {:>10} {:>10} {:>8} {:>8} {:>7.1f} {:>7} {:>9}\n", row.bytes,
             row.count, nameOf(o.type), nameOf(row.which.op),
             isShuffle(row.which.op) ? std::to_string(row.which.tokens) : "-", row.impl, microseconds(row.p50Us),
             microseconds(row.p99Us), bandwidth(row.algbw), bandwidth(row.busbw), 100 * row.ofLimit,
             row.checked ? std::to_string(row.wrong) : "N/A", row.planUs > 0 ? microseconds(row.planUs) : "-");
}

void printGpuRows(const Options& o, const CaseResult& result) {
  for (const Row& row : result.rows) {
    printColumns(o, row);
    std::string figures;
    if (row.which.sms > 0 && row.impl == "fusco") figures += fmt::format("; {} SMs of a GPU", row.which.sms);
    for (const auto& [name, value] : row.figures) figures += fmt::format("; {} {:.4g}", name, value);
    if (!row.remark.empty()) figures += "; " + row.remark;
    if (!figures.empty()) fmt::print("#   {}\n", figures.substr(2));
    if (!o.verbose) continue;
    std::string rounds;
    for (double us : row.roundP50Us) rounds += fmt::format(" {}", microseconds(us));
    fmt::print("#     rounds (us){}\n", rounds);
  }
  for (const std::string& remark : result.remarks) fmt::print("# {}\n", remark);
  std::fflush(stdout);
}

}  // namespace

void printRows(const Options& o, const CaseResult& result) {
  if (o.device == "cuda") {
    printGpuRows(o, result);
    return;
  }
  for (const Row& row : result.rows) {
    printColumns(o, row);
    if (row.impl == "limit") {
      fmt::print(
          "#   the limit reads {} and writes {} GB/s on all ranks together ({} stores); a plain non-temporal fill "
          "writes {}",
          bandwidth(row.readGbps), bandwidth(row.writeGbps), row.stores, bandwidth(row.fillGbps));
      if (row.which.op == Op::dispatch && row.fillGbps > 0)
        fmt::print(": {:.0f} %", 100 * row.writeGbps / row.fillGbps);
      fmt::print("\n");
      if (row.wireAloneUs > 0)
        fmt::print("#   the wire alone takes {} us, placement alone {} us: {} us together\n",
                   microseconds(row.wireAloneUs), microseconds(row.p50Us), microseconds(row.wireAloneUs + row.p50Us));
    } else if (result.rows[0].wireAloneUs > 0) {
      fmt::print("#   {:.2f} times wire alone and placement alone together; {:.0f} % of the wire alone\n",
                 row.p50Us / (result.rows[0].wireAloneUs + result.rows[0].p50Us),
                 100 * result.rows[0].wireAloneUs / row.p50Us);
    }
    if (!o.verbose) continue;
    std::string rounds;
    for (double us : row.roundP50Us) rounds += fmt::format(" {}", microseconds(us));
    if (row.impl == "limit")
      fmt::print("#     rounds (us){}\n", rounds);
    else
      fmt::print("#     plan {} extract {} wire {} place {} sum {} wait {} us, {:.0f} wire bytes; rounds (us){}\n",
                 microseconds(row.planUs), microseconds(row.extractUs), microseconds(row.wireUs),
                 microseconds(row.placeUs), microseconds(row.sumUs), microseconds(row.waitUs), row.wireBytes, rounds);
  }
  for (const std::string& remark : result.remarks) fmt::print("# {}\n", remark);
  std::fflush(stdout);
}

void printEnd(const Options& o, std::size_t rows, std::uint64_t wrongRows, bool failed) {
  if (!o.check)
    fmt::print("#\n# {} rows, none checked\n", rows);
  else
    fmt::print("#\n# {} rows, {} with wrong elements: {}\n", rows, wrongRows,
               failed || wrongRows > 0 ? "FAILED" : "OK");
}

}  // namespace fusco::bench
