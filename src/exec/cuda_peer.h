// GPU memory and events as other processes reach them, a stream of the library's own, and copies between layouts of
// rows. Failed calls throw Error(unhandledCudaError); a build without CUDA throws always.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "exec/cuda.h"
#include "kernels/transfer.h"

namespace fusco::exec::cuda {

using Handle = std::array<unsigned char, 64>;

// A stream of the current GPU that waits for no other and is served first.
class OwnStream {
 public:
  OwnStream();
  ~OwnStream();
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  Stream get() const { return stream_; }
  bool drained() const;  // nothing that was launched on it is left

 private:
  Stream stream_ = nullptr;
};

// An event that may be waited for in other processes.
class SharedEvent {
 public:
  explicit SharedEvent(bool betweenProcesses);  // of the current GPU
  explicit SharedEvent(const Handle& handle);   // another process's
  ~SharedEvent();
  SharedEvent(const SharedEvent&) = delete;
  SharedEvent& operator=(const SharedEvent&) = delete;
  Handle handle() const;
  void record(Stream stream);
  void waitOn(Stream stream) const;

 private:
  void* event_ = nullptr;
};

// The allocation that a pointer lies in, as far as the driver tells: bytes is 0 where it does not.
struct Allocation {
  std::uint64_t start = 0;
  std::uint64_t bytes = 0;
  std::uint64_t id = 0;  // never given again in this process; 0: it has none
};
Allocation allocationOf(const void* pointer);
// False for memory that has no such handle: of virtual memory management, of pools, managed, pinned.
bool tryExport(const Allocation& allocation, Handle& handle);

// An allocation of another process, mapped for the current GPU as long as anyone holds it. A process maps it once for each
// GPU, whoever asks. It is unmapped before its time when its owner shows a younger allocation at the same addresses: the
// driver maps no two, and nobody may use the old one any more.
struct Foreign {
  Handle handle;
  std::uint64_t process[2];  // whose it is
  std::uint64_t start;       // where it begins there
  std::uint64_t bytes;       // of it, as far as known
};
class Imported {
 public:
  explicit Imported(const Foreign& foreign);
  ~Imported();
  Imported(const Imported&) = delete;
  Imported& operator=(const Imported&) = delete;
  std::byte* start() const;
  bool unmapped() const;

 private:
  struct Mapping;
  struct Mappings;
  std::shared_ptr<Mapping> mapping_;
};

// Kernel of kernels/transfer.h: one launch for each kMaxCopies of them.
void copyRows(const kernels::RowCopy* copies, std::size_t count, const kernels::Budget& budget, Stream stream);

}  // namespace fusco::exec::cuda
