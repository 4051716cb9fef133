// The load balancer: which forwarders take a source's tokens for a node, and by which lanes they leave. Pure: every
// rank that has the same loads gets the same topology.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "plan/lanes.h"
#include "plan/plan.h"
#include "plan/topology.h"

namespace fusco::plan {

enum class Balance {
  none,   // the default flows: local index to local index
  paper,  // the paper's groups (arXiv 2512.22036): one rank of each node, sorted by load, shifted by the node's index
  full,   // lanes of the source and forwarders of the destination filled evenly, each lane by its speed; what does not
          // fit spills to idle ones
};

const char* balanceName(Balance balance);
// Throws Error(invalidArgument) unless text is none, paper or full.
Balance parseBalance(std::string_view text);

// Enters flows for the coming step into the topology and raises its version by 1. copies[source * nodes + node]: rows
// that each source had for each node in the previous step (Analysis::copiesOfNode); those to the own node do not count.
// Takes time in the order of ranks x nodes. `speeds`, which only `full` asks: null, all lanes are alike.
//
// `full` leaves a load at home (its own lanes, the forwarder of its local index) until that is 1/64 above its share, so
// that loads which are as good as even cost no flows.
void balanceFlows(Topology& topology, std::span<const std::int32_t> copies, Balance balance,
                  const LaneSpeeds* speeds = nullptr);

// The lane of its node by which a forwarder takes rows in.
int laneInto(const Topology& topology, int forwarder);

// Copies that cross each lane, [node * lanes + lane].
struct LaneLoads {
  explicit LaneLoads(const Topology& topology);
  void add(const Topology& topology, const View& plan);  // one rank's plan

  std::vector<std::int64_t> out, in;
};

// How even the lanes are: 1 is even, 1.5 means that the busiest lane carries half as much again as the mean.
struct Spread {
  double out = 1, in = 1;                // busiest lane over the mean of its own node's lanes, worst node
  double clusterOut = 1, clusterIn = 1;  // over the mean of all lanes
};

// In the mean count the lanes that can be reached: all for out, at most one for each rank of the node for in.
Spread spreadOf(const Topology& topology, const LaneLoads& loads);

}  // namespace fusco::plan
