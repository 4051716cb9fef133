// Kernels of the benchmark's own: test data, its check, and the passes of a staged shuffle. None of the library's code:
// a check must not run on the code that it checks. Nothing here waits or allocates.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "shuffle/options.h"
#include "shuffle/pattern.h"

namespace fusco::bench::gpu {

// Rows one behind the other, row i of keys[i] (shuffle/data.h).
struct PatternRows {
  std::byte* at;
  const std::uint64_t* keys;
  std::int64_t rows;
  std::size_t rowBytes;
  Pattern pattern;
};
cudaError_t fillRows(const PatternRows& rows, cudaStream_t stream);
// Adds the number of elements that differ to *wrong.
cudaError_t countWrongRows(const PatternRows& rows, std::size_t elementBytes, unsigned long long* wrong,
                           cudaStream_t stream);
// Adds the number of bytes that are not `byte` to *wrong.
cudaError_t countOtherBytes(const std::byte* at, std::size_t bytes, unsigned char byte, unsigned long long* wrong,
                            cudaStream_t stream);

// Sums against float64, as wrongInCombine() of shuffle/oracle.h.
struct SumCheck {
  const std::byte* out;        // [tokens] rows
  const std::uint64_t* keys;   // [tokens, topk]
  const std::int32_t* routed;  // [tokens, topk]: negative where a slot is not routed
  const float* weights;        // [tokens, topk]
  std::int64_t tokens;
  int topk;
  std::int64_t hidden;
  Type type;  // bf16, f16, f32
  Pattern pattern;
  double relative;
};
cudaError_t countWrongSums(const SumCheck& sums, unsigned long long* wrong, cudaStream_t stream);

// out row t = sum over k of weights[t, k] * row places[t, k] of `source`, in FP32, rounded once; places of kNoPlace are
// left out.
inline constexpr std::uint32_t kNoPlace = 0xffffffffu;
struct WeightedSum {
  const std::byte* source;
  const std::uint32_t* places;  // [rows, topk]
  const float* weights;         // [rows, topk]
  std::byte* out;
  std::int64_t rows;
  int topk;
  std::int64_t hidden;
  Type type;
  int parts;  // warps that share a row
  int blocks;
};
cudaError_t weightedSum(const WeightedSum& sum, cudaStream_t stream);

// Pieces of memory, each copied to its place by all multiprocessors together. The list lies in GPU memory.
struct Segment {
  const std::byte* from;
  std::byte* to;
  std::size_t bytes;
};
cudaError_t copySegments(const Segment* segments, int count, int blocks, cudaStream_t stream);

}  // namespace fusco::bench::gpu
