// Plans of a made-up world, made on the GPU, and held against those that the host makes.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/plan.h"
#include "plan/world.h"

namespace fusco::kernels::testing {

inline void check(int error, const char* what) {
  if (error == 0) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// Memory on the GPU. Fresh memory holds 0xab, so that what is not written shows.
class GpuMemory {
 public:
  explicit GpuMemory(std::size_t bytes, int fill = 0xab) : bytes_(bytes) {
    check(cudaMalloc(&address_, bytes + kGuard), "cudaMalloc");
    check(cudaMemset(address_, fill, bytes + kGuard), "cudaMemset");
    check(cudaMemset(static_cast<char*>(address_) + bytes, kGuardFill, kGuard), "cudaMemset");
  }
  GpuMemory(const void* from, std::size_t bytes) : GpuMemory(bytes) { put(from, bytes); }
  GpuMemory(GpuMemory&& other) noexcept : address_(other.address_), bytes_(other.bytes_) { other.address_ = nullptr; }
  GpuMemory& operator=(GpuMemory&&) = delete;
  ~GpuMemory() { cudaFree(address_); }

  void* get() const { return address_; }
  std::size_t bytes() const { return bytes_; }
  void put(const void* from, std::size_t bytes) {
    if (bytes > 0) check(cudaMemcpy(address_, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<char> read() const {
    std::vector<char> host(bytes_);
    if (bytes_ > 0) check(cudaMemcpy(host.data(), address_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }
  // Whether nobody has written behind the end.
  bool isWhole() const {
    unsigned char guard[kGuard];
    check(cudaMemcpy(guard, static_cast<char*>(address_) + bytes_, kGuard, cudaMemcpyDeviceToHost), "cudaMemcpy");
    for (const unsigned char byte : guard) {
      if (byte != kGuardFill) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 256;
  static constexpr int kGuardFill = 0x5c;
  void* address_ = nullptr;
  std::size_t bytes_;
};

enum class Way {
  whole,      // launchPlan for all ranks
  together,   // counted and laid in launches of all ranks
  apart,      // in launches of one rank each, as on GPUs of their own
  laidApart,  // counted in launches of all ranks, laid in launches of one
  brought,    // counted; then `before` and `total` come from the host
};

// Memory for the plans of all ranks of worlds of one shape; made once, used for any number of routing maps.
class GpuPlans {
 public:
  // Arenas for at most `capacity` tokens a rank; the number of tokens of a step is read from device memory. -1: for the
  // tokens of the world, which the kernels know.
  GpuPlans(const plan::testing::World& world, std::int64_t capacity, int blocks);

  // Copies routing maps, weights and numbers of tokens to the GPU.
  void bring(const plan::testing::World& world);
  void plan(Way way, cudaStream_t stream = nullptr);
  // What is wrong with the plan of a rank; empty if nothing is. `expected`: the host's arena.
  std::string difference(int rank, const void* expected, std::size_t expectedBytes) const;
  PlanStatus status(int rank) const;
  plan::ArenaHeader header(int rank) const;
  PlanArgs& args(int first) { return launches_[first]; }  // of the ranks first, first + 1, ... of a launch
  int launches() const { return static_cast<int>(launches_.size()); }

 private:
  struct Rank {
    GpuMemory ids, weights, tokens, arena, frame, homes, flows, counts, scratch, status, exchanged;
    std::int64_t capacity;
  };
  std::vector<Rank> ranks_;
  std::vector<PlanArgs> launches_;
  std::vector<GpuMemory> tables_;
};

// The host's plan of each rank; ids out of range must have been replaced.
std::vector<plan::testing::Arena> hostPlans(const plan::testing::World& world);
std::vector<plan::Exchanged> exchange(const plan::testing::World& world);

// Rows enough for many chunks and tiles; `size` bounds the slots of a rank. Keeps everything but ids and weights if
// `like` is given.
plan::testing::World makeWorld(std::mt19937& random, int size, const plan::testing::World* like = nullptr);

bool hasGpu();

}  // namespace fusco::kernels::testing
