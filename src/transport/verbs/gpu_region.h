// Registration of GPU memory with a NIC: by dmabuf, else by peermem.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "transport/gpu_memory.h"
#include "transport/verbs/library.h"

namespace fusco::transport {

struct GpuRegion {
  ibv_mr* region = nullptr;
  std::string by;   // "dmabuf" or "peermem"; "" without a region
  std::string why;  // not by those that come before
};

// Keys are for the addresses that the GPU has. Nothing but the region is left behind.
GpuRegion registerGpuMemory(const VerbsLibrary& verbs, ibv_pd* domain, GpuMemory& gpu, std::byte* address,
                            std::size_t bytes, int access);

// Slices arrive in order, and a flush is for all that have arrived until then.
class ArrivalFlush {
 public:
  // Whether to flush before slice `sequence` is read, of `arrived` that have come.
  bool wanted(std::uint64_t sequence, std::uint64_t arrived) {
    if (sequence < covered_) return false;
    covered_ = arrived;
    return true;
  }

 private:
  std::uint64_t covered_ = 0;
};

}  // namespace fusco::transport
