// How fast the host executors move and sum rows: GB/s by operation, implementation, kind of memory and number of
// threads, with this machine's plain non-temporal fill beside it. Each thread acts as a rank: it places its tokens'
// rows on random final rows of all ranks' windows, or sums rows from them. Results are checked before they are timed.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "bench/printed.h"
#include "measure.h"
#include "region.h"

int main(int argc, char** argv) {
  fusco::bench::Options o;
  CLI::App app{"GB/s of the host executors. Bytes read and written are counted; of a fill, bytes written."};
  app.add_option("--tokens", o.tokens, "tokens of each rank")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--row", o.rowBytes, "bytes of a row, a multiple of 256")->capture_default_str();
  app.add_option("--topk", o.topk, "places of each row")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--rounds", o.rounds, "timed rounds")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_flag("--cpu-time", o.cpuTime, "count each thread's CPU time, for a machine that others use at the same time");
  app.add_option("--threads", o.threads, "numbers of threads, each a rank")->delimiter(',')->capture_default_str();
  app.add_option("--memory", o.memory, "kinds of memory")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::IsMember(fusco::bench::memoryKinds()));
  app.add_option("--impl", o.impl, "implementations")->delimiter(',')->capture_default_str();
  app.add_option("--ops", o.ops, "operations")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::IsMember({"fill", "place", "cast", "sum", "back", "move"}));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (o.rowBytes == 0 || o.rowBytes % 256 != 0) {
    std::fprintf(stderr, "exec_perf: --row %zu is no multiple of 256\n", o.rowBytes);
    return 2;
  }
  std::size_t wrong = 0;
  std::printf("# %zu tokens a rank, rows of %zu bytes, top-%zu, %d rounds, %s time\n", o.tokens, o.rowBytes, o.topk,
              o.rounds, o.cpuTime ? "CPU" : "wall");
  std::printf("%-13s %7s %-6s %-7s %8s %8s %7s %6s\n", "# memory", "threads", "op", "impl", "median", "best", "of fill",
              "#wrong");
  for (const std::string& kind : o.memory)
    for (int threads : o.threads) wrong += fusco::bench::measure(o, kind, threads);
  try {
    fusco::bench::requirePrinted();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "exec_perf: %s\n", error.what());
    return 2;
  }
  return wrong == 0 ? 0 : 1;
}
