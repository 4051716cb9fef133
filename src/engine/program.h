// What an operation is made of: steps. Lowered from the operation's kind and the topology alone, never from counts, so
// that a driver that cannot see the counts can run it (docs/design.md, program and drivers).
#pragma once

#include <cstdint>
#include <vector>

#include "plan/topology.h"

namespace fusco::engine {

enum class OperationKind : std::uint32_t { plan = 1, dispatch = 2, combine = 3, combineBackward = 4, transfers = 5 };
const char* operationName(OperationKind kind);

enum class StepKind : std::uint8_t {
  ready,        // tell the node's ranks where this rank's memory is
  waitReady,    // learn where theirs is
  put,          // own node: rows from here to their final places, or home rows summed from the node's memory
  extract,      // stream `index` out: rows into slices
  place,        // stream `index` in: rows from slices to their final places
  sendBack,     // stream `index` in, reversed: sums or dots back to their source
  receiveBack,  // stream `index` out, reversed: dots that come home
  done,         // tell the node's ranks that this rank is finished with their memory
  waitDone,
  finish,  // duplicates expanded, staged rows copied out
};

// A step may run once all steps of stages below `needs` are complete.
struct Step {
  StepKind kind;
  std::uint8_t stage;
  std::uint8_t needs;
  std::int32_t index;
};

using Program = std::vector<Step>;

// All flows of a rank to one forwarder by one lane, in order; and, at the forwarder, those of one source.
struct Stream {
  std::int32_t peer;
  std::int32_t path;                // of the topology, between the two
  std::vector<std::int32_t> flows;  // indices in the plan's flow list; empty for streams in
};

struct Streams {
  int ownFlow = 0;          // index of the own node's flow
  std::vector<Stream> out;  // by destination node, then share
  std::vector<Stream> in;   // by source rank, then share
};

Streams streamsOf(const plan::Topology& topology, int rank);

Program lower(OperationKind kind, const Streams& streams);

inline constexpr int kStages = 6;

}  // namespace fusco::engine
