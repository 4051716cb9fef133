#include "shuffle/cuda/world.h"

#include <fmt/format.h>

#include <stdexcept>

namespace fusco::bench::gpu {

namespace {

void letReach(int gpu, int other) {
  int can = 0;
  FUSCO_BENCH_CUDA(cudaDeviceCanAccessPeer(&can, gpu, other));
  if (can == 0)
    throw std::runtime_error(
        fmt::format("GPU {} cannot reach the memory of GPU {}: --gpus 1 measures one", gpu, other));
  const OnGpu on(gpu);
  const cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled)
    cudaGetLastError();
  else
    FUSCO_BENCH_CUDA(error);
}

void after(std::vector<Event>& events, const std::vector<Stream>& streams, const Stream& lead) {
  for (std::size_t i = 0; i < streams.size(); ++i) {
    if (streams[i].get() == lead.get()) continue;
    events[i].record(streams[i]);
    events[i].waitOn(lead);
  }
}

}  // namespace

World::World(int ranks, int gpus) : ranks_(ranks), gpus_(gpusFor(gpus, gpusPresent(), ranks)) {
  FUSCO_BENCH_CUDA(cudaDeviceGetAttribute(&sms_, cudaDevAttrMultiProcessorCount, 0));
  for (int gpu = 0; gpu < gpus_; ++gpu) {
    for (int other = 0; other < gpus_; ++other)
      if (other != gpu) letReach(gpu, other);
    ofGpu_.emplace_back(gpu);
    gpuEvents_.emplace_back(gpu);
  }
  for (int rank = 0; rank < ranks_; ++rank) {
    ofRank_.emplace_back(gpuOf(rank));
    rankEvents_.emplace_back(gpuOf(rank));
  }
}

Workers& World::workers() {
  if (!workers_) workers_ = std::make_unique<Workers>(ranks_);
  return *workers_;
}

void World::forkGpus() {
  if (gpus_ == 1) return;
  gpuEvents_[0].record(lead());
  for (int gpu = 1; gpu < gpus_; ++gpu) gpuEvents_[0].waitOn(ofGpu(gpu));
}

void World::joinGpus() { after(gpuEvents_, ofGpu_, lead()); }

void World::meetGpus() {
  if (gpus_ == 1) return;
  for (int gpu = 0; gpu < gpus_; ++gpu) gpuEvents_[static_cast<std::size_t>(gpu)].record(ofGpu(gpu));
  for (int gpu = 0; gpu < gpus_; ++gpu)
    for (int other = 0; other < gpus_; ++other)
      if (other != gpu) gpuEvents_[static_cast<std::size_t>(other)].waitOn(ofGpu(gpu));
}

void World::forkRanks() {
  gpuEvents_[0].record(lead());
  for (int rank = 0; rank < ranks_; ++rank) gpuEvents_[0].waitOn(ofRank(rank));
}

void World::joinRanks() { after(rankEvents_, ofRank_, lead()); }

void World::synchronize() {
  for (const Stream& stream : ofRank_) FUSCO_BENCH_CUDA(cudaStreamSynchronize(stream.get()));
  for (const Stream& stream : ofGpu_) FUSCO_BENCH_CUDA(cudaStreamSynchronize(stream.get()));
}

std::size_t World::freeBytes(int gpu) const {
  const OnGpu on(gpu);
  std::size_t free = 0, total = 0;
  FUSCO_BENCH_CUDA(cudaMemGetInfo(&free, &total));
  return free;
}

}  // namespace fusco::bench::gpu
