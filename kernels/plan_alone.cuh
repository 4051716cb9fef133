// The kernel of small plans: one block for each rank does all of it.
#pragma once

#include "kernels/plan_count.cuh"
#include "kernels/plan_head.cuh"

namespace fusco::kernels {

inline constexpr int kIdsAtATime = 4;  // that a thread has asked for

// A block plans a rank, and counts the routing maps of all ranks by itself. kBySlots: in layouts other than expert
// order.
template <bool kBySlots>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) aloneKernel(const __grid_constant__ PlanLaunch launch) {
  const int mine = launch.firstHere + static_cast<int>(blockIdx.y);
  const PlanRank& rank = launch.rank[mine];
  const PlanShared s = shareOut(launch, true);
  const Lane me = whoAmI(launch);
  clearAll(sharedBytes(launch.keys, launch.pairs, launch.warps, launch.nodes, launch.mayDrop, true));
  __syncthreads();
  ptx::waitForPreviousLaunch();
  ptx::letNextLaunchBegin();
  bool tooMany = false;
  const std::uint32_t tokens = tokensOf(rank, tooMany);
  HeadFrame frame;
  frame.load(rank, me);
  const std::size_t brought = launch.turn != nullptr && *launch.turn % 2 != 0 ? launch.turnBytes : 0;

  const auto mapOf = [&](int from) {
    const bool here = from >= launch.firstHere && from < launch.firstHere + launch.ranksHere;
    return static_cast<const std::byte*>(launch.rank[from].ids) + (here ? 0 : brought);
  };
  // In expert order where an id is in its token does not matter: a thread takes ids of all ranks. It asks for its first
  // ones before it needs them, since those of other GPUs are far away.
  __shared__ const std::byte* maps[kMaxPlanRanks];
  __shared__ std::uint32_t ends[kMaxPlanRanks];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int ofRank = 1 << launch.idsOfRank, all = launch.rankCount << launch.idsOfRank;
  if (!kBySlots && thread < launch.rankCount) {
    bool isTooMany = false;
    ends[thread] = tokensOf(launch.rank[thread], isTooMany) * launch.topk;
    maps[thread] = mapOf(thread);
  }
  std::int64_t ids[kIdsAtATime];
  const auto askFor = [&](int first) {
#pragma unroll
    for (int i = 0; i < kIdsAtATime; ++i) {
      const int at = first + i * threads, from = at >> launch.idsOfRank, index = at & (ofRank - 1);
      ids[i] = -1;
      if (at < all && index < static_cast<int>(ends[from])) ids[i] = idAt(launch, maps[from], index);
    }
  };
  const auto askAhead = [&] {
    if constexpr (!kBySlots) askFor(thread);
  };
  const auto refuse = [&](int from, std::uint32_t index) {
    if (from == mine) atomicMax(s.words + kBad, ~index);
    atomicMax(s.words + kBadRank, ~static_cast<std::uint32_t>(launch.rank[from].rank));
  };
  const auto add = [&](int from, std::uint32_t key) {
    if (!kBySlots || !launch.slotted) atomicAdd(s.total + key, 1u);
    if (from == mine) atomicAdd(s.own + key, 1u);
    if (from < mine) atomicAdd(s.next + key, 1u);
  };
  // Steps follow each other, each as long as its code is: what need not be unrolled is not.
  const auto countAll = [&] {
    uint2 only{0, 0};
    if constexpr (kBySlots) {
      const int counted = launch.slotted ? 1 : launch.rankCount, batches = counted * launch.batchesOfRank;
      for (int first = me.warp; first < batches; first += kBatches * launch.warps) {
        int expert[kBatches], from[kBatches];
#pragma unroll
        for (int b = 0; b < kBatches; ++b) {
          const int batch = first + b * launch.warps;
          from[b] = launch.slotted ? mine : batch % counted;
          expert[b] = -1;
          if (batch >= batches) continue;
          bool isTooMany = false;
          const std::uint32_t end = tokensOf(launch.rank[from[b]], isTooMany);
          expert[b] = loadExpert(launch, mapOf(from[b]), me, batch / counted * launch.tokensOfBatch, end,
                                 [&](std::uint32_t index) { refuse(from[b], index); });
        }
#pragma unroll
        for (int b = 0; b < kBatches; ++b) {
          if (first + b * launch.warps >= batches) break;
          countBatch(launch, rank, me, expert[b], from[b] == mine, s, only,
                     [&](std::uint32_t key) { add(from[b], key); });
        }
      }
    } else {
      // Rows by key.
      for (int first = thread; first < all; first += kIdsAtATime * threads) {
        if (first != thread) askFor(first);
#pragma unroll
        for (int i = 0; i < kIdsAtATime; ++i) {
          if (ids[i] == -1) continue;
          const int at = first + i * threads, from = at >> launch.idsOfRank;
          if (static_cast<std::uint64_t>(ids[i]) < static_cast<std::uint64_t>(launch.experts)) {
            add(from, static_cast<std::uint32_t>(ids[i]));
          } else {
            refuse(from, static_cast<std::uint32_t>(at & (ofRank - 1)));
          }
        }
      }
      // Copies and entries of this rank, which a walk of one tile has numbered already.
      if (tokens <= Tile::mostTokens(launch)) {
        if (tokens > 0) {
          for (int node = threadOfNode(); node < launch.nodes; node += threads) {
            const std::uint32_t sum = s.nodes[launch.warps * launch.nodes + node];
            s.copiesOfNode[node] = sum & 0xffff;
            s.entriesOfNode[node] = sum >> 16;
          }
        }
        return;
      }
      const auto step = static_cast<std::uint32_t>(launch.tokensOfBatch);
#pragma unroll 1
      for (std::uint32_t token = me.warp * step; token < tokens; token += launch.warps * step) {
        const int expert = loadExpert(launch, rank.ids, me, token, tokens, [](std::uint32_t) {});
        countBatch(launch, rank, me, expert, true, s, only, [](std::uint32_t) {});
      }
    }
    addOnly(launch, s, me, only);
  };
  std::uint32_t wanted = 0;
  bool isSecond = false, goesOn = false;
  const auto basesAreKnown = [&] {
    if (!isSecond) {
      countAll();
      __syncthreads();
      const HeadRows head{launch, rank, s};
      findRowBases(
          launch, rank, s, me, [&](int key) { return s.own[key]; },
          [&](int key, std::uint32_t base, std::uint32_t start, std::uint32_t total, std::uint32_t own) {
            head.visit(key, base, start, total, own);
          });
      for (int node = 0; node < launch.nodes; ++node) wanted += s.entriesOfNode[node];
      goesOn = s.words[kRefused] == 0;
      if (goesOn && s.words[kLimited] != 0) return false;
    }
    placeNodes(launch, s, me);
    __syncthreads();
    finishHead(launch, rank, s, me, frame, tokens, wanted, tooMany);
    return goesOn;
  };
  if (tokens == 0) {
    __syncthreads();
    askAhead();
    basesAreKnown();
  } else {
    for (;; isSecond = true) {
      walk<true>(launch, rank, s, me, 0, tokens, !isSecond, basesAreKnown, askAhead);
      if (isSecond || !goesOn || s.words[kLimited] == 0) break;
      // Rows are dropped: once more, with the numbers of what is kept.
      walk<false>(launch, rank, s, me, 0, tokens, false, [] { return true; });
      for (int key = threadIdx.x; key < launch.keys; key += blockDim.x) s.next[key] -= s.own[key];
      for (int node = threadIdx.x; node < launch.nodes; node += blockDim.x) {
        s.copiesOfNode[node] = s.copies[node];
        s.entriesOfNode[node] = s.entries[node];
        s.copies[node] = s.entries[node] = 0;
      }
      __syncthreads();
    }
  }
  clearTails(launch, rank, s, tokens, 0, 1);
}

}  // namespace fusco::kernels
