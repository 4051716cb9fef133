// GPU memory that NICs read and write, as transports see it: they know no driver. Whoever makes a communicator on a GPU
// hands one in.
#pragma once

#include <cstddef>
#include <string>

#include "base/handle.h"

namespace fusco::transport {

class GpuMemory {
 public:
  // Before the GPU may read what a NIC wrote: nothing; flush(); or only a read by the NIC would do, which is not built.
  enum class Flush { none, call, impossible };

  virtual ~GpuMemory() = default;
  virtual std::string name() const = 0;  // "GPU 0"
  // Begins at a page of the GPU, and is as many of them as are needed. Throws Error(unhandledCudaError).
  virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void release(std::byte* memory) noexcept = 0;
  // A dmabuf of whole pages of the host; none, and why, where there is none.
  virtual UniqueFd exportPages(std::byte* begin, std::size_t bytes, std::string* why) = 0;
  virtual Flush flushing() const = 0;
  // What NICs have written, as far as its completion was seen, can be read by the GPU when this returns.
  virtual void flush() = 0;
};

// By what the driver says of a GPU: its compute capability's major number, and the values of cudaDevAttrGPUDirectRDMA-
// WritesOrdering and -FlushWritesOptions. From Hopper on the GPU that owns the memory sees writes in order, if the
// driver says so; an older one is flushed whatever it says.
constexpr GpuMemory::Flush flushRule(int major, int writesOrdering, int flushOptions) {
  constexpr int kHopper = 9, kOrderedForOwner = 100, kByHost = 1;
  if (major >= kHopper && writesOrdering >= kOrderedForOwner) return GpuMemory::Flush::none;
  return (flushOptions & kByHost) != 0 ? GpuMemory::Flush::call : GpuMemory::Flush::impossible;
}

}  // namespace fusco::transport
