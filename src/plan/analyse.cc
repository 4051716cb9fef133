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

}  // namespace

// Counts copies and entries of each node in cursors_, and rows of each key in the result.
template <typename Id, bool kByRank>
void Planner::count(const RoutingMap& map, bool copyPerEntry, Analysis& result) {
  const Id* id = static_cast<const Id*>(map.ids);
  const std::uint64_t experts = map.experts;
  const std::uint32_t perEntry = copyPerEntry ? 1 : 0;
  const Home* homes = homes_.data();
  Cursor* cursors = cursors_.data();
  std::uint32_t* rankStamp = rankStamp_.data();
  std::int32_t* rows = result.rowsOfKey.data();
  for (std::int64_t token = 0; token < map.tokens; ++token, id += map.topk) {
    const auto stamp = static_cast<std::uint32_t>(token + 1);
    for (int slot = 0; slot < map.topk; ++slot) {
      const std::int64_t expert = id[slot];
      if (static_cast<std::uint64_t>(expert) >= experts) [[unlikely]] {
        if (expert != -1) refuseId(rank_, token, slot, expert, map.experts);
        continue;
      }
      const Home home = homes[expert];
      Cursor& cursor = cursors[home.node];
      if constexpr (kByRank) {
        const std::uint32_t isFirst = rankStamp[home.rank] != stamp;
        rankStamp[home.rank] = stamp;
        rows[home.rank] += isFirst;
        cursor.entry += isFirst;
        cursor.copy += perEntry ? isFirst : cursor.stamp != stamp;
      } else {
        ++rows[expert];
        cursor.copy += perEntry | (cursor.stamp != stamp);
      }
      cursor.stamp = stamp;
    }
  }
}

void Planner::analyse(const RoutingMap& map, const Options& options, Analysis& result) {
  checkShape(map, options);
  useExperts(map.experts);
  const bool byRank = options.layout == Layout::rankOrder;
  const bool copyPerEntry = options.dedup == Dedup::none;
  const int nodes = topology_->nodes();
  result.rowsOfKey.assign(byRank ? topology_->ranks() : map.experts, 0);
  result.copiesOfNode.resize(nodes);
  result.entriesOfNode.resize(nodes);
  std::fill(cursors_.begin(), cursors_.end(), Cursor{});
  if (byRank) rankStamp_.assign(topology_->ranks(), 0);

  if (map.idBytes == 4) {
    byRank ? count<std::int32_t, true>(map, copyPerEntry, result)
           : count<std::int32_t, false>(map, copyPerEntry, result);
  } else {
    byRank ? count<std::int64_t, true>(map, copyPerEntry, result)
           : count<std::int64_t, false>(map, copyPerEntry, result);
  }

  if (!byRank) {
    for (int expert = 0; expert < map.experts; ++expert)
      cursors_[homes_[expert].node].entry += result.rowsOfKey[expert];
  }
  for (int node = 0; node < nodes; ++node) {
    result.copiesOfNode[node] = static_cast<std::int32_t>(cursors_[node].copy);
    result.entriesOfNode[node] = static_cast<std::int32_t>(cursors_[node].entry);
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
