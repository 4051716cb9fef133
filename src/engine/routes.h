// By which ways a plan's rows travel: a topology with the balancer's flows in it, and the streams that follow from it.
// A plan keeps what it was made with; later plans may have others.
#pragma once

#include <utility>

#include "engine/program.h"
#include "plan/topology.h"

namespace fusco::engine {

struct Routes {
  Routes(plan::Topology flows, int rank) : topology(std::move(flows)), streams(streamsOf(topology, rank)) {}

  plan::Topology topology;
  Streams streams;
};

}  // namespace fusco::engine
