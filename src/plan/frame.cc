#include "plan/frame.h"

namespace fusco::plan {

Frame makeFrame(const RoutingMap& map, const Topology& topology, int rank, const Options& options) {
  RoutingMap shape = map;
  static constexpr std::int64_t kSomething = 0;
  if (shape.ids == nullptr) shape.ids = &kSomething;  // nobody reads it
  Frame frame;
  ArenaHeader& header = frame.header;
  header.bytes = arenaBytes(shape, topology, rank, options);
  header.magic = kArenaMagic;
  header.version = kArenaVersion;
  header.tokens = map.tokens;
  header.topk = map.topk;
  header.experts = map.experts;
  header.ranks = topology.ranks();
  header.nodes = topology.nodes();
  header.rank = rank;
  header.node = topology.nodeOf(rank);
  header.localExperts = topology.expertsOf(rank, map.experts);
  header.flows = topology.flowCount(rank);
  header.layout = options.layout;
  header.dedup = options.dedup;
  header.alignment = options.alignment;
  header.maxTokens = options.layout == Layout::slotted ? options.maxTokens : 0;
  header.capacityRows = options.capacityRows;

  frame.homes.reserve(map.experts);
  for (int expert = 0; expert < map.experts; ++expert) {
    const int home = topology.rankOfExpert(expert, map.experts);
    frame.homes.push_back(static_cast<std::uint32_t>(topology.localIndex(home)) |
                          static_cast<std::uint32_t>(topology.nodeOf(home)) << 16);
  }

  frame.flows.reserve(header.flows);
  for (int node = 0; node < topology.nodes(); ++node) {
    if (node == header.node) {
      frame.flows.push_back({node, rank, 0, 0, 65536});
      continue;
    }
    std::uint32_t cumulated = 0;
    for (const FlowShare& share : topology.flowsTo(rank, node)) {
      frame.flows.push_back({node, share.forwarder, share.lane, cumulated, cumulated + share.share});
      cumulated += share.share;
    }
  }
  return frame;
}

}  // namespace fusco::plan
