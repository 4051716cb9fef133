// A GPU that is made of host memory and functions, in place of exec/cuda.cc and exec/cuda_peer.cc: whoever links it has
// communicators "on a GPU" on any machine. It shows what does not depend on kernels: who reads and writes which memory,
// when, and who waits for what.
//
//   memory    the host cannot touch it: addresses of the GPU are mapped without access, calls use a second mapping
//   streams   do nothing by themselves: an operation runs when somebody waits for it, or asks whether it has ended
//   kernels   what the engine launches for ranks on several nodes, by the host's scalar executor
#pragma once

#include <set>
#include <utility>

#include "exec/cuda_nic.h"
#include "exec/cuda_peer.h"
#include "shuffle/case.h"

namespace fusco::test {

// What a NIC needs of the stand-in: its own way to this address of GPU memory, null for other memory; and what it says
// of itself.
std::byte* shadowOf(const void* address);
void sayOfNicWrites(const exec::cuda::NicWrites& said);
int nicWritesFlushed();  // how often

// It is as many GPUs as are named. As cudaSetDevice, for this thread.
void useGpu(int device);
// Between which of them there is no path, as pairs of who reads and writes and whose memory; by default none are such.
void sayNoPath(std::set<std::pair<int, int>> fromTo);

// Tensors in the stand-in's memory.
class StandInSpace : public Space {
 public:
  void* allocate(std::size_t bytes, bool isPrivate) override;
  void release(void* pointer, bool isPrivate) override;
  cudaStream_t stream() override { return static_cast<cudaStream_t>(stream_.get()); }
  void settle() override;
  void read(void* to, const void* from, std::size_t bytes) override;
  void write(void* to, const void* from, std::size_t bytes) override;
  bool direct() const override { return false; }
  bool gpu() const override { return true; }

 private:
  exec::cuda::OwnStream stream_;
};

}  // namespace fusco::test
