#include "engine/device/memory.h"

#include <algorithm>
#include <utility>

#include "base/log.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {
std::size_t rounded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
}  // namespace

DevicePool::~DevicePool() {
  for (Block& block : free_) free(block);
}

void DevicePool::free(Block& block) noexcept {
  try {
    const cuda::OnDevice on(device_);
    block.uses.clear();
    cuda::release(block.device);
    cuda::releasePinned(block.host);
  } catch (const std::exception& e) {
    FUSCO_WARN("GPU memory of a communicator could not be freed: {}", e.what());
  }
  ledger_.bytes -= block.deviceBytes + block.hostBytes;
}

DevicePool::Block DevicePool::take(std::size_t deviceBytes, std::size_t hostBytes) {
  deviceBytes = rounded(deviceBytes);
  hostBytes = rounded(hostBytes);
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < free_.size(); ++i) {
      const Block& candidate = free_[i];
      const auto fits = [](std::size_t has, std::size_t wanted) { return has >= wanted && has <= 2 * wanted; };
      if (!fits(candidate.deviceBytes, deviceBytes) || !fits(candidate.hostBytes, hostBytes)) continue;
      const auto ended = [](const auto& use) { return use->reached(); };
      if (!candidate.inGraphs.expired() || !std::all_of(candidate.uses.begin(), candidate.uses.end(), ended)) continue;
      Block block = std::move(free_[i]);
      block.uses.clear();
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
      return block;
    }
  }
  Block block;
  block.device = static_cast<std::byte*>(cuda::allocate(deviceBytes));
  block.deviceBytes = deviceBytes;
  block.host = static_cast<std::byte*>(cuda::allocatePinned(hostBytes));
  block.hostBytes = hostBytes;
  ledger_.bytes += deviceBytes + hostBytes;
  return block;
}

void DevicePool::giveBack(Block block) noexcept {
  if (block.device == nullptr) return;
  std::lock_guard lock(mutex_);
  free_.push_back(std::move(block));
}

void DevicePool::drop(Block block) noexcept {
  if (block.device != nullptr) free(block);
}

}  // namespace fusco::engine
