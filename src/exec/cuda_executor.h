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

 private:
  class CudaPassage;
  class Lists;

  // Pinned memory and as much of the GPU's: what is written into the one is brought to the other.
  struct Twin {
    std::byte* pinned = nullptr;
    std::byte* device = nullptr;
    std::size_t bytes = 0;
  };
  void need(Twin& twin, std::size_t bytes);
  void release(Twin& twin) noexcept;
  kernels::PlaceArgs placeArgs(const PlaceArgs& args, Lists& lists);

  const int device_;
  const kernels::Budget budget_;
  std::atomic<std::uint64_t>& held_;
  std::unique_ptr<cuda::OwnStream> stream_;
  // Lists of calls: one half is written while the GPU may still read the other.
  struct Half {
    Twin memory;
    std::unique_ptr<cuda::Event> used;
    bool inUse = false;
  };
  Half halves_[2];
  int half_ = 0;
  std::size_t at_ = 0;
  std::map<std::uint64_t, std::unique_ptr<CudaPassage>> passages_;
};

}  // namespace fusco::exec
