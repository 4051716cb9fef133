#include "engine/device/nic_memory.h"

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "base/log.h"
#include "exec/cuda.h"
#include "exec/cuda_nic.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {

// What is registered begins and ends with a page of the GPU, so that nobody else's memory is opened to a NIC.
constexpr std::size_t kGpuPage = 65536;

class NicMemory final : public transport::GpuMemory {
 public:
  explicit NicMemory(int device) : device_(device) {
    const cuda::OnDevice on(device_);
    const cuda::NicWrites said = cuda::nicWrites();
    flushing_ = transport::flushRule(said.major, said.ordering, said.flushOptions);
  }

  std::string name() const override { return "GPU " + std::to_string(device_); }
  std::byte* allocate(std::size_t bytes) override {
    const cuda::OnDevice on(device_);
    void* const whole = cuda::allocate((bytes + kGpuPage - 1) / kGpuPage * kGpuPage + kGpuPage);
    const auto at = (reinterpret_cast<std::uintptr_t>(whole) + kGpuPage - 1) / kGpuPage * kGpuPage;
    const std::lock_guard lock(mutex_);
    allocations_[at] = whole;
    return reinterpret_cast<std::byte*>(at);
  }
  void release(std::byte* memory) noexcept override {
    try {
      const cuda::OnDevice on(device_);
      const std::lock_guard lock(mutex_);
      const auto found = allocations_.find(reinterpret_cast<std::uintptr_t>(memory));
      cuda::release(found->second);
      allocations_.erase(found);
    } catch (const std::exception& e) {
      FUSCO_WARN("memory of {} that a NIC knew could not be freed: {}", name(), e.what());
    }
  }
  UniqueFd exportPages(std::byte* begin, std::size_t bytes, std::string* why) override {
    const cuda::OnDevice on(device_);
    return UniqueFd(cuda::exportDmaBuf(begin, bytes, why));
  }
  Flush flushing() const override { return flushing_; }
  void flush() override {
    const cuda::OnDevice on(device_);
    cuda::flushNicWrites();
  }

 private:
  const int device_;
  Flush flushing_ = Flush::impossible;
  std::mutex mutex_;
  std::map<std::uintptr_t, void*> allocations_;  // by where what was handed out begins
};

}  // namespace

std::shared_ptr<transport::GpuMemory> nicMemory(int device) { return std::make_shared<NicMemory>(device); }

}  // namespace fusco::engine
