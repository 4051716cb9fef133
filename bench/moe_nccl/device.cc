// Which kinds of memory there are, and what they have in common.
#include "moe_nccl/device.h"

namespace fusco::bench::moe {

#ifdef FUSCO_BENCH_CUDA
std::vector<std::string> deviceNames() { return {"host", "cuda"}; }

std::unique_ptr<Device> makeDevice(const std::string& name, const Shape& shape) {
  return name == "cuda" ? makeCudaDevice(shape) : makeHostDevice(shape);
}

void prepareRank(const std::string& name, int rank, int ranks) {
  if (name == "cuda") prepareCudaRank(rank, ranks);
}
#else
std::vector<std::string> deviceNames() { return {"host"}; }

std::unique_ptr<Device> makeDevice(const std::string&, const Shape& shape) { return makeHostDevice(shape); }

void prepareRank(const std::string&, int, int) {}
#endif

void Buffer::grow(std::size_t bytes) {
  if (bytes <= bytes_ && pointer_ != nullptr) return;
  if (pointer_ != nullptr) device_.release(pointer_);
  pointer_ = nullptr;
  pointer_ = device_.allocate(bytes + 64);
  bytes_ = bytes;
}

}  // namespace fusco::bench::moe
