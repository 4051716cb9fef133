#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "shuffle/cuda/kernels.h"

namespace fusco::bench::gpu {

namespace {

constexpr int kThreads = 256;

int blocksFor(std::int64_t units) {
  return static_cast<int>(std::clamp<std::int64_t>((units + kThreads - 1) / kThreads, 1, 8192));
}

__device__ std::uint64_t wordAt(const std::byte* at, unsigned bytes) {
  if (bytes == 8 && reinterpret_cast<std::uintptr_t>(at) % 8 == 0) return *reinterpret_cast<const std::uint64_t*>(at);
  std::uint64_t word = 0;
  for (unsigned i = 0; i < bytes; ++i) word |= std::uint64_t{static_cast<unsigned char>(at[i])} << (8 * i);
  return word;
}

__device__ void storeWord(std::byte* at, std::uint64_t word, unsigned bytes) {
  if (bytes == 8 && reinterpret_cast<std::uintptr_t>(at) % 8 == 0) {
    *reinterpret_cast<std::uint64_t*>(at) = word;
    return;
  }
  for (unsigned i = 0; i < bytes; ++i) at[i] = static_cast<std::byte>(word >> (8 * i));
}

__device__ void addWrong(unsigned long long mine, unsigned long long* wrong) {
  if (mine != 0) atomicAdd(wrong, mine);
}

__global__ void __launch_bounds__(kThreads) fill(PatternRows rows, std::int64_t words) {
  const std::int64_t all = rows.rows * words;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < all;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t row = i / words, word = i % words;
    const std::size_t offset = static_cast<std::size_t>(word) * 8;
    const auto bytes = static_cast<unsigned>(min(std::size_t{8}, rows.rowBytes - offset));
    storeWord(rows.at + static_cast<std::size_t>(row) * rows.rowBytes + offset,
              patternWord(rows.pattern, rows.keys[row], static_cast<std::uint64_t>(word)), bytes);
  }
}

__global__ void __launch_bounds__(kThreads)
    compare(PatternRows rows, std::int64_t words, unsigned elementBytes, unsigned long long* wrong) {
  const std::int64_t all = rows.rows * words;
  unsigned long long mine = 0;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < all;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t row = i / words, word = i % words;
    const std::size_t offset = static_cast<std::size_t>(word) * 8;
    const auto bytes = static_cast<unsigned>(min(std::size_t{8}, rows.rowBytes - offset));
    const std::uint64_t got = wordAt(rows.at + static_cast<std::size_t>(row) * rows.rowBytes + offset, bytes);
    const std::uint64_t difference = got ^ patternWord(rows.pattern, rows.keys[row], static_cast<std::uint64_t>(word));
    for (unsigned at = 0; at < bytes; at += elementBytes) {
      std::uint64_t element = difference >> (8 * at);
      if (elementBytes < 8) element &= (std::uint64_t{1} << (8 * elementBytes)) - 1;
      mine += element != 0;
    }
  }
  addWrong(mine, wrong);
}

__global__ void __launch_bounds__(kThreads)
    compareByte(const std::byte* at, std::size_t bytes, unsigned char byte, unsigned long long* wrong) {
  unsigned long long mine = 0;
  for (std::size_t i = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x; i < bytes;
       i += static_cast<std::size_t>(gridDim.x) * blockDim.x) {
    mine += static_cast<unsigned char>(at[i]) != byte;
  }
  addWrong(mine, wrong);
}

template <typename T>
struct Number;
template <>
struct Number<__nv_bfloat16> {
  static __device__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 store(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Number<__half> {
  static __device__ float load(__half x) { return __half2float(x); }
  static __device__ __half store(float x) { return __float2half_rn(x); }
};
template <>
struct Number<float> {
  static __device__ float load(float x) { return x; }
  static __device__ float store(float x) { return x; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) checkSums(SumCheck s, std::int64_t words, unsigned long long* wrong) {
  constexpr int kElements = 8 / sizeof(T);
  const std::int64_t all = s.tokens * words;
  unsigned long long mine = 0;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < all;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t token = i / words, word = i % words;
    double sum[kElements] = {}, magnitude[kElements] = {};
    for (int k = 0; k < s.topk; ++k) {
      const std::int64_t slot = token * s.topk + k;
      if (s.routed[slot] < 0) continue;
      const std::uint64_t bits = patternWord(s.pattern, s.keys[slot], static_cast<std::uint64_t>(word));
      T numbers[kElements];
      memcpy(numbers, &bits, 8);
      const double weight = s.weights[slot];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const double product = weight * static_cast<double>(Number<T>::load(numbers[e]));
        sum[e] += product;
        magnitude[e] += fabs(product);
      }
    }
    const auto* out = reinterpret_cast<const T*>(s.out) + token * s.hidden + word * kElements;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (word * kElements + e >= s.hidden) break;
      const double error = fabs(static_cast<double>(Number<T>::load(out[e])) - sum[e]);
      mine += !(error <= s.relative * magnitude[e]);  // NaN is wrong
    }
  }
  addWrong(mine, wrong);
}

// A warp a row, or a part of one; all places of a row are read before they are summed, 16 bytes a lane at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) sumVectors(WeightedSum s) {
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % 32;
  const auto vectors = static_cast<int>(s.hidden / kElements);
  const std::size_t rowBytes = static_cast<std::size_t>(s.hidden) * sizeof(T);
  for (std::int64_t unit = (threadIdx.x / 32) * static_cast<std::int64_t>(gridDim.x) + blockIdx.x;
       unit < s.rows * s.parts; unit += static_cast<std::int64_t>(gridDim.x) * (blockDim.x / 32)) {
    const std::int64_t row = unit / s.parts;
    const int part = static_cast<int>(unit % s.parts);
    for (int v = lane + 32 * part; v < vectors; v += 32 * s.parts) {
      float sum[kElements] = {};
      for (int first = 0; first < s.topk; first += kAtOnce) {
        uint4 x[kAtOnce];
        float weights[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          weights[k] = 0;
          x[k] = {};
          if (first + k >= s.topk) continue;
          const std::uint32_t place = s.places[row * s.topk + first + k];
          if (place == kNoPlace) continue;
          weights[k] = s.weights[row * s.topk + first + k];
          x[k] = __ldcs(reinterpret_cast<const uint4*>(s.source + place * rowBytes) + v);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          T numbers[kElements];
          memcpy(numbers, &x[k], 16);
#pragma unroll
          for (int e = 0; e < kElements; ++e) sum[e] = fmaf(weights[k], Number<T>::load(numbers[e]), sum[e]);
        }
      }
      T numbers[kElements];
#pragma unroll
      for (int e = 0; e < kElements; ++e) numbers[e] = Number<T>::store(sum[e]);
      uint4 out;
      memcpy(&out, numbers, 16);
      __stcs(reinterpret_cast<uint4*>(s.out + row * rowBytes) + v, out);
    }
  }
}

// Rows that are no multiple of 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kThreads) sumNumbers(WeightedSum s) {
  const auto* source = reinterpret_cast<const T*>(s.source);
  auto* out = reinterpret_cast<T*>(s.out);
  for (std::int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    for (std::int64_t i = threadIdx.x; i < s.hidden; i += blockDim.x) {
      float sum = 0;
      for (int k = 0; k < s.topk; ++k) {
        const std::uint32_t place = s.places[row * s.topk + k];
        if (place == kNoPlace) continue;
        sum = fmaf(s.weights[row * s.topk + k], Number<T>::load(source[place * s.hidden + i]), sum);
      }
      out[row * s.hidden + i] = Number<T>::store(sum);
    }
  }
}

template <typename T>
cudaError_t launchSum(const WeightedSum& sum, cudaStream_t stream) {
  if (sum.rows == 0) return cudaSuccess;
  if (sum.hidden * sizeof(T) % 16 == 0)
    sumVectors<T><<<sum.blocks, kThreads, 0, stream>>>(sum);
  else
    sumNumbers<T><<<sum.blocks, kThreads, 0, stream>>>(sum);
  return cudaGetLastError();
}

template <typename Vector>
__device__ void copyPiece(const std::byte* from, std::byte* to, std::size_t bytes) {
  constexpr int kUnroll = 4;
  const auto* source = reinterpret_cast<const Vector*>(from);
  auto* destination = reinterpret_cast<Vector*>(to);
  const std::size_t count = bytes / sizeof(Vector);
  for (std::size_t i = threadIdx.x; i < count; i += blockDim.x * kUnroll) {
    Vector x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * blockDim.x < count) x[u] = __ldcs(source + i + u * blockDim.x);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * blockDim.x < count) __stcs(destination + i + u * blockDim.x, x[u]);
  }
  for (std::size_t i = count * sizeof(Vector) + threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
}

// The blocks of a column take the pieces of one segment in turn.
__global__ void __launch_bounds__(512) copyAll(const Segment* segments, int count) {
  constexpr std::size_t kPiece = 32768;
  for (int s = static_cast<int>(blockIdx.y); s < count; s += static_cast<int>(gridDim.y)) {
    const Segment segment = segments[s];
    const auto together = reinterpret_cast<std::uintptr_t>(segment.from) | reinterpret_cast<std::uintptr_t>(segment.to);
    for (std::size_t at = blockIdx.x * kPiece; at < segment.bytes; at += gridDim.x * kPiece) {
      const std::size_t bytes = min(kPiece, segment.bytes - at);
      if (together % 16 == 0)
        copyPiece<uint4>(segment.from + at, segment.to + at, bytes);
      else if (together % 4 == 0)
        copyPiece<unsigned>(segment.from + at, segment.to + at, bytes);
      else
        copyPiece<unsigned char>(segment.from + at, segment.to + at, bytes);
    }
  }
}

std::int64_t wordsOf(std::size_t rowBytes) { return static_cast<std::int64_t>((rowBytes + 7) / 8); }

}  // namespace

cudaError_t fillRows(const PatternRows& rows, cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  const std::int64_t words = wordsOf(rows.rowBytes);
  fill<<<blocksFor(rows.rows * words), kThreads, 0, stream>>>(rows, words);
  return cudaGetLastError();
}

cudaError_t countWrongRows(const PatternRows& rows, std::size_t elementBytes, unsigned long long* wrong,
                           cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  const std::int64_t words = wordsOf(rows.rowBytes);
  compare<<<blocksFor(rows.rows * words), kThreads, 0, stream>>>(rows, words, static_cast<unsigned>(elementBytes),
                                                                 wrong);
  return cudaGetLastError();
}

cudaError_t countOtherBytes(const std::byte* at, std::size_t bytes, unsigned char byte, unsigned long long* wrong,
                            cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  compareByte<<<blocksFor(static_cast<std::int64_t>(bytes)), kThreads, 0, stream>>>(at, bytes, byte, wrong);
  return cudaGetLastError();
}

cudaError_t countWrongSums(const SumCheck& sums, unsigned long long* wrong, cudaStream_t stream) {
  if (sums.tokens == 0) return cudaSuccess;
  const std::int64_t words = wordsOf(static_cast<std::size_t>(sums.hidden) * bytesOf(sums.type));
  const int blocks = blocksFor(sums.tokens * words);
  switch (sums.type) {
    case Type::bf16:
      checkSums<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(sums, words, wrong);
      break;
    case Type::f16:
      checkSums<__half><<<blocks, kThreads, 0, stream>>>(sums, words, wrong);
      break;
    case Type::f32:
      checkSums<float><<<blocks, kThreads, 0, stream>>>(sums, words, wrong);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

cudaError_t weightedSum(const WeightedSum& sum, cudaStream_t stream) {
  switch (sum.type) {
    case Type::bf16:
      return launchSum<__nv_bfloat16>(sum, stream);
    case Type::f16:
      return launchSum<__half>(sum, stream);
    case Type::f32:
      return launchSum<float>(sum, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t copySegments(const Segment* segments, int count, int blocks, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const unsigned columns = static_cast<unsigned>(std::min(count, blocks));
  const unsigned each = std::max(1u, static_cast<unsigned>(blocks) / columns);
  copyAll<<<dim3(each, columns), 512, 0, stream>>>(segments, count);
  return cudaGetLastError();
}

}  // namespace fusco::bench::gpu
