// Memory that processes of one machine share: a sealed memfd, paid for when it is made, so that no later touch can
// fail.
#pragma once

#include <cstddef>

#include "base/handle.h"

namespace fusco::transport {

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  ~SharedMemory();

  // Zeroed memory behind a new memfd, all pages present. systemError says what is needed and what there is.
  static SharedMemory create(const char* name, std::size_t bytes);
  // The same without a descriptor: for ranks that are threads of one process.
  static SharedMemory anonymous(std::size_t bytes);
  // Maps the first `bytes` of a peer's memfd. Refuses one that is shorter or could be cut later.
  static SharedMemory attach(int descriptor, std::size_t bytes);

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  int descriptor() const { return descriptor_.get(); }
  // The memory stays; it can be passed to nobody else.
  void forgetDescriptor() { descriptor_.reset(); }
  // Brings all pages into this process's page table, so that the first copy pays for no faults. Best effort.
  void populate() const;
  // Gives the pages back at once, whoever still maps them.
  void discard() const;

 private:
  void map(int descriptor, bool hugeWanted);
  void unmap();

  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  UniqueFd descriptor_;
};

// Memory that the machine (or this container) could still give, in bytes.
std::size_t availableMemory();

}  // namespace fusco::transport
