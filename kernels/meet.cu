// Meetings of GPUs: one block, a thread for each of the others.
#include "kernels/across.cuh"
#include "kernels/grid.h"
#include "kernels/meet.h"

namespace fusco::kernels {

namespace {

// What launches before this one have written is visible to whoever sees a word that is released here.
constexpr int kThreads = (kMaxNodeRanks + kWarpThreads - 1) / kWarpThreads * kWarpThreads;

// Whether `word` gets as far as `count`, within the bound.
__device__ bool comesTo(const std::uint32_t* word, std::uint32_t count, const ArrivalWait& wait) {
  return waitUntil([&] { return static_cast<std::int32_t>(ptx::loadAcquire(word) - count) >= 0; }, wait);
}

__global__ void __launch_bounds__(kThreads) meetOthers(const __grid_constant__ MeetArgs args) {
  ptx::waitForPreviousLaunch();
  const std::uint32_t count = *args.count + 1;
  const int other = static_cast<int>(threadIdx.x);
  if (other < kMaxNodeRanks && args.theirs[other] != nullptr) {
    ptx::storeRelease(args.theirs[other], count);
    comesTo(args.mine + other, count, args.wait);
  }
  __syncthreads();
  if (other == 0) *args.count = count;
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
int launchTell(const TellArgs& args, void* stream) {
  return launch(tellOthers, args, 1, kThreads, 0, static_cast<cudaStream_t>(stream));
}
int launchAwait(const AwaitArgs& args, void* stream) {
  return launch(awaitOthers, args, 1, kThreads, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace fusco::kernels
