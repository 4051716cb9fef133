// Who is where: ranks, the nodes (domains of mapped reach) that hold them, the experts that they hold, lanes, and which
// forwarder takes which source's tokens for a node. A value: planning is a pure function of it and the routing map.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fusco::plan {

// A part of the copies that one source rank has for one node: `share` of 65536.
struct FlowShare {
  std::int32_t forwarder;  // global rank in the destination node
  std::int32_t lane;       // lane of the source's node, 0..lanes-1
  std::uint32_t share;
};

class Topology {
 public:
  // nodeOfRank: any non-negative labels; they are renumbered by first appearance. lanesPerNode >= 1.
  // The default flows: local index i sends to the forwarder with local index i modulo the size of the destination node,
  // by lane (i modulo lanes), share 65536.
  explicit Topology(std::vector<int> nodeOfRank, int lanesPerNode = 1);

  int ranks() const { return static_cast<int>(nodeOf_.size()); }
  int nodes() const { return static_cast<int>(ranksOf_.size()); }
  int lanesPerNode() const { return lanes_; }
  int nodeOf(int rank) const { return nodeOf_[rank]; }
  int localIndex(int rank) const { return localIndex_[rank]; }
  // Global ranks of a node in rising order.
  std::span<const int> ranksOf(int node) const { return ranksOf_[node]; }

  // Experts are dealt out in contiguous blocks in rank order; the first (experts % ranks) ranks hold one more.
  int firstExpert(int rank, int experts) const;
  int expertsOf(int rank, int experts) const;
  int rankOfExpert(int expert, int experts) const;

  // The flows from a source rank to another node (never empty). For the own node: none. Valid until the next setFlows.
  std::span<const FlowShare> flowsTo(int source, int node) const;
  // Flows of a source rank in plan order: nodes rising, own node included once (as forwarder itself), then by share.
  int flowCount(int source) const;
  // The sources of other nodes whose flows lead to this forwarder, rising: {source, index of the flow among the
  // source's flows in plan order}.
  struct Inflow {
    std::int32_t source;
    std::int32_t flow;
  };
  std::vector<Inflow> flowsInto(int forwarder) const;

  // Two ranks of different nodes are linked by paths, one for each lane of either one as the source: a path leaves by
  // that lane and arrives at the lane of the forwarder (its local index modulo lanes). With one lane all of them are
  // one.
  int paths() const { return lanes_ == 1 ? 1 : 2 * lanes_; }
  int pathOf(int source, int forwarder, int lane) const {
    return lanes_ == 1 ? 0 : lane + (source > forwarder ? lanes_ : 0);
  }
  // For what is neither dispatched nor combined: the same seen from both ends.
  int homePath(int rank, int peer) const {
    const int source = rank < peer ? rank : peer;
    return pathOf(source, rank < peer ? peer : rank, localIndex(source) % lanes_);
  }
  // The lane of `rank`'s node that the path to `peer` takes.
  int laneOf(int rank, int peer, int path) const {
    const bool isSource = (path >= lanes_) == (rank > peer);
    return lanes_ == 1 ? 0 : isSource ? path % lanes_ : localIndex(rank) % lanes_;
  }

  // Replaces the flows of `source` to `node`; the balancer's result is entered here. Shares must add up to 65536.
  void setFlows(int source, int node, const std::vector<FlowShare>& flows);
  // Back to the default flows for all.
  void resetFlows();
  // Whether setFlows has replaced the default.
  bool hasOwnFlows(int source, int node) const;
  // Counts the balancer's updates; ranks that disagree on it are told.
  std::uint64_t version() const { return version_; }
  void setVersion(std::uint64_t version) { version_ = version; }

 private:
  // Where in pool_ the flows of a (source, node) pair lie; count 0: the default.
  struct Range {
    std::uint32_t begin = 0;
    std::uint16_t count = 0;
    std::uint16_t room = 0;
  };

  std::vector<int> nodeOf_;
  std::vector<int> localIndex_;
  std::vector<std::vector<int>> ranksOf_;
  int lanes_ = 1;
  std::vector<FlowShare> defaults_;  // [local index * nodes + node]
  std::vector<FlowShare> pool_;
  std::vector<Range> pairs_;  // [source * nodes + node], empty until the first setFlows
  std::uint64_t version_ = 0;
};

}  // namespace fusco::plan
