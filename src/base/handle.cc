#include "base/handle.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "base/status.h"

namespace fusco {
namespace {

Mapping map(int fd, std::size_t bytes, std::size_t offset, int protection, int flags) {
  void* address = mmap(nullptr, bytes, protection, flags, fd, static_cast<off_t>(offset));
  if (address == MAP_FAILED) failErrno("mapping " + std::to_string(bytes) + " bytes");
  return Mapping(address, bytes);
}

}  // namespace

void UniqueFd::reset(int fd) noexcept {
  const int old = std::exchange(fd_, fd);
  // On Linux the descriptor is gone even after EINTR.
  if (old >= 0 && close(old) != 0 && errno != EINTR) {
    FUSCO_WARN("closing descriptor {}: {}", old, std::strerror(errno));
  }
}

Mapping Mapping::shared(int fd, std::size_t bytes, std::size_t offset, bool writable) {
  return map(fd, bytes, offset, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED);
}

Mapping Mapping::anonymous(std::size_t bytes) {
  return map(-1, bytes, 0, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS);
}

void Mapping::reset() noexcept {
  void* address = std::exchange(address_, nullptr);
  const std::size_t bytes = std::exchange(bytes_, 0);
  if (address != nullptr && munmap(address, bytes) != 0) {
    FUSCO_WARN("unmapping {} bytes: {}", bytes, std::strerror(errno));
  }
}

}  // namespace fusco
