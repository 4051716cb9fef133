// GPU memory of virtual memory management (cuMemCreate, cuMemMap; torch's expandable segments) as other processes reach
// it. It has no CUDA IPC handle: each piece that was mapped has a file descriptor instead. A process that has told of
// such memory answers for it on an abstract Unix socket, by a thread that begins with the first export; whoever has the
// handle, and is the same user, gets the descriptors there and maps the pieces one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "exec/cuda_peer.h"

namespace fusco::exec::cuda {

// False unless all of [pointer, pointer + bytes) is such memory, in pieces that follow each other. Nothing is opened or
// held: the descriptors are made when somebody asks, and only as long as the same pieces lie there.
bool exportVirtual(const void* pointer, std::size_t bytes, Exported& out);
inline constexpr char kVirtualMagic[8] = {'f', 'u', 's', 'c', 'o', 'V', 'M', 'M'};
inline bool isVirtual(const Handle& handle) {
  return std::memcmp(handle.data(), kVirtualMagic, sizeof kVirtualMagic) == 0;
}

// What another process has exported, mapped for the current GPU.
class VirtualMapping {
 public:
  explicit VirtualMapping(const Handle& handle);
  ~VirtualMapping();
  VirtualMapping(const VirtualMapping&) = delete;
  VirtualMapping& operator=(const VirtualMapping&) = delete;
  std::byte* start() const { return reinterpret_cast<std::byte*>(start_); }

 private:
  std::uint64_t start_ = 0;
  std::size_t bytes_ = 0, mapped_ = 0;
};

}  // namespace fusco::exec::cuda
