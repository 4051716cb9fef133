// The first step of planning: pure counts, and the only check of the expert ids.
#include <algorithm>
#include <string>

#include "base/status.h"
#include "plan/planner.h"

namespace fusco::plan {

namespace {

[[noreturn, gnu::cold]] void refuseId(int rank, std::int64_t token, int slot, std::int64_t id, int experts) {
  fail(Code::invalidArgument, "routing map of rank " + std::to_string(rank) + ": token " + std::to_string(token) +
                                  ", slot " + std::to_string(slot) + " names expert " + std::to_string(id) +
                                  "; ids are 0 to " + std::to_string(experts - 1) + ", or -1 for none");
}

// How the copies of nodes are counted: see() for each entry, with its key, then endToken(), at last end(). Stamps do
// for any number of nodes.
class CopiesByStamp {
 public:
  CopiesByStamp(const std::uint32_t* nodeOf, std::uint32_t* stamps, std::int32_t* copies)
      : nodeOf_(nodeOf), stamps_(stamps), copies_(copies) {}
  void see(std::int64_t key) {
    const std::uint32_t node = nodeOf_[key];
    copies_[node] += stamps_[node] < stamp_;
    stamps_[node] = stamp_;
  }
  void endToken() { ++stamp_; }
  void end() {}

 private:
  const std::uint32_t* nodeOf_;
  std::uint32_t* stamps_;
  std::int32_t* copies_;
  std::uint32_t stamp_ = 1;
};

// Of up to eight nodes, as many bytes of one register: nothing is stored until a byte could be full.
class CopiesByByte {
 public:
  static constexpr int kNodes = 8;
  CopiesByByte(const std::uint64_t* byteOf, std::int32_t* copies) : byteOf_(byteOf), copies_(copies) {}
  void see(std::int64_t key) { token_ |= byteOf_[key]; }
  void endToken() {
    sums_ += token_;
    token_ = 0;
    if (++tokens_ == 255) end();
  }
  void end() {
    for (int node = 0; node < kNodes; ++node) copies_[node] += static_cast<std::int32_t>(sums_ >> (8 * node) & 255);
    sums_ = 0;
    tokens_ = 0;
  }

 private:
  const std::uint64_t* byteOf_;
  std::int32_t* copies_;
  std::uint64_t token_ = 0, sums_ = 0;
  int tokens_ = 0;
};

}  // namespace

// Counts the rows of each key, in rows_, and what `copies` counts.
template <typename Id, bool kByRank, int kTopk, typename Copies>
void Planner::count(const RoutingMap& map, Copies copies) {
  const Id* id = static_cast<const Id*>(map.ids);
  const int topk = kTopk != 0 ? kTopk : map.topk;
  const std::uint64_t experts = map.experts;
  const std::int32_t* rankOf = rankOfExpert_.data() + 1;
  std::uint32_t* rankStamp = rankStamp_.data() + 1;
  std::int32_t* rows = rows_.data() + 1;
  for (std::int64_t token = 0; token < map.tokens; ++token, id += topk) {
    for (int slot = 0; slot < topk; ++slot) {
      const std::int64_t expert = id[slot];
      if (static_cast<std::uint64_t>(expert) + 1 > experts) [[unlikely]]
        refuseId(rank_, token, slot, expert, map.experts);
      if constexpr (kByRank) {
        const std::int32_t rank = rankOf[expert];
        const auto stamp = static_cast<std::uint32_t>(token + 1);
        rows[rank] += rankStamp[rank] != stamp;
        rankStamp[rank] = stamp;
        copies.see(rank);
      } else {
        ++rows[expert];
        copies.see(expert);
      }
    }
    copies.endToken();
  }
  copies.end();
}

void Planner::analyse(const RoutingMap& map, const Options& options, Analysis& result) {
  checkShape(map, options);
  useKeys(map, options);
  const bool byRank = options.layout == Layout::rankOrder;
  const int nodes = topology_->nodes();
  const int keys = keyCount(map, *topology_, options);
  rows_.assign(1 + keys, 0);
  if (byRank) rankStamp_.assign(1 + topology_->ranks(), 0);
  nodeCopies_.assign(std::max(CopiesByByte::kNodes, nodes + 1), 0);

  const auto countAs = [&]<typename Id, typename Copies>(Id, Copies copies) {
    if (map.topk == kUsualTopk) {
      byRank ? count<Id, true, kUsualTopk>(map, copies) : count<Id, false, kUsualTopk>(map, copies);
    } else {
      byRank ? count<Id, true, 0>(map, copies) : count<Id, false, 0>(map, copies);
    }
  };
  const auto countBy = [&](auto copies) {
    map.idBytes == 4 ? countAs(std::int32_t{}, copies) : countAs(std::int64_t{}, copies);
  };
  if (nodes <= CopiesByByte::kNodes) {
    countBy(CopiesByByte(nodeBytes_.data() + 1, nodeCopies_.data()));
  } else {
    nodeStamp_.assign(nodes + 1, 0);
    countBy(CopiesByStamp(nodeOfKey_.data() + 1, nodeStamp_.data(), nodeCopies_.data()));
  }

  result.rowsOfKey.assign(rows_.begin() + 1, rows_.end());
  result.entriesOfNode.assign(nodes, 0);
  for (int key = 0; key < keys; ++key) result.entriesOfNode[nodeOfKey_[1 + key]] += result.rowsOfKey[key];
  if (options.dedup == Dedup::none) {
    result.copiesOfNode = result.entriesOfNode;
  } else {
    result.copiesOfNode.assign(nodeCopies_.begin(), nodeCopies_.begin() + nodes);
  }
}

void analyse(const RoutingMap& map, const Topology& topology, int rank, const Options& options, Analysis& reuse) {
  Planner(topology, rank).analyse(map, options, reuse);
}

Analysis analyse(const RoutingMap& map, const Topology& topology, int rank, const Options& options) {
  Analysis result;
  analyse(map, topology, rank, options, result);
  return result;
}

}  // namespace fusco::plan
