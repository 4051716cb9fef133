// The GPUs of a run, with a stream for each and for each rank.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "shuffle/cuda/deal.h"
#include "shuffle/cuda/device.h"

namespace fusco::bench::gpu {

class World {
 public:
  // Throws where there is no GPU, or GPUs that cannot reach each other.
  World(int ranks, int gpus);

  int ranks() const { return ranks_; }
  int gpus() const { return gpus_; }
  int gpuOf(int rank) const { return gpuOfRank(rank, ranks_, gpus_); }
  // On GPU 0: begins and ends what is timed.
  const Stream& lead() const { return ofGpu_[0]; }
  const Stream& ofGpu(int gpu) const { return ofGpu_[static_cast<std::size_t>(gpu)]; }
  const Stream& ofRank(int rank) const { return ofRank_[static_cast<std::size_t>(rank)]; }
  int sms() const { return sms_; }
  Workers& workers();

  // The streams of all GPUs (or ranks) come after what is on the lead, and the lead after them.
  void forkGpus();
  void joinGpus();
  // The streams of all GPUs come after each other's work.
  void meetGpus();
  void forkRanks();
  void joinRanks();
  void synchronize();

  std::size_t freeBytes(int gpu) const;

 private:
  int ranks_, gpus_;
  int sms_ = 0;
  std::vector<Stream> ofGpu_, ofRank_;
  std::vector<Event> gpuEvents_, rankEvents_;
  std::unique_ptr<Workers> workers_;
};

}  // namespace fusco::bench::gpu
