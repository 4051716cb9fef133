// From counts to first rows: every block works out for itself where the entries of its chunk begin.
#pragma once

#include "kernels/plan_tile.cuh"

namespace fusco::kernels {

// Sums of columns of an int32 matrix in other kernels' memory, rows in turn; a column is the work of several threads
// where there are more threads than columns.
struct Columns {
  int key, group, groups;
};
__device__ inline Columns myColumns(const PlanLaunch& launch) {
  const int threads = blockDim.x, thread = threadIdx.x;
  if (launch.keys >= threads) return {thread, 0, 1};
  const int group = thread / launch.keys;
  return {thread - group * launch.keys, group, threads / launch.keys};
}
template <typename T, typename RowAt, typename Add>
__device__ void sumRows(const Columns& mine, int key, int rows, RowAt&& rowAt, Add&& add) {
  constexpr int kAtATime = 8;
  for (int first = mine.group; first < rows; first += kAtATime * mine.groups) {
    T of[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const int row = first + i * mine.groups;
      of[i] = row < rows ? loadFresh(rowAt(row) + key) : T{};
    }
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) add(first + i * mine.groups, of[i]);
  }
}

// Adds to s.next the rows of lower ranks, to s.total those of all, to s.lower those of lower chunks; all begin as 0.
__device__ inline void gather(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Columns& mine,
                              bool isOdd, int chunksBelow) {
  if (mine.group >= mine.groups) return;
  const auto addTo = [&](std::uint32_t* array, int key, std::uint32_t rows) {
    if (rows != 0) atomicAdd(array + key, rows);
  };
  for (int key = mine.key; key < launch.keys; key += blockDim.x) {
    if (rank.before != nullptr) {
      if (mine.group == 0) {
        addTo(s.next, key, loadFresh(rank.before + key));
        addTo(s.total, key, loadFresh(rank.total + key));
      }
    } else if (!launch.slotted) {
      std::uint32_t before = 0, total = 0;
      sumRows<int2>(
          mine, key, launch.ranks, [&](int row) { return bothCounts(s.counts[row]); },
          [&](int row, int2 both) {
            const std::uint32_t rows = isOdd ? both.y : both.x;
            total += rows;
            before += row < rank.rank ? rows : 0;
          });
      addTo(s.next, key, before);
      addTo(s.total, key, total);
    }
    std::uint32_t lower = 0;
    sumRows<std::int32_t>(
        mine, key, chunksBelow,
        [&](int row) { return reinterpret_cast<const std::int32_t*>(rank.chunkRows) + row * launch.keys; },
        [&](int, std::int32_t rows) { lower += rows; });
    addTo(s.lower, key, lower);
  }
}

// The same sums, made once for all blocks of a rank: a block has so many keys.
inline constexpr int kKeysOfSum = 32;
__device__ inline void sumCounts(const PlanLaunch& launch, const PlanRank& rank, bool isOdd) {
  std::uint32_t* const before = planMemory;
  std::uint32_t* const total = planMemory + kKeysOfSum;
  const int column = threadIdx.x % kKeysOfSum, key = blockIdx.x * kKeysOfSum + column;
  const Columns mine{column, static_cast<int>(threadIdx.x / kKeysOfSum), static_cast<int>(blockDim.x / kKeysOfSum)};
  clear(planMemory, 2 * kKeysOfSum);
  __syncthreads();
  if (key < launch.keys) {
    std::uint32_t myBefore = 0, myTotal = 0;
    sumRows<int2>(
        mine, key, launch.ranks, [&](int row) { return bothCounts(launch.allCounts[row]); },
        [&](int row, int2 both) {
          const std::uint32_t rows = isOdd ? both.y : both.x;
          myTotal += rows;
          myBefore += row < rank.rank ? rows : 0;
        });
    atomicAdd(before + column, myBefore);
    atomicAdd(total + column, myTotal);
  }
  __syncthreads();
  if (mine.group != 0 || key >= launch.keys) return;
  rank.sums[key] = before[column];
  rank.sums[launch.keys + key] = total[column];
}

__device__ inline std::uint32_t addUpToLimit(std::uint32_t a, std::uint32_t b) {
  const std::uint64_t sum = std::uint64_t{a} + b;
  return sum > kMaxRows ? kMaxRows + 1 : static_cast<std::uint32_t>(sum);
}

__device__ inline std::uint32_t alignUp(const PlanLaunch& launch, std::uint32_t rows) {
  if (launch.alignment == 1) return rows;
  const std::uint32_t alignment = launch.alignment;
  const std::uint64_t up = std::uint64_t{(rows + alignment - 1) / alignment} * alignment;
  return up > kMaxRows ? kMaxRows + 1 : static_cast<std::uint32_t>(up);
}

// Rows of a key that this rank's entries may take: the rest is dropped.
__device__ inline void lookForLimit(const PlanLaunch& launch, const PlanShared& s, std::uint32_t rowBase,
                                    std::uint32_t own) {
  const std::uint32_t room = launch.capacity > rowBase ? launch.capacity - rowBase : 0;
  if (own > (launch.blockRows < room ? launch.blockRows : room)) s.words[kLimited] = 1;
}

// From rows below this rank to the first row of each key, which goes to visit(key, first row, first row of its expert,
// rows of all ranks, rows of this rank); then s.next holds it, plus s.lower. ownRows(key) is asked for the last of
// them. Ends with a barrier.
template <typename OwnRows, typename Visit>
__device__ void findRowBases(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Lane& me,
                             OwnRows&& ownRows, Visit&& visit) {
  const bool hasLower = s.lower != s.next;
  const auto settle = [&](int key, std::uint32_t rowBase, std::uint32_t start, std::uint32_t total, std::uint32_t own) {
    s.next[key] = rowBase + (hasLower ? s.lower[key] : 0);
    if (launch.mayDrop) lookForLimit(launch, s, rowBase, own);
    visit(key, rowBase, start, total, own);
  };
  if (launch.byRank || launch.slotted) {
    const auto most = static_cast<std::uint32_t>(launch.maxTokens);
    for (int key = threadIdx.x; key < launch.keys; key += blockDim.x) {
      const std::uint32_t own = ownRows(key);
      if (launch.slotted) {
        const std::uint32_t base = Tile::slottedBase(launch, rank, key);
        settle(key, base, base - rank.rank * most, launch.ranks * most, own);
      } else {
        if (s.total[key] > kMaxRows) s.words[kRefused] = 1;
        settle(key, s.next[key], 0, s.total[key], own);
      }
    }
    __syncthreads();
    return;
  }
  // Experts of a rank follow one another: a scan that begins anew at each rank's first expert.
  std::uint32_t carry = 0;
  for (int first = 0; first < launch.keys; first += blockDim.x) {
    const int key = first + threadIdx.x;
    const bool exists = key < launch.keys;
    const std::uint32_t own = exists ? ownRows(key) : 0;
    const std::uint32_t total = exists ? s.total[key] : 0;
    const std::uint32_t rows = total > kMaxRows ? kMaxRows + 1 : alignUp(launch, total);
    const bool head = exists && Tile::localExpert(launch, key) == 0;
    const std::uint32_t heads = __ballot_sync(kAllLanes, head);
    const std::uint32_t headsUpToMe = heads & (me.below | 1u << me.lane);
    const int from = headsUpToMe == 0 ? 0 : 31 - __clz(static_cast<int>(headsUpToMe));
    std::uint32_t sum = rows;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::uint32_t other = __shfl_up_sync(kAllLanes, sum, distance);
      if (me.lane - distance >= from) sum = addUpToLimit(sum, other);
    }
    if (me.lane == 31) {
      s.sums[me.warp] = sum;
      s.sums[kMaxWarps + me.warp] = heads;
    }
    __syncthreads();
    // The same over the warps, a lane for each; below: what those before this one leave over.
    const bool isThere = me.lane < launch.warps;
    std::uint32_t upTo = isThere ? s.sums[me.lane] : 0;
    bool begins = isThere && s.sums[kMaxWarps + me.lane] != 0;
    if (me.lane == 0 && !begins) upTo = addUpToLimit(carry, upTo);
#pragma unroll
    for (int distance = 1; distance < kMaxWarps; distance *= 2) {
      const std::uint32_t other = __shfl_up_sync(kAllLanes, upTo, distance);
      const bool otherBegins = __shfl_up_sync(kAllLanes, begins, distance) != 0;
      if (me.lane >= distance && !begins) {
        upTo = addUpToLimit(upTo, other);
        begins = otherBegins;
      }
    }
    const std::uint32_t before = __shfl_sync(kAllLanes, upTo, me.warp > 0 ? me.warp - 1 : 0);
    const std::uint32_t below = me.warp > 0 ? before : carry;
    carry = __shfl_sync(kAllLanes, upTo, launch.warps - 1);
    if (headsUpToMe == 0) sum = addUpToLimit(sum, below);
    std::uint32_t start = __shfl_up_sync(kAllLanes, sum, 1);
    if (me.lane == 0) start = below;
    if (head) start = 0;
    if (exists) {
      if (sum > kMaxRows) s.words[kRefused] = 1;
      settle(key, start + s.next[key], start, total, own);
    }
    __syncthreads();
  }
}

// Sums chunks' copies and entries by node: all of them, and into the cursors those of lower chunks.
__device__ inline void gatherNodes(const PlanLaunch& launch, const PlanShared& s, const Lane& me, const uint2* ofChunk,
                                   int chunks, int chunksBelow) {
  for (int node = me.warp; node < launch.nodes; node += launch.warps) {
    uint2 all{0, 0}, below{0, 0};
#pragma unroll
    for (int i = 0; i < kMaxChunks / 32; ++i) {
      const int chunk = me.lane + 32 * i;
      if (chunk >= chunks) continue;
      const uint2 of = loadFresh(ofChunk + node * kMaxChunks + chunk);
      all.x += of.x;
      all.y += of.y;
      if (chunk >= chunksBelow) continue;
      below.x += of.x;
      below.y += of.y;
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      all.x += __shfl_xor_sync(kAllLanes, all.x, distance);
      all.y += __shfl_xor_sync(kAllLanes, all.y, distance);
      below.x += __shfl_xor_sync(kAllLanes, below.x, distance);
      below.y += __shfl_xor_sync(kAllLanes, below.y, distance);
    }
    if (me.lane != 0) continue;
    s.copiesOfNode[node] = all.x;
    s.entriesOfNode[node] = all.y;
    s.copies[node] = below.x;
    s.entries[node] = below.y;
  }
}

// Adds those of lower nodes to the cursors. The first warp's work.
__device__ inline void placeNodes(const PlanLaunch& launch, const PlanShared& s, const Lane& me) {
  if (me.warp != 0) return;
  if (launch.nodes == 1) {
    if (me.lane == 0) s.copies[1] = s.copiesOfNode[0];
    if (me.lane == 0) s.entries[1] = s.entriesOfNode[0];
    return;
  }
  std::uint32_t copies = 0, entries = 0;
  for (int first = 0; first < launch.nodes; first += 32) {
    const int node = first + me.lane;
    const bool exists = node < launch.nodes;
    const std::uint32_t myCopies = exists ? s.copiesOfNode[node] : 0, myEntries = exists ? s.entriesOfNode[node] : 0;
    std::uint32_t copySum = myCopies, entrySum = myEntries;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::uint32_t moreCopies = __shfl_up_sync(kAllLanes, copySum, distance);
      const std::uint32_t moreEntries = __shfl_up_sync(kAllLanes, entrySum, distance);
      if (me.lane < distance) continue;
      copySum += moreCopies;
      entrySum += moreEntries;
    }
    if (exists) {
      s.copies[node] += copies + copySum - myCopies;
      s.entries[node] += entries + entrySum - myEntries;
    }
    copies += __shfl_sync(kAllLanes, copySum, 31);
    entries += __shfl_sync(kAllLanes, entrySum, 31);
  }
  if (me.lane != 0) return;
  s.copies[launch.nodes] = copies;
  s.entries[launch.nodes] = entries;
}

}  // namespace fusco::kernels
