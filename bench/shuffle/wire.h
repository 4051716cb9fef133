// The wire alone: what crosses between nodes, and nothing else, over TCP on the loopback interface or by RDMA writes.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "shuffle/implementation.h"

namespace fusco::bench {

// Every rank sends as many bytes to every rank of another node as a shuffle with one copy a token and node has for it,
// from one piece of memory into another, and gets as many. Called by all ranks of the group together.
std::unique_ptr<Implementation> makeWire(const CaseContext& context);
// The same by RDMA writes of 256 KiB over a queue pair for each pair of ranks, with nothing of the library: devices in
// the order of FUSCO_IB_HCA, ranks of a node take them in turn. Throws std::runtime_error that says what is missing.
std::unique_ptr<Implementation> makeVerbsWire(const CaseContext& context);

// What this rank sends to another one, and gets from it; only those of other nodes with which there is anything.
struct Crossing {
  int rank;
  std::size_t out, in;
};
std::vector<Crossing> crossingsOf(const CaseContext& context);

}  // namespace fusco::bench
