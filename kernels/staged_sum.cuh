// Sums whose rows come through shared memory (sm_90 and later): the copy engine of the SM brings chunks of rows while
// the warp adds up earlier ones, of this sum or of the one before. A multiprocessor reads half as much again so as by
// loads into registers (docs/results.md, "One H100"), so few of them are enough. The arithmetic is that of
// warp_sum.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/grid.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/warp_sum.cuh"

namespace fusco::kernels {

// One block for each multiprocessor. More copies under way at a time than about forty make a multiprocessor slower, and
// so do shorter ones.
inline constexpr int kStagedWarps = 16, kStagedThreads = kStagedWarps * 32;
inline constexpr int kTellingWarps = kStagedWarps - 1;  // that sum, where one tells other GPUs of it
inline constexpr int kStagedSlots = 3;                  // chunks of a warp that are under way or being added
inline constexpr unsigned kStagedStep = 512;
inline constexpr int kStagedVectors = 7;
inline constexpr unsigned kMostStagedBytes = kStagedVectors * kStagedStep;

// Chunks of about equal size; a multiple of what a warp adds in a step, so that slots stay aligned.
constexpr unsigned stagedChunk(unsigned pieceBytes) {
  const unsigned chunks = (pieceBytes + kMostStagedBytes - 1) / kMostStagedBytes;
  const unsigned bytes = (pieceBytes + chunks - 1) / chunks;
  return (bytes + kStagedStep - 1) / kStagedStep * kStagedStep;
}
constexpr std::size_t stagedBytes(unsigned chunk) { return std::size_t{chunk} * kStagedSlots * kStagedWarps; }
// Whether the current GPU has the instructions and shared memory for it, and chunks of such rows are long enough: with
// those of 2 KiB loads into registers are the faster.
inline bool stages(std::size_t rowBytes) {
  const unsigned chunk = stagedChunk(static_cast<unsigned>(rowBytes < kMostPieceBytes ? rowBytes : kMostPieceBytes));
  return deviceShape().major >= 9 && chunk > 2048 && stagedBytes(kMostStagedBytes) <= mostDynamicBytes();
}

// out = bias + the terms 0 to count - 1, in this order, for `bytes` bytes of each row; 16-byte aligned, all of it.
struct StagedUnit {
  WarpTerm term;  // the k-th is with lane k
  int count;      // at most 32; the rows can be read
  unsigned bytes;
  const std::byte* bias;  // null: none
  std::byte* out;
  std::uint32_t* arrival;  // set to 1 when the sum can be seen everywhere; null: nobody is told. TellQueue only
};

enum class Next { unit, later, none };

#if __CUDA_ARCH__ >= 900

// Between the warps that sum and the one that tells other GPUs of it: a store that others see after all before it takes
// as long as the way there and back, and would keep a warp from its next sum. In shared memory, begun with zeros.
struct TellQueue {
  static constexpr unsigned kDepth = 4;
  std::uint32_t* words[kTellingWarps][kDepth];
  std::uint32_t posted[kTellingWarps], told[kTellingWarps];
  std::uint32_t ended;  // warps that will post no more

  __device__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kTellingWarps; i += static_cast<int>(blockDim.x))
      posted[i] = told[i] = 0;
    if (threadIdx.x == 0) ended = 0;
  }
  // By one lane, after all lanes have written; the `number`-th of this warp.
  __device__ void post(int warp, std::uint32_t number, std::uint32_t* word) {
    while (number - ptx::loadAcquireShared(told + warp) >= kDepth) {
    }
    words[warp][number % kDepth] = word;
    ptx::storeReleaseShared(posted + warp, number + 1);
  }
  __device__ void end() {
    __threadfence_block();
    atomicAdd(&ended, 1u);
  }
  // By a whole warp, until all have ended.
  __device__ void tellAll() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    std::uint32_t seen = 0;
    for (;;) {
      const bool last = ptx::loadAcquireShared(&ended) == kTellingWarps;
      const std::uint32_t now = lane < kTellingWarps ? ptx::loadAcquireShared(posted + lane) : 0;
      if (__any_sync(0xffffffffu, now != seen)) {
        __threadfence_system();
        for (; seen != now; ++seen) ptx::storeRelaxed(words[lane][seen % kDepth], 1);
        if (lane < kTellingWarps) ptx::storeReleaseShared(told + lane, seen);
        __syncwarp();
      } else if (__all_sync(0xffffffffu, last)) {
        return;
      }
    }
  }
};

// A warp's units, one after the other. Units::next(unit, wait) gives the next one; `later` only without `wait`.
template <typename Number, typename Units>
class StagedSum {
 public:
  static_assert(sizeof(Pack<Number, 16>) == 16);

  __device__ StagedSum(unsigned char* buffers, std::uint64_t* barriers, unsigned chunk, Units& units, TellQueue* queue)
      : lane_(threadIdx.x % 32),
        chunk_(chunk),
        buffers_(ptx::sharedAddress(buffers)),
        barriers_(ptx::sharedAddress(barriers)),
        units_(units),
        queue_(queue),
        loaded_{buffers_, barriers_, 0},
        used_{buffers_, barriers_, 0} {}

  __device__ void run() {
    for (bool more = find(unit_, true) == Next::unit; more;) {
      addUp();
      tell();
      more = hasAhead_ || find(aheadUnit_, true) == Next::unit;
      unit_ = aheadUnit_;
      hasAhead_ = false;
    }
  }

 private:
  static constexpr int kCount = Pack<Number, 16>::kCount;

  // What is left of a unit when loading has been taken care of.
  struct Sum {
    float weight;
    int count;
    unsigned bytes;
    const std::byte* bias;
    std::byte* out;
    std::uint32_t* arrival;
  };
  // What is to be loaded next: the chunk at `row` of each term in turn, and what follows in the rows.
  struct Cursor {
    const std::byte* row;  // of this lane's term
    unsigned chunk, left;  // bytes of this chunk, and with those behind it
    int term, count;
  };
  // One of the warp's slots by its addresses in shared memory, and which use of it.
  struct Slot {
    std::uint32_t buffer, barrier, parity;
  };
  __device__ __forceinline__ void step(Slot& slot) const {
    slot.buffer += chunk_;
    slot.barrier += sizeof(std::uint64_t);
    if (slot.barrier != barriers_ + kStagedSlots * sizeof(std::uint64_t)) return;
    slot = {buffers_, barriers_, slot.parity ^ 1};
  }

  __device__ __forceinline__ void addUp() {
    for (unsigned at = 0; at < unit_.bytes; at += chunk_) {
      float sums[kStagedVectors][kCount];
      const unsigned bytes = min(chunk_, unit_.bytes - at);
      if (unit_.bias == nullptr) {
#pragma unroll
        for (int v = 0; v < kStagedVectors; ++v)
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[v][i] = 0.0f;
      } else {
#pragma unroll
        for (int v = 0; v < kStagedVectors; ++v) {
          const unsigned from = static_cast<unsigned>(v) * kStagedStep + lane_ * 16;
          Pack<Number, 16> value{};
          if (from < bytes) value.read(unit_.bias + at + from);
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[v][i] = value.at(i);
        }
      }
      for (int k = 0; k < unit_.count; ++k) {
        load();
        ptx::barrierWait(used_.barrier, used_.parity);
        const float weight = __shfl_sync(0xffffffffu, unit_.weight, k);
        const std::uint32_t slot = used_.buffer + lane_ * 16;
        if (bytes > kMostStagedBytes - kStagedStep) {
#pragma unroll
          for (int v = 0; v < kStagedVectors; ++v) add(sums[v], slot, v, weight);
        } else {
#pragma unroll
          for (int v = 0; v < kStagedVectors; ++v) {
            if (static_cast<unsigned>(v) * kStagedStep >= bytes) break;
            add(sums[v], slot, v, weight);
          }
        }
        __syncwarp();
        step(used_);
        --under_;
      }
#pragma unroll
      for (int v = 0; v < kStagedVectors; ++v) {
        const unsigned to = static_cast<unsigned>(v) * kStagedStep + lane_ * 16;
        if (to >= bytes) break;
        Pack<Number, 16> result;
        result.round(sums[v]);
        result.write(unit_.out + at + to);
      }
    }
  }

  __device__ static __forceinline__ void add(float (&sums)[kCount], std::uint32_t slot, int vector, float weight) {
    Pack<Number, 16> value;
    value.whole = ptx::loadShared(slot + static_cast<unsigned>(vector) * kStagedStep);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = fmaf(weight, value.at(i), sums[i]);
  }

  __device__ __forceinline__ void tell() {
    if (queue_ == nullptr || unit_.arrival == nullptr) return;
    __syncwarp();
    if (lane_ == 0) queue_->post(static_cast<int>(threadIdx.x / 32), posted_, unit_.arrival);
    ++posted_;
  }

  // Fills the slots, as far as it is known what to load: this unit's rows, then those of the one behind it.
  __device__ __forceinline__ void load() {
    while (under_ < kStagedSlots) {
      if (cursor_.left == 0) {
        if (hasAhead_ || ended_) return;
        const Next next = find(aheadUnit_, false);
        hasAhead_ = next == Next::unit;
        ended_ = next == Next::none;
        if (!hasAhead_ || cursor_.left == 0) return;
      }
      if (static_cast<int>(lane_) == cursor_.term) {
        ptx::barrierExpect(loaded_.barrier, cursor_.chunk);
        ptx::bulkLoad(loaded_.buffer, cursor_.row, cursor_.chunk, loaded_.barrier, policy_);
      }
      step(loaded_);
      ++under_;
      if (++cursor_.term < cursor_.count) continue;
      cursor_.term = 0;
      cursor_.row += chunk_;
      cursor_.left -= cursor_.chunk;
      cursor_.chunk = min(chunk_, cursor_.left);
    }
  }

  // The next unit, which is what will be loaded. All that was to be loaded before is on its way.
  __device__ __forceinline__ Next find(Sum& sum, bool wait) {
    StagedUnit unit;
    const Next next = nextOf(units_, unit, wait);
    if (next != Next::unit) return next;
    sum = {unit.term.weight, unit.count, unit.bytes, unit.bias, unit.out, unit.arrival};
    cursor_ = {unit.term.row, min(chunk_, unit.bytes), unit.count == 0 ? 0 : unit.bytes, 0, unit.count};
    return next;
  }
  // A call: what it needs of registers is not to be held while rows are added.
  __device__ static __noinline__ Next nextOf(Units& units, StagedUnit& unit, bool wait) {
    return units.next(unit, wait);
  }

  const unsigned lane_, chunk_;
  const std::uint32_t buffers_, barriers_;  // addresses in shared memory
  Units& units_;
  TellQueue* const queue_;  // null: nobody is told of anything
  std::uint32_t posted_ = 0;
  const std::uint64_t policy_ = ptx::evictFirst();
  Sum unit_, aheadUnit_;  // that is added up, and the one behind it
  bool hasAhead_ = false, ended_ = false;
  Cursor cursor_;
  Slot loaded_, used_;
  int under_ = 0;  // slots that are loaded or loading
};

// One warp's sums in its part of the block's shared memory, after beginStaged() and a barrier.
template <typename Number, typename Units>
__device__ __forceinline__ void sumStaged(unsigned char* buffers, std::uint64_t (&barriers)[kStagedWarps][kStagedSlots],
                                          unsigned chunk, Units& units, TellQueue* queue) {
  const unsigned warp = threadIdx.x / 32;
  StagedSum<Number, Units>(buffers + std::size_t{warp} * kStagedSlots * chunk, barriers[warp], chunk, units, queue)
      .run();
}
// By the whole block.
__device__ inline void beginStaged(std::uint64_t (&barriers)[kStagedWarps][kStagedSlots]) {
  if (threadIdx.x % 32 != 0) return;
  for (std::uint64_t& barrier : barriers[threadIdx.x / 32]) ptx::barrierInit(&barrier, 1);
  ptx::barrierInitFence();
}

#endif

}  // namespace fusco::kernels
