// Counting the entries of a batch of ids, by whichever kernel.
#pragma once

#include "kernels/plan_tile.cuh"

namespace fusco::kernels {

// Counts the entries of a batch: addRow(key) for each; copies and entries of nodes where they are asked for. With one
// node they are kept in `only`.
template <typename AddRow>
__device__ void countBatch(const PlanLaunch& launch, const PlanRank& rank, const Lane& me, int expert, bool withNodes,
                           const PlanShared& s, uint2& only, AddRow&& addRow) {
  const bool needsHome = launch.byRank || (withNodes && launch.nodes > 1);
  const std::uint32_t home = expert >= 0 && needsHome ? homeOf(launch, rank, expert) : kNoHome;
  const Mark mark = markOf(launch, me, expert, home);
  if (mark.emits) addRow(mark.key);
  if (!withNodes) return;
  const std::uint32_t emitting = __ballot_sync(kAllLanes, mark.emits);
  if (launch.nodes == 1) {
    only.x += __popc(__ballot_sync(kAllLanes, mark.emits && beginsCopy(launch, me, emitting)));
    only.y += __popc(emitting);
    return;
  }
  const std::uint32_t node = home >> 16;
  const std::uint32_t same = __match_any_sync(kAllLanes, mark.emits ? node : kNoHome) & emitting;
  const std::uint32_t beginning = __ballot_sync(kAllLanes, mark.emits && beginsCopy(launch, me, same)) & same;
  if (!mark.emits || (same & me.below) != 0) return;
  atomicAdd(s.copiesOfNode + node, __popc(beginning));
  atomicAdd(s.entriesOfNode + node, __popc(same));
}

__device__ inline void addOnly(const PlanLaunch& launch, const PlanShared& s, const Lane& me, uint2 only) {
  if (launch.nodes != 1 || me.lane != 0 || only.y == 0) return;
  atomicAdd(s.copiesOfNode, only.x);
  atomicAdd(s.entriesOfNode, only.y);
}

}  // namespace fusco::kernels
