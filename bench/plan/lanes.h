// How evenly the balancer loads the lanes, read off the plans of all ranks.
#pragma once

#include <string>

#include "made_up_routing.h"
#include "plan/balance.h"

namespace fusco::bench {

struct LaneQuestion {
  int nodes = 8;
  int nodeSize = 8;
  int lanes = 8;
  std::int64_t tokens = 4096;
  int topk = 8;
  int experts = 256;
  std::string routing = "uniform";
};

struct LaneAnswer {
  plan::Spread spread;
  std::int64_t copies = 0;  // that cross nodes
  int flows = 0;            // between nodes, of all ranks
};

// The balancer sees the loads of one step; the answer is about the plans of the next one, drawn from another seed.
LaneAnswer measureLanes(const LaneQuestion& question, plan::Balance balance);

}  // namespace fusco::bench
