// What a layer does to memory beside its calls of NCCL. Another kind of memory is another implementation of this; the
// layers stay as they are. Pointers are to the device's memory unless they say host; calls are ordered by stream().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fusco/nccl.h"

namespace fusco::bench::moe {

struct Shape {
  int rank = 0, ranks = 1;
  std::int64_t tokens = 0, hidden = 0;
  int topk = 1, experts = 1, inner = 0;
  std::uint64_t seed = 1;
  int firstExpert = 0, localExperts = 0;
  std::size_t rowBytes() const { return static_cast<std::size_t>(hidden) * 2; }
  std::int64_t slots() const { return tokens * topk; }
};

// Rows of a tensor that stay together.
struct Chunk {
  std::int64_t from, to, rows;
};

// The slots of a rank's tokens by expert, then token, then slot: what a framework's router makes. A slot is token x
// topk + k.
struct SortedSlots {
  std::int64_t* counts;     // [experts] slots of each
  std::int64_t* order;      // [slots] which slot is at each place; places beyond the routed slots are not written
  std::int64_t* tokenOf;    // [slots] its token
  std::int64_t* sumPlaces;  // [tokens, topk] places of a token's slots by rank of the expert, then slot; then -1
  std::int64_t* sumSlots;   // [tokens, topk] the slots themselves in that order; then -1
};

class Device {
 public:
  virtual ~Device() = default;
  virtual cudaStream_t stream() = 0;
  // As users have it: ncclMemAlloc on the host, what frameworks' allocators take from on a GPU.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  // Until all that was issued is done.
  virtual void wait() = 0;
  virtual void toDevice(void* to, const void* fromHost, std::size_t bytes) = 0;
  virtual void toHost(void* toHost, const void* from, std::size_t bytes) = 0;

  virtual void sortSlots(const std::int64_t* ids, const SortedSlots& sorted) = 0;
  // to[i] = from[index[i]]: the permute.
  virtual void gatherRows(void* to, const void* from, const std::int64_t* index, std::int64_t rows) = 0;
  // The sort of rows that come in as chunks, and back. `chunksHost` in host memory.
  virtual void moveChunks(void* to, const void* from, const std::vector<Chunk>& chunksHost) = 0;
  // y[t] = sum over k of weights[slots[t, k]] * rows[places[t, k]] in FP32, in that order: the unpermute.
  virtual void weightedSum(void* y, const void* rows, const std::int64_t* places, const std::int64_t* slots,
                           const float* weights) = 0;
  // Row by row; starts [localExperts + 1] in host memory: the first row of each of this rank's experts.
  virtual void experts(const void* rows, void* results, const std::int64_t* startsHost) = 0;
};

std::vector<std::string> deviceNames();
std::unique_ptr<Device> makeDevice(const std::string& name, const Shape& shape);
// Before a rank asks anything of NCCL: ranks that have to share a GPU get what NCCL takes that by.
void prepareRank(const std::string& name, int rank, int ranks);

// The kinds. That of GPUs is there where CUDA is.
std::unique_ptr<Device> makeHostDevice(const Shape& shape);
std::unique_ptr<Device> makeCudaDevice(const Shape& shape);
void prepareCudaRank(int rank, int ranks);

// Memory of a device, which outlives it.
class Buffer {
 public:
  explicit Buffer(Device& device, std::size_t bytes = 0) : device_(device) {
    if (bytes > 0) grow(bytes);
  }
  ~Buffer() {
    if (pointer_ != nullptr) device_.release(pointer_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  // At least that large from now on; what was in it is lost when it grows.
  void grow(std::size_t bytes);
  std::byte* bytes() const { return static_cast<std::byte*>(pointer_); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(pointer_);
  }

 private:
  Device& device_;
  void* pointer_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace fusco::bench::moe
