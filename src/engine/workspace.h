// Memory that the library holds beyond the caller's tensors: counted, and taken from the caller's allocator where one
// is given.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>

namespace fusco::engine {

struct Allocator {
  void* (*allocate)(std::size_t bytes, std::size_t alignment, void* context) = nullptr;
  void (*release)(void* pointer, std::size_t bytes, void* context) = nullptr;
  void* context = nullptr;
};

// Bytes held by a communicator and its plans.
struct Ledger {
  std::atomic<std::uint64_t> bytes{0};
  std::mutex allocating;  // the caller's allocator is never called by two threads at once
};

// A private buffer, 64-byte aligned, that only grows. Contents are lost when it grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Allocator* allocator, Ledger* ledger) : allocator_(allocator), ledger_(ledger) {}
  ~Buffer() { clear(); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  // Throws systemError when memory is short.
  std::byte* need(std::size_t bytes);
  std::byte* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::size_t size() const { return size_; }
  void clear();

 private:
  void swap(Buffer& other) noexcept {
    std::swap(allocator_, other.allocator_);
    std::swap(ledger_, other.ledger_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  const Allocator* allocator_ = nullptr;
  Ledger* ledger_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// A library-owned window (memory that the node's ranks can map) that only grows.
class WindowBuffer {
 public:
  WindowBuffer() = default;
  explicit WindowBuffer(Ledger* ledger) : ledger_(ledger) {}
  ~WindowBuffer() { clear(); }
  WindowBuffer(WindowBuffer&& other) noexcept { swap(other); }
  WindowBuffer& operator=(WindowBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  std::byte* need(std::size_t bytes);
  std::byte* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::size_t size() const { return size_; }
  void clear();

 private:
  void swap(WindowBuffer& other) noexcept {
    std::swap(ledger_, other.ledger_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  Ledger* ledger_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace fusco::engine
