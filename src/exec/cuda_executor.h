// The executor of rows in GPU memory for operations that the host drives: each call becomes copies of its lists and one
// kernel on a stream of this executor, and returns when it is launched.
#pragma once

#include <atomic>
#include <map>
#include <memory>

#include "exec/cuda.h"
#include "exec/cuda_peer.h"
#include "exec/executor.h"

namespace fusco::exec {

class CudaExecutor final : public Executor {
 public:
  // `held` counts the bytes that it has allocated.
  CudaExecutor(int device, int maxSms, std::atomic<std::uint64_t>& held);
  ~CudaExecutor() override;
  CudaExecutor(const CudaExecutor&) = delete;
  CudaExecutor& operator=(const CudaExecutor&) = delete;

  void place(const PlaceArgs& args) override;
  void sum(const SumArgs& args) override;
  // The products are there when it returns.
  void back(const BackArgs& args) override;
  void cast(const CastArgs& args) override;
  void move(const MoveArgs& args) override;
  void fill(void* address, std::size_t bytes) override;
  void fence() override;
  const char* name() const override { return "cuda"; }
  bool defers() const override { return true; }
  Passage& passage(std::uint64_t number) override;

  // In the order of the calls.
  void copy(void* to, const void* from, std::size_t bytes);
  void copyRows(const kernels::RowCopy& rows);

  // Library memory that passages lead to: between it and the GPU bytes go straight, if it can be pinned. Memory of the
  // GPU is where calls read and write by themselves.
  void adopt(void* memory, std::size_t bytes);
  bool adopted(const void* memory) const { return rangeOf(memory) != nullptr; }

 private:
  enum class Kind { ordinary, pinned, device };
  struct Range {
    std::size_t bytes;
    Kind kind;
  };
  const Range* rangeOf(const void* memory) const;
  Kind kindOf(const void* memory) const {
    const Range* range = rangeOf(memory);
    return range == nullptr ? Kind::ordinary : range->kind;
  }
  std::map<std::uintptr_t, Range> adopted_;  // by start

  class CudaPassage;
  class Lists;

  void needDevice(std::byte*& memory, std::size_t& has, std::size_t bytes);
  void needPinned(std::byte*& memory, std::size_t& has, std::size_t bytes);
  void releaseDevice(std::byte*& memory, std::size_t& has) noexcept;
  void releasePinned(std::byte*& memory, std::size_t& has) noexcept;
  kernels::PlaceArgs placeArgs(const PlaceArgs& args, Lists& lists);

  const int device_;
  const kernels::Budget budget_;
  std::atomic<std::uint64_t>& held_;
  std::unique_ptr<cuda::OwnStream> stream_;
  // Lists of calls: one half is written while the GPU may still read the other.
  struct Half {
    std::byte* pinned = nullptr;
    std::byte* device = nullptr;  // what is written into the one is brought to the other
    std::size_t pinnedBytes = 0, deviceBytes = 0;
    std::unique_ptr<cuda::Event> used;
    bool inUse = false;
  };
  Half halves_[2];
  int half_ = 0;
  std::size_t at_ = 0;
  std::map<std::uint64_t, std::unique_ptr<CudaPassage>> passages_;
};

}  // namespace fusco::exec
