// GPU memory of a communicator, with the host memory that belongs to it: blocks that plans take and give back. Kernels
// that were launched before may still use a block that comes back: it is given out again when they have ended, and when
// the graphs that have captured them are gone.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/workspace.h"
#include "exec/cuda.h"

namespace fusco::engine {

class DevicePool {
 public:
  struct Block {
    std::byte* device = nullptr;
    std::size_t deviceBytes = 0;
    std::byte* host = nullptr;  // pinned, the GPU reads and writes it
    std::size_t hostBytes = 0;
    // Behind what was launched for it, on each stream; and what graphs hold that use it.
    std::vector<std::shared_ptr<exec::cuda::Event>> uses;
    std::weak_ptr<const void> inGraphs;
  };

  DevicePool(int device, Ledger& ledger) : device_(device), ledger_(ledger) {}
  ~DevicePool();
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  // Both parts 256-byte aligned, not zeroed.
  Block take(std::size_t deviceBytes, std::size_t hostBytes);
  // With its uses filled in.
  void giveBack(Block block) noexcept;
  // Frees it, after all that the GPU still does.
  void drop(Block block) noexcept;

 private:
  void free(Block& block) noexcept;

  const int device_;
  Ledger& ledger_;
  std::mutex mutex_;
  std::vector<Block> free_;
};

}  // namespace fusco::engine
