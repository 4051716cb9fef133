// The layer's own passes on a GPU: whole rows by 16 bytes where they allow it, each pass one launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "moe_nccl/device.h"
#include "moe_nccl/expert_host.h"

namespace fusco::bench::moe {

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#define CUDA(call) check((call), #call)

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kMostSlots = 64;

__device__ float fromBf16(std::uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
__device__ std::uint16_t toBf16(float value) {
  const unsigned bits = __float_as_uint(value);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// A block copies `bytes`, by 16 where addresses and length allow it, else by 2.
__device__ void copyByBlock(std::byte* to, const std::byte* from, std::size_t bytes) {
  const auto bits = reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from) | bytes;
  if (bits % 16 == 0) {
    for (std::size_t i = threadIdx.x; i < bytes / 16; i += blockDim.x)
      __stcs(reinterpret_cast<uint4*>(to) + i, __ldcs(reinterpret_cast<const uint4*>(from) + i));
  } else {
    for (std::size_t i = threadIdx.x; i < bytes / 2; i += blockDim.x)
      reinterpret_cast<std::uint16_t*>(to)[i] = reinterpret_cast<const std::uint16_t*>(from)[i];
  }
}

// One block for each expert: how many slots it has.
__global__ void countSlots(const std::int64_t* ids, std::int64_t slots, std::int64_t* counts) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  int mine = 0;
  for (std::int64_t i = threadIdx.x; i < slots; i += blockDim.x) mine += ids[i] == blockIdx.x ? 1 : 0;
  atomicAdd(&sum, mine);
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

// One block for each expert: its slots in order, behind those of the experts before it.
__global__ void placeSlots(const std::int64_t* ids, std::int64_t slots, int topk, SortedSlots sorted) {
  __shared__ std::int64_t before[kThreads];
  __shared__ int ofWarp[kThreads / kWarp];
  std::int64_t sum = 0;
  for (unsigned e = threadIdx.x; e < blockIdx.x; e += kThreads) sum += sorted.counts[e];
  before[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) before[threadIdx.x] += before[threadIdx.x + half];
    __syncthreads();
  }
  std::int64_t next = before[0];
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (std::int64_t first = 0; first < slots; first += kThreads) {
    const std::int64_t slot = first + threadIdx.x;
    const bool ours = slot < slots && ids[slot] == blockIdx.x;
    const unsigned votes = __ballot_sync(0xffffffffu, ours);
    if (lane == 0) ofWarp[warp] = __popc(votes);
    __syncthreads();
    int place = __popc(votes & ((1u << lane) - 1)), all = 0;
    for (unsigned w = 0; w < kThreads / kWarp; ++w) {
      place += w < warp ? ofWarp[w] : 0;
      all += ofWarp[w];
    }
    if (ours) {
      sorted.order[next + place] = slot;
      sorted.tokenOf[next + place] = slot / topk;
      sorted.sumPlaces[slot] = next + place;
    }
    next += all;
    __syncthreads();
  }
}

// As routing.h has it.
__device__ int rankOfExpertHere(int expert, int ranks, int experts) {
  const int small = experts / ranks, larger = experts % ranks;
  if (expert < larger * (small + 1)) return expert / (small + 1);
  return larger + (expert - larger * (small + 1)) / small;
}

// One thread for each token: its slots by rank of the expert, then slot.
__global__ void orderSums(const std::int64_t* ids, std::int64_t tokens, int topk, int ranks, int experts,
                          SortedSlots sorted) {
  const std::int64_t token = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x;
  if (token >= tokens) return;
  std::int64_t places[kMostSlots], slotsOf[kMostSlots];
  int rankOf[kMostSlots], count = 0;
  for (std::int64_t slot = token * topk; slot < (token + 1) * topk; ++slot) {
    if (ids[slot] < 0) continue;
    const int rank = rankOfExpertHere(static_cast<int>(ids[slot]), ranks, experts);
    int at = count++;
    for (; at > 0 && rankOf[at - 1] > rank; --at) {
      rankOf[at] = rankOf[at - 1];
      slotsOf[at] = slotsOf[at - 1];
      places[at] = places[at - 1];
    }
    rankOf[at] = rank;
    slotsOf[at] = slot;
    places[at] = sorted.sumPlaces[slot];
  }
  for (int k = 0; k < topk; ++k) {
    sorted.sumPlaces[token * topk + k] = k < count ? places[k] : -1;
    sorted.sumSlots[token * topk + k] = k < count ? slotsOf[k] : -1;
  }
}

__global__ void gather(std::byte* to, const std::byte* from, const std::int64_t* index, std::size_t rowBytes) {
  const std::size_t row = blockIdx.x;
  copyByBlock(to + row * rowBytes, from + static_cast<std::size_t>(index[row]) * rowBytes, rowBytes);
}

// blockIdx.y: the chunk, whose rows blocks take in turns.
__global__ void copyChunks(std::byte* to, const std::byte* from, const Chunk* chunks, std::size_t rowBytes) {
  const Chunk chunk = chunks[blockIdx.y];
  for (std::int64_t row = blockIdx.x; row < chunk.rows; row += gridDim.x) {
    copyByBlock(to + static_cast<std::size_t>(chunk.to + row) * rowBytes,
                from + static_cast<std::size_t>(chunk.from + row) * rowBytes, rowBytes);
  }
}

template <typename Vector>
__global__ void sumWeighted(std::uint16_t* y, const std::uint16_t* rows, const std::int64_t* places,
                            const std::int64_t* slots, const float* weights, std::int64_t hidden, int topk) {
  constexpr int kCount = sizeof(Vector) / 2;
  __shared__ std::int64_t row[kMostSlots];
  __shared__ float weight[kMostSlots];
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * topk;
  if (threadIdx.x < topk) {
    const std::int64_t slot = slots[first + threadIdx.x];
    row[threadIdx.x] = slot < 0 ? -1 : places[first + threadIdx.x];
    weight[threadIdx.x] = slot < 0 ? 0.0f : weights[slot];
  }
  __syncthreads();
  union Elements {
    Vector whole;
    std::uint16_t each[kCount];
  };
  for (std::int64_t at = threadIdx.x; at < hidden / kCount; at += blockDim.x) {
    float sum[kCount] = {};
    for (int k = 0; k < topk && row[k] >= 0; ++k) {
      Elements term;
      term.whole = __ldcs(reinterpret_cast<const Vector*>(rows + row[k] * hidden) + at);
      for (int i = 0; i < kCount; ++i) sum[i] = fmaf(weight[k], fromBf16(term.each[i]), sum[i]);
    }
    Elements out;
    for (int i = 0; i < kCount; ++i) out.each[i] = toBf16(sum[i]);
    __stcs(reinterpret_cast<Vector*>(y + blockIdx.x * hidden) + at, out.whole);
  }
}

// One block for each row, so that a row's result does not depend on where it lies. The row stays in shared memory.
__global__ void runExperts(const std::uint16_t* rows, std::uint16_t* results, const std::int64_t* starts,
                           int localExperts, int firstExpert, const float* in, const float* out, int inner,
                           std::int64_t hidden) {
  extern __shared__ float shared[];
  float *const x = shared, *const sums = shared + hidden;
  const std::int64_t row = blockIdx.x;
  int expert = 0;
  while (expert + 1 < localExperts && starts[expert + 1] <= row) ++expert;
  for (std::int64_t j = threadIdx.x; j < hidden; j += blockDim.x) x[j] = fromBf16(rows[row * hidden + j]);
  __syncthreads();
  const auto matrix = static_cast<std::int64_t>(expert) * inner * hidden;
  // A warp for each inner unit.
  for (int f = static_cast<int>(threadIdx.x / kWarp); f < inner; f += kThreads / kWarp) {
    float sum = 0;
    for (std::int64_t j = threadIdx.x % kWarp; j < hidden; j += kWarp)
      sum = fmaf(x[j], in[matrix + f * hidden + j], sum);
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
    if (threadIdx.x % kWarp == 0) sums[f] = fmaxf(sum, 0.0f);
  }
  __syncthreads();
  const float scale = 0.5f + static_cast<float>((firstExpert + expert) % 64) / 64;
  for (std::int64_t j = threadIdx.x; j < hidden; j += blockDim.x) {
    float value = inner == 0 ? x[j] * scale : 0.0f;
    for (int f = 0; f < inner; ++f) value = fmaf(sums[f], out[matrix + f * hidden + j], value);
    results[row * hidden + j] = toBf16(value);
  }
}

template <typename T>
class Array {
 public:
  explicit Array(std::size_t count) {
    CUDA(cudaMalloc(reinterpret_cast<void**>(&pointer_), std::max<std::size_t>(count, 1) * sizeof(T)));
  }
  ~Array() { cudaFree(pointer_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* get() const { return pointer_; }

 private:
  T* pointer_ = nullptr;
};

class CudaDevice : public Device {
 public:
  explicit CudaDevice(const Shape& shape)
      : shape_(shape),
        chunks_(static_cast<std::size_t>(shape.ranks * shape.localExperts)),
        starts_(static_cast<std::size_t>(shape.localExperts) + 1),
        in_(matrixElements(shape)),
        out_(matrixElements(shape)) {
    CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (const int which : {0, 1}) {
      std::vector<float> matrix;
      matrix.reserve(matrixElements(shape));
      for (int e = 0; e < shape.localExperts; ++e) {
        for (int f = 0; f < shape.inner; ++f) {
          for (std::int64_t j = 0; j < shape.hidden; ++j)
            matrix.push_back(expertWeight(shape, shape.firstExpert + e, which, f, j));
        }
      }
      toDevice((which == 0 ? in_ : out_).get(), matrix.data(), matrix.size() * sizeof(float));
    }
    CUDA(cudaFuncSetAttribute(&runExperts, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(sharedBytes())));
  }
  ~CudaDevice() override { cudaStreamDestroy(stream_); }

  cudaStream_t stream() override { return stream_; }
  void* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    CUDA(cudaMalloc(&memory, bytes));
    return memory;
  }
  void release(void* memory) override { cudaFree(memory); }
  void wait() override { CUDA(cudaStreamSynchronize(stream_)); }
  void toDevice(void* to, const void* fromHost, std::size_t bytes) override {
    CUDA(cudaMemcpyAsync(to, fromHost, bytes, cudaMemcpyHostToDevice, stream_));
    wait();
  }
  void toHost(void* toHost, const void* from, std::size_t bytes) override {
    CUDA(cudaMemcpyAsync(toHost, from, bytes, cudaMemcpyDeviceToHost, stream_));
    wait();
  }

  void sortSlots(const std::int64_t* ids, const SortedSlots& sorted) override {
    const auto experts = static_cast<unsigned>(shape_.experts);
    countSlots<<<experts, kThreads, 0, stream_>>>(ids, shape_.slots(), sorted.counts);
    placeSlots<<<experts, kThreads, 0, stream_>>>(ids, shape_.slots(), shape_.topk, sorted);
    orderSums<<<blocks(shape_.tokens), kThreads, 0, stream_>>>(ids, shape_.tokens, shape_.topk, shape_.ranks,
                                                               shape_.experts, sorted);
    CUDA(cudaGetLastError());
  }

  void gatherRows(void* to, const void* from, const std::int64_t* index, std::int64_t rows) override {
    if (rows == 0) return;
    gather<<<static_cast<unsigned>(rows), kThreads, 0, stream_>>>(
        static_cast<std::byte*>(to), static_cast<const std::byte*>(from), index, shape_.rowBytes());
    CUDA(cudaGetLastError());
  }

  void moveChunks(void* to, const void* from, const std::vector<Chunk>& chunksHost) override {
    if (chunksHost.empty()) return;
    CUDA(cudaMemcpyAsync(chunks_.get(), chunksHost.data(), chunksHost.size() * sizeof(Chunk), cudaMemcpyHostToDevice,
                         stream_));
    const dim3 grid(64, static_cast<unsigned>(chunksHost.size()));
    copyChunks<<<grid, kThreads, 0, stream_>>>(static_cast<std::byte*>(to), static_cast<const std::byte*>(from),
                                               chunks_.get(), shape_.rowBytes());
    CUDA(cudaGetLastError());
  }

  void weightedSum(void* y, const void* rows, const std::int64_t* places, const std::int64_t* slots,
                   const float* weights) override {
    const auto tokens = static_cast<unsigned>(shape_.tokens);
    auto* const to = static_cast<std::uint16_t*>(y);
    const auto* const from = static_cast<const std::uint16_t*>(rows);
    if (shape_.hidden % 8 == 0) {
      sumWeighted<uint4>
          <<<tokens, kThreads, 0, stream_>>>(to, from, places, slots, weights, shape_.hidden, shape_.topk);
    } else {
      sumWeighted<unsigned short>
          <<<tokens, kThreads, 0, stream_>>>(to, from, places, slots, weights, shape_.hidden, shape_.topk);
    }
    CUDA(cudaGetLastError());
  }

  void experts(const void* rows, void* results, const std::int64_t* startsHost) override {
    const std::int64_t count = startsHost[shape_.localExperts];
    if (count == 0) return;
    CUDA(cudaMemcpyAsync(starts_.get(), startsHost,
                         (static_cast<std::size_t>(shape_.localExperts) + 1) * sizeof(std::int64_t),
                         cudaMemcpyHostToDevice, stream_));
    runExperts<<<static_cast<unsigned>(count), kThreads, sharedBytes(), stream_>>>(
        static_cast<const std::uint16_t*>(rows), static_cast<std::uint16_t*>(results), starts_.get(),
        shape_.localExperts, shape_.firstExpert, in_.get(), out_.get(), shape_.inner, shape_.hidden);
    CUDA(cudaGetLastError());
  }

 private:
  static std::size_t matrixElements(const Shape& shape) {
    return static_cast<std::size_t>(shape.localExperts) * static_cast<std::size_t>(shape.inner) *
           static_cast<std::size_t>(shape.hidden);
  }
  static unsigned blocks(std::int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }
  std::size_t sharedBytes() const { return static_cast<std::size_t>(shape_.hidden + shape_.inner) * sizeof(float); }

  const Shape shape_;
  cudaStream_t stream_ = nullptr;
  Array<Chunk> chunks_;
  Array<std::int64_t> starts_;
  Array<float> in_, out_;
};

}  // namespace

std::unique_ptr<Device> makeCudaDevice(const Shape& shape) {
  int gpus = 0;
  CUDA(cudaGetDeviceCount(&gpus));
  if (gpus == 0) throw std::runtime_error("no GPU is seen");
  CUDA(cudaSetDevice(shape.rank % gpus));
  return std::make_unique<CudaDevice>(shape);
}

void prepareCudaRank(int rank, int ranks) {
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus >= ranks) return;
  // Several ranks on a GPU are to NCCL ranks of several hosts, which it reaches through sockets.
  setenv("NCCL_HOSTID", ("moe_nccl_" + std::to_string(rank)).c_str(), 1);
  setenv("NCCL_SOCKET_IFNAME", "lo", 0);
  setenv("NCCL_IB_DISABLE", "1", 0);
}

}  // namespace fusco::bench::moe
