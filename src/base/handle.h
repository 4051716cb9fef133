// Owners of what the kernel hands out: one owner each, move-only, destructors log and never throw.
#pragma once

#include <cstddef>
#include <utility>

namespace fusco {

// A file descriptor.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) noexcept : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  ~UniqueFd() { reset(); }

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  int release() noexcept { return std::exchange(fd_, -1); }
  void reset(int fd = -1) noexcept;

 private:
  int fd_ = -1;
};

// A range of mmap'ed memory.
class Mapping {
 public:
  Mapping() = default;
  Mapping(void* address, std::size_t bytes) noexcept : address_(address), bytes_(bytes) {}
  Mapping(Mapping&& other) noexcept
      : address_(std::exchange(other.address_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    if (this != &other) {
      reset();
      address_ = std::exchange(other.address_, nullptr);
      bytes_ = std::exchange(other.bytes_, 0);
    }
    return *this;
  }
  ~Mapping() { reset(); }

  // Maps `bytes` of `fd` from `offset`, shared, readable and (if `writable`) writable. Throws Error(systemError).
  static Mapping shared(int fd, std::size_t bytes, std::size_t offset = 0, bool writable = true);
  // Zeroed memory of this process alone. Throws Error(systemError).
  static Mapping anonymous(std::size_t bytes);

  void* data() const noexcept { return address_; }
  std::byte* bytes() const noexcept { return static_cast<std::byte*>(address_); }
  std::size_t size() const noexcept { return bytes_; }
  explicit operator bool() const noexcept { return address_ != nullptr; }
  bool contains(const void* pointer) const noexcept {
    const auto* p = static_cast<const std::byte*>(pointer);
    return p >= bytes() && p < bytes() + bytes_;
  }
  void reset() noexcept;

 private:
  void* address_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace fusco
