// What the planning kernels share: their argument, a block's shared memory, and who a thread is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/plan.h"
#include "kernels/ptx.cuh"

namespace fusco::kernels {

inline constexpr int kMaxChunks = 128;  // parts of a rank's routing map, a block each
inline constexpr int kMaxWarps = 16;
inline constexpr int kBatches = 4;     // batches of up to 32 ids that a warp has in hand at a time
inline constexpr int kMaxDirect = 32;  // ranks whose counts every block adds up by itself
inline constexpr std::uint32_t kAllLanes = 0xffffffffu;
inline constexpr std::uint32_t kNoHome = 0xffffffffu;
inline constexpr std::uint32_t kMaxRows = 0x7fffffffu;

struct PlanRank {
  const void* ids;
  const float* weights;
  const std::int64_t* tokensUsed;
  std::int64_t tokens;
  std::byte* arena;
  std::uint64_t copies, entries, weightsOfEntries, end;  // offsets in the arena
  std::uint32_t rowBase, localRows, localStart, flows;   // the same
  const plan::ArenaHeader* frame;
  const std::uint32_t* homes;
  const plan::Flow* flowShares;
  PlanCounts* counts;
  std::uint32_t* chunkRows;    // [chunks][keys], made by the counting kernel
  uint2* chunkOfNode;          // [nodes][kMaxChunks], copies and entries, likewise
  uint2* keptOfNode;           // the same for what is left within capacity
  std::int32_t* sums;          // [2][keys], before and total, made by the summing kernel
  const std::int32_t* before;  // null: every block adds up allCounts
  const std::int32_t* total;
  PlanStatus* status;
  std::int32_t* exchanged;
  int rank, node, localExperts, flowCount;
};

// The argument of all planning kernels.
struct PlanLaunch {
  PlanRank rank[kMaxPlanRanks];
  const PlanCounts* const* allCounts;
  std::int64_t maxTokens;
  std::uint32_t capacity, blockRows;  // rows of an output; rows that one key may have here
  int idBytes, topk, experts, ranks, nodes, keys, room, alignment, rankCount;
  int firstHere, ranksHere;   // small routing maps: the ranks that this launch plans; 0: all
  const std::uint32_t* turn;  // as in PlanArgs
  std::size_t turnBytes;
  int pairs;   // of keys, rounded up
  int warps;   // of a block
  int chunks;  // parts at most
  int tokensOfBatch;
  int batchesOfRank;  // at most
  int idsOfRank;      // at most 1 << this
  bool byRank, slotted, copyPerEntry, mayDrop;
  // Experts are dealt out in blocks: `larger` ranks, with those below largerEnd, hold each + 1, the others each.
  int largerEnd, larger, each;
  float perLarger, perSmaller;
};

// A block's dynamic shared memory; sharedBytes() says how much it takes.
struct PlanShared {
  std::uint32_t* next;   // [keys]: rows below this rank, then the row of the next entry
  std::uint32_t* total;  // [keys]: rows of all ranks
  std::uint32_t* lower;  // [keys]: rows of lower chunks; `next` itself unless rows may be dropped
  std::uint32_t* own;    // [keys]: this rank's rows; only where one block plans a rank
  std::uint32_t* rows;   // [warps + 1][pairs], 16 bits a key: a warp's rows of a key, then those of lower warps
  std::uint32_t* nodes;  // [warps + 1][nodes]: the same, copies and entries << 16
  std::uint32_t *copies, *entries;              // [nodes + 1]: next of each node; the last: number of all
  std::uint32_t *copiesOfNode, *entriesOfNode;  // [nodes]
  std::uint32_t* sums;                          // [2 * kMaxWarps]
  std::uint32_t* words;                         // see below
  const PlanCounts** counts;                    // [kMaxDirect]: allCounts, if every block adds them up
};
enum PlanWord {
  kRefused,
  kLimited,
  kReceiveRows,
  kWantedRows,
  kBad,      // as in PlanCounts
  kBadRank,  // 0, or ~ of the lowest rank with ids out of range
  kPlanWords
};

extern __shared__ __align__(16) std::uint32_t planMemory[];

constexpr std::size_t sharedBytes(int keys, int pairs, int warps, int nodes, bool mayDrop, bool alone) {
  return 4 * (static_cast<std::size_t>(keys) * (2 + mayDrop + alone) +
              static_cast<std::size_t>(warps + 1) * (pairs + nodes) + 4 * static_cast<std::size_t>(nodes) + 2 +
              2 * kMaxWarps + kPlanWords) +
         8 * (kMaxDirect + 1);
}

__device__ inline PlanShared shareOut(const PlanLaunch& launch, bool alone) {
  std::uint32_t* at = planMemory;
  const auto take = [&](int words) {
    std::uint32_t* const taken = at;
    at += words;
    return taken;
  };
  PlanShared s;
  s.next = take(launch.keys);
  s.total = take(launch.keys);
  s.lower = launch.mayDrop ? take(launch.keys) : s.next;
  s.own = alone ? take(launch.keys) : nullptr;
  s.rows = take((launch.warps + 1) * launch.pairs);
  s.nodes = take((launch.warps + 1) * launch.nodes);
  s.copies = take(launch.nodes + 1);
  s.entries = take(launch.nodes + 1);
  s.copiesOfNode = take(launch.nodes);
  s.entriesOfNode = take(launch.nodes);
  s.sums = take(2 * kMaxWarps);
  s.words = take(kPlanWords);
  s.counts = reinterpret_cast<const PlanCounts**>((reinterpret_cast<std::uintptr_t>(at) + 7) & ~std::uintptr_t{7});
  return s;
}

// A warp takes the ids of as many whole tokens at a time as it has lanes for, one a lane.
struct Lane {
  int lane, warp, token, slot;  // token: of the batch
  bool works;
  std::uint32_t below;    // lanes
  std::uint32_t ofToken;  // lanes of the same token
};
__device__ inline Lane whoAmI(const PlanLaunch& launch) {
  Lane me;
  me.lane = threadIdx.x & 31;
  me.warp = threadIdx.x >> 5;
  me.token = me.lane / launch.topk;
  me.slot = me.lane - me.token * launch.topk;
  me.works = me.token < launch.tokensOfBatch;
  me.below = (1u << me.lane) - 1;
  me.ofToken = (launch.topk == 32 ? kAllLanes : (1u << launch.topk) - 1) << (me.token * launch.topk);
  return me;
}

__device__ inline std::uint32_t rankOfExpert(const PlanLaunch& launch, int expert) {
  // Exact: half an expert is far more than the error of a product of numbers below 2^20.
  if (expert < launch.largerEnd) return static_cast<std::uint32_t>((expert + 0.5f) * launch.perLarger);
  return launch.larger + static_cast<std::uint32_t>((expert - launch.largerEnd + 0.5f) * launch.perSmaller);
}
__device__ inline std::uint32_t homeOf(const PlanLaunch& launch, const PlanRank& rank, int expert) {
  return launch.nodes == 1 ? rankOfExpert(launch, expert) : __ldg(rank.homes + expert);
}

// Tokens of this step, and in status what is wrong with their number.
__device__ inline std::uint32_t tokensOf(const PlanRank& rank, bool& tooMany) {
  const std::int64_t used = rank.tokensUsed != nullptr ? *rank.tokensUsed : rank.tokens;
  tooMany = used < 0 || used > rank.tokens;
  return tooMany ? 0 : static_cast<std::uint32_t>(used);
}
// Tokens of a chunk: all chunks have as many, but the last one in use.
__device__ inline std::uint32_t tokensOfChunk(const PlanLaunch& launch, std::uint32_t tokens) {
  const std::uint32_t step = launch.warps * launch.tokensOfBatch;
  const std::uint32_t each = (tokens + launch.chunks - 1) / launch.chunks;
  return each == 0 ? step : (each + step - 1) / step * step;
}

// What other kernels and other GPUs write while this kernel is there: not from a cache that may be old.
template <typename T>
__device__ inline T loadFresh(const T* from) {
  return *static_cast<const volatile T*>(from);
}
__device__ inline uint2 loadFresh(const uint2* from) { return __ldcg(from); }

__device__ inline int2 loadFresh(const int2* from) { return __ldcg(from); }

// A rank's counts: for each key one number of this launch and one of its neighbours.
__device__ inline std::int32_t* countOf(PlanCounts* counts, std::uint64_t number, int key) {
  return reinterpret_cast<std::int32_t*>(counts + 1) + 2 * key + (number & 1);
}
__device__ inline const int2* bothCounts(const PlanCounts* counts) { return reinterpret_cast<const int2*>(counts + 1); }

}  // namespace fusco::kernels
