// How long one rank needs to plan, on one core, the exchange apart.
#pragma once

#include <cstdint>

namespace fusco::bench {

struct PlanQuestion {
  std::int64_t tokens = 4096;
  int topk = 8;
  int ranks = 64;
  int nodeSize = 8;
  int experts = 256;
  int idBytes = 8;
  bool weights = true;
  double masked = 0;  // share of slots that hold -1, drawn at random
  int warmups = 5;
  int rounds = 200;
};

struct PlanTime {
  double analyseP50 = 0;  // microseconds
  double planP50 = 0;
  double p50 = 0, p99 = 0;  // both together
  std::int64_t copies = 0, entries = 0;
  std::int64_t arenaBytes = 0;
  std::int64_t wrong = 0;  // entries that a naive count puts elsewhere
};

// Uniform routing, but for masked slots. The plan is checked before it is timed.
PlanTime timePlanning(const PlanQuestion& question);

}  // namespace fusco::bench
