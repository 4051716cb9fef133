#include "engine/program.h"

#include <algorithm>

namespace fusco::engine {

const char* operationName(OperationKind kind) {
  switch (kind) {
    case OperationKind::plan:
      return "plan";
    case OperationKind::dispatch:
      return "dispatch";
    case OperationKind::combine:
      return "combine";
    case OperationKind::combineBackward:
      return "combine backward";
    case OperationKind::transfers:
      return "transfers";
  }
  return "unknown operation";
}

Streams streamsOf(const plan::Topology& topology, int rank) {
  Streams streams;
  const int own = topology.nodeOf(rank);
  int flow = 0;
  for (int node = 0; node < topology.nodes(); ++node) {
    if (node == own) {
      streams.ownFlow = flow++;
      continue;
    }
    const std::size_t firstOfNode = streams.out.size();
    for (const plan::FlowShare& share : topology.flowsTo(rank, node)) {
      const int path = topology.pathOf(rank, share.forwarder, share.lane);
      Stream* found = nullptr;
      for (std::size_t i = firstOfNode; i < streams.out.size(); ++i) {
        if (streams.out[i].peer == share.forwarder && streams.out[i].path == path) found = &streams.out[i];
      }
      if (found == nullptr) {
        streams.out.push_back({share.forwarder, path, {}});
        found = &streams.out.back();
      }
      found->flows.push_back(flow++);
    }
  }
  for (int source = 0; source < topology.ranks(); ++source) {
    const std::size_t firstOfSource = streams.in.size();
    for (const plan::FlowShare& share : topology.flowsTo(source, own)) {
      if (share.forwarder != rank) continue;
      const int path = topology.pathOf(source, rank, share.lane);
      const auto known = [&](const Stream& stream) { return stream.path == path; };
      if (std::none_of(streams.in.begin() + static_cast<std::ptrdiff_t>(firstOfSource), streams.in.end(), known))
        streams.in.push_back({source, path, {}});
    }
  }
  return streams;
}

Program lower(OperationKind kind, const Streams& streams) {
  Program program;
  const auto add = [&](StepKind step, int stage, int needs, std::size_t index = 0) {
    program.push_back(
        {step, static_cast<std::uint8_t>(stage), static_cast<std::uint8_t>(needs), static_cast<std::int32_t>(index)});
  };
  add(StepKind::ready, 0, 0);
  add(StepKind::waitReady, 1, 1);
  // Slices first: a peer waits for them, while nobody waits for the single row of a put.
  if (kind == OperationKind::combine) {
    for (std::size_t i = 0; i < streams.in.size(); ++i) add(StepKind::sendBack, 2, 2, i);
  } else {
    for (std::size_t i = 0; i < streams.in.size(); ++i) add(StepKind::place, 2, 2, i);
    for (std::size_t i = 0; i < streams.out.size(); ++i) add(StepKind::extract, 2, 1, i);
  }
  add(StepKind::put, 2, 2);
  if (kind == OperationKind::combineBackward) {
    for (std::size_t i = 0; i < streams.in.size(); ++i) add(StepKind::sendBack, 3, 3, i);
    for (std::size_t i = 0; i < streams.out.size(); ++i) add(StepKind::receiveBack, 3, 3, i);
  }
  add(StepKind::done, 3, 3);
  add(StepKind::waitDone, 4, 4);
  add(StepKind::finish, 5, 5);
  return program;
}

}  // namespace fusco::engine
