// A block's walk over a routing map: tiles of up to kBatches batches for each warp, warps in the order of tokens. Keeps
// in registers what is known of each id between the steps.
#pragma once

#include "kernels/plan_device.cuh"

namespace fusco::kernels {

__device__ inline std::int64_t idAt(const PlanLaunch& launch, const void* ids, std::uint32_t index) {
  return launch.idBytes == 4 ? static_cast<const std::int32_t*>(ids)[index]
                             : static_cast<const std::int64_t*>(ids)[index];
}

// Whether a lane has an id of a batch whose first token is `token`.
__device__ inline bool hasId(const Lane& me, std::uint32_t token, std::uint32_t end) {
  return me.works && token + me.token < end;
}

// Reads the ids of a batch: the expert, or -1. outOfRange(index) is called for ids that are neither.
template <typename OutOfRange>
__device__ int loadExpert(const PlanLaunch& launch, const void* ids, const Lane& me, std::uint32_t token,
                          std::uint32_t end, OutOfRange&& outOfRange) {
  if (!hasId(me, token, end)) return -1;
  const std::uint32_t index = (token + me.token) * launch.topk + me.slot;
  const std::int64_t id = idAt(launch, ids, index);
  if (static_cast<std::uint64_t>(id) < static_cast<std::uint64_t>(launch.experts)) return static_cast<int>(id);
  if (id != -1) outOfRange(index);
  return -1;
}

// Whether an id has an entry, and its key. In rank order a token has one entry for a rank.
struct Mark {
  bool emits;
  std::uint32_t key;
  std::uint32_t sameHome;  // lanes; only asked for where it is needed
};
__device__ inline Mark markOf(const PlanLaunch& launch, const Lane& me, int expert, std::uint32_t home) {
  Mark mark{expert >= 0, static_cast<std::uint32_t>(expert), 0};
  if (launch.byRank) {
    mark.sameHome = __match_any_sync(kAllLanes, home);
    mark.emits = mark.emits && (mark.sameHome & me.ofToken & me.below) == 0;
    mark.key = expert >= 0 ? rankOfExpert(launch, expert) : 0;
  }
  return mark;
}

// Lanes whose entry is the first of a copy, of those in `kept`; `sameNode`: lanes with an entry in the same node.
__device__ inline bool beginsCopy(const PlanLaunch& launch, const Lane& me, std::uint32_t sameNode) {
  return launch.copyPerEntry || (sameNode & me.ofToken & me.below) == 0;
}

struct Tile {
  std::uint32_t token;  // first of this warp
  int batches;
  int expert[kBatches];
  std::uint32_t home[kBatches];
  float weight[kBatches];
  std::uint32_t row[kBatches];         // key | rows of it before, in this warp, << 16; then the final row
  std::uint32_t lowerTwins[kBatches];  // lower lanes of the token that go to the same rank
  std::uint32_t place[kBatches];       // copies and entries << 16 of its node before, in this warp
  std::uint32_t kept, begins, twin;    // a bit for each batch

  __device__ void load(const PlanLaunch& launch, const PlanRank& rank, const Lane& me, std::uint32_t begin,
                       std::uint32_t end) {
    const std::uint32_t step = launch.warps * launch.tokensOfBatch;
    const std::uint32_t wanted = (end - begin + step - 1) / step;
    batches = wanted < kBatches ? wanted : kBatches;
    token = begin + me.warp * batches * launch.tokensOfBatch;
    // Weights do not wait for ids: what an id without an expert has is not looked at.
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      const std::uint32_t first = token + b * launch.tokensOfBatch;
      weight[b] = 1.0f;
      expert[b] = -1;
      if (b < batches) {
        if (rank.weights != nullptr && hasId(me, first, end)) weight[b] = rank.weights[indexOf(launch, me, b)];
        expert[b] = loadExpert(launch, rank.ids, me, first, end, [](std::uint32_t) {});
      }
    }
    kept = begins = twin = 0;
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      home[b] = expert[b] >= 0 ? homeOf(launch, rank, expert[b]) : kNoHome;
    }
  }

  __device__ std::uint32_t tokenOf(const PlanLaunch& launch, const Lane& me, int b) const {
    return token + b * launch.tokensOfBatch + me.token;
  }
  __device__ std::uint32_t indexOf(const PlanLaunch& launch, const Lane& me, int b) const {
    return tokenOf(launch, me, b) * launch.topk + me.slot;
  }
  static __device__ std::uint32_t mostTokens(const PlanLaunch& launch) {
    return kBatches * launch.tokensOfBatch * launch.warps;
  }
  // Tokens that all warps take at a time.
  __device__ std::uint32_t tokens(const PlanLaunch& launch) const {
    return batches * launch.tokensOfBatch * launch.warps;
  }

  // Numbers the rows of each key within the warp, and leaves their number in shared memory.
  __device__ void rank(const PlanLaunch& launch, const PlanShared& s, const Lane& me) {
    auto* rows = reinterpret_cast<std::uint16_t*>(s.rows + me.warp * launch.pairs);
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      if (b >= batches) break;
      const Mark mark = markOf(launch, me, expert[b], home[b]);
      std::uint32_t same = 0;
      if (launch.byRank) {
        const std::uint32_t emitting = __ballot_sync(kAllLanes, mark.emits);
        same = mark.sameHome & emitting;
        lowerTwins[b] = 0;
      } else {
        same = __match_any_sync(kAllLanes, mark.emits ? mark.key : kNoHome);
        lowerTwins[b] = launch.copyPerEntry ? 0 : __match_any_sync(kAllLanes, home[b]) & me.ofToken & me.below;
      }
      const std::uint32_t before = mark.emits ? rows[mark.key] : 0;
      __syncwarp();
      if (mark.emits && (same & me.below) == 0) rows[mark.key] = static_cast<std::uint16_t>(before + __popc(same));
      __syncwarp();
      row[b] = mark.key | (before + __popc(same & me.below)) << 16;
      kept |= static_cast<std::uint32_t>(mark.emits) << b;
    }
  }

  // From numbers within the warp to final rows; what lies beyond its end is dropped. Needs the sums over warps.
  __device__ void findRows(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Lane& me,
                           bool limited) {
    const auto* rows = reinterpret_cast<const std::uint16_t*>(s.rows + me.warp * launch.pairs);
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      if (b >= batches || (kept >> b & 1) == 0) continue;
      const std::uint32_t key = row[b] & 0xffff;
      row[b] = s.next[key] + rows[key] + (row[b] >> 16);
      if (limited && row[b] >= endOf(launch, rank, key)) kept &= ~(1u << b);
    }
  }
  // First row of a key that is out of bounds.
  static __device__ std::uint32_t endOf(const PlanLaunch& launch, const PlanRank& rank, std::uint32_t key) {
    if (!launch.slotted) return launch.capacity;
    const std::uint32_t end = slottedBase(launch, rank, key) + static_cast<std::uint32_t>(launch.maxTokens);
    return end < launch.capacity ? end : launch.capacity;
  }
  static __device__ std::uint32_t slottedBase(const PlanLaunch& launch, const PlanRank& rank, std::uint32_t key) {
    return (localExpert(launch, key) * launch.ranks + rank.rank) * static_cast<std::uint32_t>(launch.maxTokens);
  }
  static __device__ std::uint32_t localExpert(const PlanLaunch& launch, std::uint32_t expert) {
    const int owner = static_cast<int>(rankOfExpert(launch, static_cast<int>(expert)));
    return expert - (owner * launch.each + (owner < launch.larger ? owner : launch.larger));
  }

  // Numbers copies and entries of each node within the warp, and leaves their number in shared memory.
  __device__ void findPlaces(const PlanLaunch& launch, const PlanShared& s, const Lane& me) {
    std::uint32_t* nodes = s.nodes + me.warp * launch.nodes;
    std::uint32_t only = 0;  // the count of the only node
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      if (b >= batches) break;
      const bool keeps = (kept >> b & 1) != 0;
      const std::uint32_t keeping = __ballot_sync(kAllLanes, keeps);
      const std::uint32_t node = home[b] >> 16;
      const std::uint32_t same =
          launch.nodes == 1 ? keeping : __match_any_sync(kAllLanes, keeps ? node : kNoHome) & keeping;
      const bool first = keeps && beginsCopy(launch, me, same);
      const std::uint32_t beginning = __ballot_sync(kAllLanes, first) & same;
      std::uint32_t before = only;
      const std::uint32_t added = __popc(beginning) | __popc(same) << 16;
      if (launch.nodes == 1) {
        only += added;
      } else {
        before = keeps ? nodes[node] : 0;
        __syncwarp();
        if (keeps && (same & me.below) == 0) nodes[node] = before + added;
        __syncwarp();
      }
      place[b] = before + (__popc(beginning & me.below) | __popc(same & me.below) << 16);
      begins |= static_cast<std::uint32_t>(first) << b;
      twin |= static_cast<std::uint32_t>((lowerTwins[b] & keeping) != 0) << b;
    }
    if (launch.nodes == 1 && me.lane == 0) nodes[0] = only;
  }

  __device__ void store(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Lane& me) const {
    auto* copies = reinterpret_cast<uint2*>(rank.arena + rank.copies);
    auto* entries = reinterpret_cast<uint2*>(rank.arena + rank.entries);
    auto* weights = reinterpret_cast<float*>(rank.arena + rank.weightsOfEntries);
    const std::uint32_t* nodes = s.nodes + me.warp * launch.nodes;
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      if (b >= batches || (kept >> b & 1) == 0) continue;
      const std::uint32_t node = home[b] >> 16;
      const std::uint32_t lower = nodes[node] + place[b];
      const std::uint32_t entry = s.entries[node] + (lower >> 16);
      const std::uint32_t slot = me.slot | ((twin >> b & 1) != 0 ? plan::kDuplicate : 0u);
      entries[entry] = make_uint2((home[b] & 0xffff) | slot << 16, row[b]);
      weights[entry] = weight[b];
      if ((begins >> b & 1) != 0) copies[s.copies[node] + (lower & 0xffff)] = make_uint2(tokenOf(launch, me, b), entry);
    }
  }
};

// [warps][columns] counts become those of lower warps; row `warps` becomes the sum of all. `thread` takes every n-th
// column of n threads.
__device__ inline void sumOverWarps(std::uint32_t* counts, int columns, int warps, int thread) {
  for (int column = thread; column < columns; column += blockDim.x) {
    std::uint32_t sum = 0;
    for (int first = 0; first < warps; first += 8) {
      std::uint32_t of[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) of[i] = first + i < warps ? counts[(first + i) * columns + column] : 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (first + i < warps) counts[(first + i) * columns + column] = sum;
        sum += of[i];
      }
    }
    counts[warps * columns + column] = sum;
  }
}

// `bytes`, rounded up to 16, of a block's shared memory.
__device__ inline void clearAll(std::size_t bytes) {
  auto* quads = reinterpret_cast<uint4*>(planMemory);
  for (unsigned i = threadIdx.x; i < (bytes + 15) / 16; i += blockDim.x) quads[i] = uint4{0, 0, 0, 0};
}
__device__ inline void clear(std::uint32_t* words, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
}

// Nodes by the last threads: the first ones have keys.
__device__ inline int threadOfNode() { return static_cast<int>(blockDim.x - 1 - threadIdx.x); }

// Walks [begin, end), which is not empty. `basesAreKnown` is called by all threads once, when all that does not need
// the other blocks' counts has been done; it says whether to go on. Without kStore only the cursors move. placesFirst:
// nothing is dropped if it goes on, so that places do not depend on rows. `ahead` is called behind the first barrier.
template <bool kStore, typename BasesAreKnown, typename Ahead>
__device__ void walk(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Lane& me,
                     std::uint32_t begin, std::uint32_t end, bool placesFirst, BasesAreKnown&& basesAreKnown,
                     Ahead&& ahead) {
  for (bool isFirst = true;; isFirst = false) {
    Tile tile;
    tile.load(launch, rank, me, begin, end);
    clear(s.rows, launch.warps * launch.pairs);
    clear(s.nodes, launch.warps * launch.nodes);
    __syncthreads();
    if (isFirst) ahead();
    tile.rank(launch, s, me);
    if (placesFirst) tile.findPlaces(launch, s, me);
    __syncthreads();
    sumOverWarps(s.rows, launch.pairs, launch.warps, static_cast<int>(threadIdx.x));
    if (placesFirst) sumOverWarps(s.nodes, launch.nodes, launch.warps, threadOfNode());
    if (isFirst && !basesAreKnown()) return;
    __syncthreads();
    tile.findRows(launch, rank, s, me, s.words[kLimited] != 0);
    if (!placesFirst) {
      tile.findPlaces(launch, s, me);
      __syncthreads();
      sumOverWarps(s.nodes, launch.nodes, launch.warps, threadOfNode());
      __syncthreads();
    }
    if constexpr (kStore) tile.store(launch, rank, s, me);
    begin += tile.tokens(launch);
    if (kStore && begin >= end) return;
    __syncthreads();
    for (int key = threadIdx.x; key < launch.keys; key += blockDim.x) {
      s.next[key] += reinterpret_cast<const std::uint16_t*>(s.rows + launch.warps * launch.pairs)[key];
    }
    for (int node = threadIdx.x; node < launch.nodes; node += blockDim.x) {
      const std::uint32_t sum = s.nodes[launch.warps * launch.nodes + node];
      s.copies[node] += sum & 0xffff;
      s.entries[node] += sum >> 16;
    }
    __syncthreads();
    if (begin >= end) return;
  }
}
template <bool kStore, typename BasesAreKnown>
__device__ void walk(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Lane& me,
                     std::uint32_t begin, std::uint32_t end, bool placesFirst, BasesAreKnown&& basesAreKnown) {
  walk<kStore>(launch, rank, s, me, begin, end, placesFirst, basesAreKnown, [] {});
}

}  // namespace fusco::kernels
