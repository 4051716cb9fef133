// What kernels share that work copy by copy, a block or a warp for each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/beside.h"

namespace fusco::kernels {

inline constexpr int kWarpThreads = 32;

// Copies of all local ranks as one sequence. By the first warp of a block; the caller synchronises.
struct CopyMap {
  unsigned first[kMaxLocalRanks + 1];  // of each rank, and behind the last
  unsigned copyBegin[kMaxLocalRanks];

  template <typename Rank>
  __device__ void fill(const Rank* ranks, int count) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane >= kWarpThreads) return;
    unsigned sum = 0;
    if (lane < count) {
      const plan::Flow* flow = ranks[lane].plan.flow;
      copyBegin[lane] = flow->copyBegin;
      sum = flow->copyEnd - flow->copyBegin;
    }
    for (int d = 1; d < kWarpThreads; d *= 2) {
      const unsigned other = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane < count) first[lane + 1] = sum;
    if (lane == 0) first[0] = 0;
  }
  __device__ int rankOf(unsigned index) const {
    int rank = 0;
    while (index >= first[rank + 1]) ++rank;
    return rank;
  }
  __device__ unsigned copyOf(int rank, unsigned index) const { return copyBegin[rank] + index - first[rank]; }
};

__device__ inline std::int32_t* startsOf(const BesideBoard& board) {
  return reinterpret_cast<std::int32_t*>(board.counters + board.localExperts);
}

// One more complete row of the expert that `row` belongs to. What this thread has written before, and what it has been
// told of by a barrier, is visible to whoever reads the counter with acquire.
__device__ inline void countRow(const BesideBoard& board, std::uint32_t row, bool oneGpu) {
  const std::int32_t* starts = startsOf(board);
  int low = 0, high = board.localExperts;  // the last expert that begins at or before the row
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle] <= static_cast<std::int32_t>(row)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  std::uint64_t* counter = board.counters + low;
#if __CUDA_ARCH__ >= 700
  if (oneGpu) {
    asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(counter), "l"(std::uint64_t{1}) : "memory");
  } else {
    asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(counter), "l"(std::uint64_t{1}) : "memory");
  }
#endif
}

// Blocks of a launch that may take `perSm` on each SM; within a budget one on each.
inline int blocksFor(const Budget& budget, int sms, int perSm) {
  return budget.blocks > 0 ? budget.blocks : sms * perSm;
}

}  // namespace fusco::kernels
