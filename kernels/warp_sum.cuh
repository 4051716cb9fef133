// A warp's sum of some rows, each times its weight, in FP32 and rounded once.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/numbers.cuh"

namespace fusco::kernels {

// The k-th term of a sum is with lane k.
struct WarpTerm {
  const std::byte* row;
  float weight;
};

// The term of lane `from`.
__device__ __forceinline__ WarpTerm termOf(const WarpTerm& mine, int from) {
  return {reinterpret_cast<const std::byte*>(
              __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(mine.row), from)),
          __shfl_sync(0xffffffffu, mine.weight, from)};
}

// The sum of one vector of each row.
template <typename Number, int kBytes>
class VectorSum {
 public:
  using Vector = Pack<Number, kBytes>;
  __device__ __forceinline__ VectorSum(const std::byte* bias, unsigned at) {
    Vector value;
    if (bias != nullptr) value.read(bias + at);
#pragma unroll
    for (int i = 0; i < Vector::kCount; ++i) sums_[i] = bias == nullptr ? 0.0f : Number::load(value.elements[i]);
  }
  __device__ __forceinline__ void add(const Vector& value, float weight) {
#pragma unroll
    for (int i = 0; i < Vector::kCount; ++i) sums_[i] = fmaf(weight, Number::load(value.elements[i]), sums_[i]);
  }
  __device__ __forceinline__ void write(std::byte* to) const {
    Vector result;
#pragma unroll
    for (int i = 0; i < Vector::kCount; ++i) result.elements[i] = Number::round(sums_[i]);
    result.write(to);
  }

 private:
  float sums_[Vector::kCount];
};

// kColumns vectors of each of kRows rows, all inside.
template <typename Number, int kBytes, int kRows, int kColumns>
__device__ __forceinline__ void sumColumns(const WarpTerm (&terms)[kRows], const std::byte* bias, unsigned at,
                                           std::byte* out) {
  constexpr unsigned kStep = 32 * kBytes;
  Pack<Number, kBytes> values[kColumns][kRows];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) values[c][k].read(terms[k].row + at + c * kStep);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    VectorSum<Number, kBytes> sum(bias, at + c * kStep);
#pragma unroll
    for (int k = 0; k < kRows; ++k) sum.add(values[c][k], terms[k].weight);
    sum.write(out + at + c * kStep);
  }
}

template <typename Number, int kBytes, int kRows, int kColumns>
__device__ __forceinline__ void sumFew(const WarpTerm& mine, const std::byte* bias, unsigned bytes, std::byte* out) {
  constexpr unsigned kStep = 32 * kBytes;
  WarpTerm terms[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) terms[k] = termOf(mine, k);
  const unsigned lane = threadIdx.x % 32 * kBytes;
  unsigned begin = 0;
  for (; begin + kColumns * kStep <= bytes; begin += kColumns * kStep)
    sumColumns<Number, kBytes, kRows, kColumns>(terms, bias, begin + lane, out);
  for (; begin + lane < bytes; begin += kStep) sumColumns<Number, kBytes, kRows, 1>(terms, bias, begin + lane, out);
}

template <typename Number, int kBytes>
__device__ __forceinline__ void sumRowByRow(const WarpTerm& mine, int count, const std::byte* bias, unsigned bytes,
                                            std::byte* out) {
  constexpr int kGroup = 8;  // rows under way
  for (unsigned begin = 0; begin < bytes; begin += 32 * kBytes) {
    const unsigned at = begin + threadIdx.x % 32 * kBytes;
    const bool inside = at < bytes;
    VectorSum<Number, kBytes> sum(inside ? bias : nullptr, at);
    for (int first = 0; first < count; first += kGroup) {
      Pack<Number, kBytes> values[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (first + k >= count) break;
        const std::byte* row = termOf(mine, first + k).row;
        if (inside) values[k].read(row + at);
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (first + k >= count) break;
        sum.add(values[k], termOf(mine, first + k).weight);
      }
    }
    if (inside) sum.write(out + at);
  }
}

// How a launch has its warps. A multiprocessor has the more bandwidth the more bytes are under way in it. On all of
// them that is enough row by row; within a budget, where they are few, a block fills one of them (so that no more of
// them are taken than were given), and its warps have several vectors of each row under way where a sum has few rows;
// where kernels/staged_sum.cuh can be had, that is used instead.
enum class Warps { many, few };
template <Warps kWarps>
inline constexpr int kSumThreads = kWarps == Warps::many ? 256 : 512;
template <Warps kWarps>
inline constexpr int kSumBlocks = kWarps == Warps::many ? 3 : 1;  // of a multiprocessor

// out = bias + the terms 0 to count - 1, in this order, for `bytes` bytes of each row. bias: null for none.
template <typename Number, int kBytes, Warps kWarps>
__device__ __forceinline__ void sumOfWarp(const WarpTerm& mine, int count, const std::byte* bias, unsigned bytes,
                                          std::byte* out) {
  if constexpr (kWarps == Warps::few) {
    switch (count) {
      case 1:
        return sumFew<Number, kBytes, 1, 7>(mine, bias, bytes, out);
      case 2:
        return sumFew<Number, kBytes, 2, 7>(mine, bias, bytes, out);
      case 3:
        return sumFew<Number, kBytes, 3, 4>(mine, bias, bytes, out);
      case 4:
        return sumFew<Number, kBytes, 4, 4>(mine, bias, bytes, out);
      case 5:
        return sumFew<Number, kBytes, 5, 2>(mine, bias, bytes, out);
      case 6:
        return sumFew<Number, kBytes, 6, 2>(mine, bias, bytes, out);
      case 7:
        return sumFew<Number, kBytes, 7, 2>(mine, bias, bytes, out);
      case 8:
        return sumFew<Number, kBytes, 8, 2>(mine, bias, bytes, out);
      default:
        break;
    }
  }
  sumRowByRow<Number, kBytes>(mine, count, bias, bytes, out);
}

}  // namespace fusco::kernels
