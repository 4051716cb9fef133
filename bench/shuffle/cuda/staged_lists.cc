#include "shuffle/cuda/staged_lists.h"

#include <numeric>

namespace fusco::bench::gpu {

std::int64_t StagedLists::rowsPacked(int source) const {
  const auto& counts = count[static_cast<std::size_t>(source)];
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

StagedLists stagedLists(const ShuffleMap& map) {
  const auto ranks = static_cast<std::size_t>(map.ranks);
  const auto topk = static_cast<std::size_t>(map.topk);
  StagedLists lists;
  lists.count.assign(ranks, std::vector<std::int64_t>(ranks, 0));
  lists.sendAt = lists.arriveAt = lists.count;
  for (const auto& row : map.row) lists.packed.emplace_back(row.size(), -1);
  for (std::size_t d = 0; d < ranks; ++d)
    for (const Slot& slot : map.received[d]) ++lists.count[static_cast<std::size_t>(slot.source)][d];
  for (std::size_t s = 0; s < ranks; ++s) {
    for (std::size_t d = 1; d < ranks; ++d) {
      lists.sendAt[s][d] = lists.sendAt[s][d - 1] + lists.count[s][d - 1];
      lists.arriveAt[s][d] = lists.arriveAt[s][d - 1] + lists.count[d - 1][s];
    }
  }
  for (std::size_t d = 0; d < ranks; ++d) {
    std::vector<std::int64_t> next(ranks, 0);
    auto& arrived = lists.arrived.emplace_back();
    for (const Slot& slot : map.received[d]) {
      const auto s = static_cast<std::size_t>(slot.source);
      const std::int64_t n = next[s]++;
      arrived.push_back(static_cast<std::int32_t>(lists.arriveAt[d][s] + n));
      lists.packed[s][static_cast<std::size_t>(slot.token) * topk + static_cast<std::size_t>(slot.slot)] =
          static_cast<std::int32_t>(lists.sendAt[s][d] + n);
    }
  }
  return lists;
}

std::vector<std::vector<std::int64_t>> distinctCopies(const ShuffleMap& map) {
  const auto ranks = static_cast<std::size_t>(map.ranks);
  std::vector<std::vector<std::int64_t>> copies(ranks, std::vector<std::int64_t>(ranks, 0));
  for (std::size_t s = 0; s < ranks; ++s) {
    const Routing& routing = map.routing[s];
    for (std::int64_t t = 0; t < routing.tokens; ++t) {
      std::vector<bool> reached(ranks, false);
      for (int k = 0; k < map.topk; ++k) {
        const std::int32_t id = routing.ids[static_cast<std::size_t>(t * map.topk + k)];
        if (id >= 0) reached[static_cast<std::size_t>(rankOfExpert(id, map.ranks, map.experts))] = true;
      }
      for (std::size_t d = 0; d < ranks; ++d) copies[s][d] += reached[d];
    }
  }
  return copies;
}

}  // namespace fusco::bench::gpu
