// Meetings of GPUs: one block, a thread for each of the others.
#include "kernels/across.cuh"
#include "kernels/grid.h"
#include "kernels/meet.h"

namespace fusco::kernels {

namespace {

constexpr int kThreads = (kMaxNodeRanks + kWarpThreads - 1) / kWarpThreads * kWarpThreads;

// Whether `word` gets as far as `count`, within the bound.
__device__ bool comesTo(const std::uint32_t* word, std::uint32_t count, const ArrivalWait& wait) {
  return waitUntil([&] { return static_cast<std::int32_t>(ptx::loadAcquire(word) - count) >= 0; }, wait);
}

// The meeting of this number. What launches before this one have written, and what the block's threads have before they
// synchronised, is visible to whoever sees a word that is released here.
__device__ void meet(const MeetArgs& args, std::uint32_t count) {
  const int other = static_cast<int>(threadIdx.x);
  if (other < kMaxNodeRanks && args.theirs[other] != nullptr) {
    ptx::storeRelease(args.theirs[other], count);
    comesTo(args.mine + other, count, args.wait);
  }
  __syncthreads();
  if (other == 0) *args.count = count;
}

__global__ void __launch_bounds__(kThreads) meetOthers(const __grid_constant__ MeetArgs args) {
  ptx::waitForPreviousLaunch();
  meet(args, *args.count + 1);
}

constexpr int kMapThreads = 512;

template <typename Id>
__device__ void bringMap(const BringMapsArgs& args, const BringMapsArgs::Map& map, std::size_t offset) {
  std::int64_t used = map.tokensUsed == nullptr ? map.tokens : *map.tokensUsed;
  if (used < 0 || used > map.tokens) used = 0;  // which its planner tells
  for (std::int64_t i = threadIdx.x; i < map.tokens * args.topk; i += kMapThreads) {
    const Id id = i < used * args.topk ? static_cast<const Id*>(map.ids)[i] : Id{-1};
    for (int k = 0; k < args.others; ++k) reinterpret_cast<Id*>(args.maps[k] + offset)[i] = id;
  }
}

__global__ void __launch_bounds__(kMapThreads) bringMaps(const __grid_constant__ BringMapsArgs args) {
  ptx::waitForPreviousLaunch();
  const std::uint32_t count = *args.meet.count + 1;
  for (int r = 0; r < args.ownCount; ++r) {
    const BringMapsArgs::Map& map = args.own[r];
    const std::size_t offset = (static_cast<std::size_t>(count % 2 * args.ranks) + map.number) * kMapBytes;
    if (args.idBytes == 4) {
      bringMap<std::int32_t>(args, map, offset);
    } else {
      bringMap<std::int64_t>(args, map, offset);
    }
  }
  __syncthreads();
  meet(args.meet, count);
}

__global__ void __launch_bounds__(kThreads) tellOthers(const __grid_constant__ TellArgs args) {
  ptx::waitForPreviousLaunch();
  const int other = static_cast<int>(threadIdx.x);
  if (other >= kMaxNodeRanks || args.more[other] == 0) return;
  const std::uint32_t count = args.told[other] + args.more[other];
  args.told[other] = count;
  ptx::storeRelease(args.theirs[other], count);
}

__global__ void __launch_bounds__(kThreads) awaitOthers(const __grid_constant__ AwaitArgs args) {
  ptx::waitForPreviousLaunch();
  const int other = static_cast<int>(threadIdx.x);
  if (other >= kMaxNodeRanks || args.more[other] == 0) return;
  const std::uint32_t count = args.awaited[other] + args.more[other];
  args.awaited[other] = count;
  comesTo(args.mine + other, count, args.wait);
}

}  // namespace

int launchMeet(const MeetArgs& args, void* stream) {
  return launch(meetOthers, args, 1, kThreads, 0, static_cast<cudaStream_t>(stream));
}
int launchBringMaps(const BringMapsArgs& args, void* stream) {
  return launch(bringMaps, args, 1, kMapThreads, 0, static_cast<cudaStream_t>(stream));
}
int launchTell(const TellArgs& args, void* stream) {
  return launch(tellOthers, args, 1, kThreads, 0, static_cast<cudaStream_t>(stream));
}
int launchAwait(const AwaitArgs& args, void* stream) {
  return launch(awaitOthers, args, 1, kThreads, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace fusco::kernels
