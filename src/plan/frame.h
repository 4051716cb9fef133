// What is known of a plan before any routing map: for a planner that has no topology, such as the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace fusco::plan {

struct Frame {
  ArenaHeader header{};              // counts are 0
  std::vector<std::uint32_t> homes;  // [experts]: local index of its rank | node << 16
  // In plan order. copyBegin and copyEnd are the flow's part of its node's copies, in 65536ths.
  std::vector<Flow> flows;
};

// `map` needs no ids: its tokens are a capacity. Throws as arenaBytes() does.
Frame makeFrame(const RoutingMap& map, const Topology& topology, int rank, const Options& options);

}  // namespace fusco::plan
