// What kernels share that work on plans of ranks on other GPUs.
#pragma once

#include <cuda_runtime.h>

#include "kernels/across.h"
#include "kernels/beside.cuh"
#include "kernels/ptx.cuh"

namespace fusco::kernels {

// Until `there` says so; or false after the bound, or once any wait of the communicator has been in vain: what comes
// behind it would wait as long each time. For one thread.
template <typename There>
__device__ bool waitUntil(const There& there, const ArrivalWait& wait) {
  constexpr unsigned kTries = 1024;         // between looks at the clock, each of which takes as long as many tries
  constexpr std::uint64_t kLook = 1000000;  // between those at the host's memory, ns
  std::uint64_t begin = 0, looked = 0;
  for (unsigned tries = 1; !there(); ++tries) {
    if (tries % kTries != 0) continue;
    const std::uint64_t now = ptx::nanoseconds();
    if (begin == 0) begin = looked = now;
    if (now - looked < kLook) continue;
    looked = now;
    const bool goesOn = ptx::loadVolatile(wait.abort) == 0 && ptx::loadVolatile(wait.failed) == 0;
    if (goesOn && now - begin < wait.nanoseconds) continue;
    *reinterpret_cast<volatile std::uint32_t*>(wait.failed) = 1;
    return false;
  }
  return true;
}

// Words that other GPUs set, one for each lane or null: all seen set, and set back; or false after the bound. For a
// whole warp. What the other GPUs have written before is visible then.
__device__ inline bool waitForArrivals(std::uint32_t* mine, const ArrivalWait& wait) {
  bool there = true;
  if (mine != nullptr) {
    there = waitUntil([&] { return ptx::loadAcquire(mine) != 0; }, wait);
    if (there) *reinterpret_cast<volatile std::uint32_t*>(mine) = 0;
  }
  __syncwarp();  // what one lane has acquired, others read
  return __all_sync(0xffffffffu, there) != 0;
}
__device__ inline bool waitForArrival(std::uint32_t* word, const ArrivalWait& wait) {
  return waitForArrivals(threadIdx.x % kWarpThreads == 0 ? word : nullptr, wait);
}
// The same without waiting: whether all have been seen; else none is set back.
__device__ inline bool takeArrivals(std::uint32_t* mine) {
  if (__any_sync(0xffffffffu, mine != nullptr && ptx::loadAcquire(mine) == 0) != 0) return false;
  if (mine != nullptr) *reinterpret_cast<volatile std::uint32_t*>(mine) = 0;
  __syncwarp();
  return true;
}
__device__ inline bool takeArrival(std::uint32_t* word) {
  return takeArrivals(threadIdx.x % kWarpThreads == 0 ? word : nullptr);
}

// Copies of each source, by the first warp of a block; the caller synchronises.
struct SourceMap {
  unsigned begin[kMaxSources];
  unsigned copies[kMaxSources];
  unsigned most;

  template <typename At>
  __device__ void fill(int count, const At& at) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane >= kWarpThreads) return;
    unsigned mine = 0;
    if (lane < count) {
      const plan::Flow* flow = at(lane).plan.flow;
      begin[lane] = flow->copyBegin;
      mine = copies[lane] = flow->copyEnd - flow->copyBegin;
    }
    for (int d = kWarpThreads / 2; d > 0; d /= 2) mine = max(mine, __shfl_xor_sync(0xffffffffu, mine, d));
    if (lane == 0) most = mine;
  }
};

// A piece of a copy, as a warp has it: each lane one entry.
struct SourceUnit {
  int source;
  unsigned copy;  // in the arena
  unsigned token;
  unsigned piece;
  unsigned number;  // among the source's pieces
  unsigned firstEntry;
  bool held;  // this lane has an entry
  plan::Entry entry;
  float weight;  // of it; 1 where nobody asks for weights
};

// A warp's units in the order in which sources send them, all sources in turn. What it reads over links is under way
// while earlier units are worked on.
template <typename At>
class SourceReader {
 public:
  __device__ SourceReader(const SourceMap& map, int sources, unsigned pieces, unsigned first, unsigned stride,
                          bool weighted, const At& at)
      : map_(map), sources_(sources), pieces_(pieces), index_(first), stride_(stride), weighted_(weighted), at_(at) {
    readCopy();
    readEntries();
    readCopy();
  }
  __device__ bool next(SourceUnit& unit) {
    if (!entriesThere_) return false;
    unit = ready_;
    readEntries();
    readCopy();
    return true;
  }

 private:
  // Asks for the next unit's copy and the one behind it.
  __device__ void readCopy() {
    const unsigned long long all = static_cast<unsigned long long>(map_.most) * pieces_ * sources_;
    copyThere_ = false;
    for (; index_ < all; index_ += stride_) {
      const int source = static_cast<int>(index_ % sources_);
      const unsigned number = static_cast<unsigned>(index_ / sources_);
      const unsigned copy = number / pieces_;
      if (copy >= map_.copies[source]) continue;
      coming_.source = source;
      coming_.number = number;
      coming_.piece = number % pieces_;
      coming_.copy = map_.begin[source] + copy;
      const unsigned lane = threadIdx.x % kWarpThreads;
      pair_ = at_(source).plan.copies[coming_.copy + (lane & 1)];
      copyThere_ = true;
      index_ += stride_;
      break;
    }
  }
  __device__ void readEntries() {
    entriesThere_ = copyThere_;
    if (!copyThere_) return;
    ready_ = coming_;
    ready_.token = __shfl_sync(0xffffffffu, pair_.token, 0);
    ready_.firstEntry = __shfl_sync(0xffffffffu, pair_.firstEntry, 0);
    const unsigned end = __shfl_sync(0xffffffffu, pair_.firstEntry, 1);
    const unsigned lane = threadIdx.x % kWarpThreads;
    ready_.held = ready_.firstEntry + lane < end;
    ready_.weight = 1.0f;
    if (!ready_.held) return;
    const PlanPointers& plan = at_(ready_.source).plan;
    ready_.entry = plan.entries[ready_.firstEntry + lane];
    if (weighted_) ready_.weight = plan.weights[ready_.firstEntry + lane];
  }

  const SourceMap& map_;
  const int sources_;
  const unsigned pieces_;
  unsigned long long index_;
  const unsigned stride_;
  const bool weighted_;
  const At& at_;
  SourceUnit coming_, ready_;
  plan::Copy pair_{};
  bool copyThere_ = false, entriesThere_ = false;
};

}  // namespace fusco::kernels
