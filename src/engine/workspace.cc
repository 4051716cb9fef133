#include "engine/workspace.h"

#include <fmt/format.h>

#include <cstdlib>
#include <new>

#include "base/status.h"
#include "comm/fabric.h"

namespace fusco::engine {

std::byte* Buffer::need(std::size_t bytes) {
  if (bytes <= size_) return data_;
  clear();
  const std::size_t size = (bytes + 63) & ~std::size_t{63};
  void* p = nullptr;
  if (allocator_ != nullptr && allocator_->allocate != nullptr) {
    std::lock_guard lock(ledger_->allocating);
    p = allocator_->allocate(size, 64, allocator_->context);
  } else {
    p = std::aligned_alloc(64, size);
  }
  if (p == nullptr) {
    fail(Code::systemError,
         fmt::format("memory is short: the library needs {} bytes of workspace; free some, or make the plan smaller",
                     size));
  }
  data_ = static_cast<std::byte*>(p);
  size_ = size;
  if (ledger_ != nullptr) ledger_->bytes += size_;
  return data_;
}

void Buffer::clear() {
  if (data_ == nullptr) return;
  if (allocator_ != nullptr && allocator_->release != nullptr) {
    std::lock_guard lock(ledger_->allocating);
    allocator_->release(data_, size_, allocator_->context);
  } else {
    std::free(data_);
  }
  if (ledger_ != nullptr) ledger_->bytes -= size_;
  data_ = nullptr;
  size_ = 0;
}

std::byte* WindowBuffer::need(std::size_t bytes) {
  if (bytes <= size_) return data_;
  clear();
  const std::size_t size = (bytes + 4095) & ~std::size_t{4095};
  data_ = static_cast<std::byte*>(comm::windowAllocate(size));
  size_ = size;
  if (ledger_ != nullptr) ledger_->bytes += size_;
  return data_;
}

void WindowBuffer::clear() {
  if (data_ == nullptr) return;
  comm::windowFree(data_);
  if (ledger_ != nullptr) ledger_->bytes -= size_;
  data_ = nullptr;
  size_ = 0;
}

}  // namespace fusco::engine
