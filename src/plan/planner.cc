#include "plan/planner.h"

#include <algorithm>
#include <limits>
#include <string>

#include "base/status.h"

namespace fusco::plan {

namespace {

constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();

}  // namespace

Planner::Planner(const Topology& topology, int rank) : topology_(&topology), rank_(rank) {
  if (rank < 0 || rank >= topology.ranks()) {
    fail(Code::invalidArgument, "plan: rank " + std::to_string(rank) + " is not one of the topology's " +
                                    std::to_string(topology.ranks()) + " ranks");
  }
  mostRanksOfNode_ = 0;
  for (int node = 0; node < topology.nodes(); ++node) {
    mostRanksOfNode_ = std::max(mostRanksOfNode_, static_cast<int>(topology.ranksOf(node).size()));
  }
}

void Planner::checkShape(const RoutingMap& map, const Options& options) const {
  const auto refuse = [&](const std::string& what) {
    fail(Code::invalidArgument, "plan of rank " + std::to_string(rank_) + ": " + what);
  };
  if (map.idBytes != 4 && map.idBytes != 8)
    refuse("expert ids of " + std::to_string(map.idBytes) + " bytes; give 4 or 8");
  if (map.topk < 1 || map.topk > kSlotMask) refuse("top-k is " + std::to_string(map.topk) + "; it must be 1 to 32767");
  if (map.experts < 1) refuse(std::to_string(map.experts) + " experts; give at least 1");
  if (map.tokens < 0) refuse(std::to_string(map.tokens) + " tokens");
  if (map.tokens > 0 && map.ids == nullptr)
    refuse("the routing map is NULL but has " + std::to_string(map.tokens) + " tokens");
  if (map.tokens > kMaxRows / map.topk) {
    refuse(std::to_string(map.tokens) + " tokens x top-" + std::to_string(map.topk) +
           " are more than 2^31 - 1 rows; split the batch");
  }
  if (options.layout != Layout::expertOrder && options.layout != Layout::rankOrder &&
      options.layout != Layout::slotted) {
    refuse("unknown layout " + std::to_string(static_cast<unsigned>(options.layout)));
  }
  if (options.dedup != Dedup::none && options.dedup != Dedup::node && options.dedup != Dedup::full) {
    refuse("unknown dedup " + std::to_string(static_cast<unsigned>(options.dedup)));
  }
  if (options.alignment < 1) refuse("alignment " + std::to_string(options.alignment) + "; it must be at least 1");
  if (options.capacityRows < 0 || options.capacityRows > kMaxRows) {
    refuse("capacity of " + std::to_string(options.capacityRows) + " rows; give 0 (exact) to 2^31 - 1");
  }
  if (options.layout == Layout::slotted) {
    const std::string most = std::to_string(options.maxTokens);
    if (options.maxTokens < 0) refuse("at most " + most + " tokens a rank");
    if (map.tokens > options.maxTokens) {
      refuse(std::to_string(map.tokens) + " tokens, but the slotted layout was made for at most " + most + " a rank");
    }
    const std::int64_t localMost = topology_->expertsOf(0, map.experts);  // rank 0 holds no fewer than any other
    const std::int64_t blocks = localMost * topology_->ranks();
    if (options.maxTokens > kMaxRows / blocks) {
      refuse("slotted output of " + std::to_string(blocks) + " x " + most +
             " rows is more than 2^31 - 1; lower the most tokens of a rank");
    }
    if (options.maxTokens * topology_->ranks() % options.alignment != 0) {
      refuse("slotted: ranks x most tokens (" + std::to_string(options.maxTokens * topology_->ranks()) +
             ") is not a multiple of the alignment " + std::to_string(options.alignment));
    }
  }
}

void Planner::useKeys(const RoutingMap& map, const Options& options) {
  const bool byRank = options.layout == Layout::rankOrder;
  const int keys = keyCount(map, *topology_, options);
  if (map.experts == experts_ && byRank == byRank_) return;
  experts_ = map.experts;
  byRank_ = byRank;
  rankOfExpert_.assign(1 + map.experts, -1);
  nodeOfKey_.assign(1 + keys, nowhere());
  localOfKey_.assign(keys, 0);
  nodeBytes_.assign(1 + keys, 0);
  firstExpert_.assign(1, 0);
  for (int rank = 0; rank < topology_->ranks(); ++rank) {
    const int first = firstExpert_.back(), end = first + topology_->expertsOf(rank, map.experts);
    firstExpert_.push_back(end);
    std::fill(rankOfExpert_.begin() + 1 + first, rankOfExpert_.begin() + 1 + end, rank);
    const int node = topology_->nodeOf(rank);
    for (int key = byRank ? rank : first; key < (byRank ? rank + 1 : end); ++key) {
      nodeOfKey_[1 + key] = static_cast<std::uint32_t>(node);
      localOfKey_[key] = static_cast<std::uint16_t>(topology_->localIndex(rank));
      nodeBytes_[1 + key] = node < 8 ? std::uint64_t{1} << (8 * node) : 0;
    }
  }
}

int keyCount(const RoutingMap& map, const Topology& topology, const Options& options) {
  return options.layout == Layout::rankOrder ? topology.ranks() : map.experts;
}

}  // namespace fusco::plan
