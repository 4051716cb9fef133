// Scaled rows and dot products over vectors of one width; see host_vector.h for how this is included.
#pragma once

#include "exec/host_vector_sum.h"

namespace fusco::exec {
namespace {

template <RowType kType>
void scaleRow(std::byte* to, const std::byte* row, std::size_t elements, float weight, bool wanted) {
  constexpr std::size_t size = kType == RowType::f32 ? 4 : 2;
  const RowShape shape = rowShape(to, elements, kType, wanted);
  const typename Simd::Floats factor = Simd::broadcast(weight);
  std::size_t i = 0;
  for (; i < std::min(shape.head, elements); ++i) storeElement(to, i, kType, weight * loadElement(row, i, kType));
  for (; i + kPair <= elements; i += kPair) {
    const auto low = Simd::multiply(factor, Simd::template loadFloats<kType>(row + i * size));
    const auto high = Simd::multiply(factor, Simd::template loadFloats<kType>(row + (i + Simd::kLanes) * size));
    Simd::template storePair<kType>(to + i * size, low, high, shape.streaming);
  }
  for (; i < elements; ++i) storeElement(to, i, kType, weight * loadElement(row, i, kType));
}

template <RowType kType>
float dot(const std::byte* row, const std::byte* expert, std::size_t elements) {
  constexpr std::size_t size = kType == RowType::f32 ? 4 : 2;
  constexpr std::size_t kVectors = kDotLanes / Simd::kLanes;
  typename Simd::Floats total[kVectors];
  for (std::size_t j = 0; j < kVectors; ++j) total[j] = Simd::zeroFloats();
  std::size_t i = 0;
  for (; i + kDotLanes <= elements; i += kDotLanes) {
    Simd::prefetch(expert + i * size + kAhead);
    for (std::size_t j = 0; j < kVectors; ++j) {
      const std::size_t at = (i + j * Simd::kLanes) * size;
      total[j] = Simd::fma(Simd::template loadFloats<kType>(row + at), Simd::template loadFloats<kType>(expert + at),
                           total[j]);
    }
  }
  float partials[kDotLanes];
  for (std::size_t j = 0; j < kVectors; ++j) Simd::storeFloats(partials + j * Simd::kLanes, total[j]);
  for (; i < elements; ++i)
    partials[i % kDotLanes] =
        std::fmaf(loadElement(row, i, kType), loadElement(expert, i, kType), partials[i % kDotLanes]);
  return foldDot(partials);
}

// The gradient row comes from memory once: its first use brings it into the first-level cache.
template <RowType kType>
void backRows(const BackArgs& args) {
  const PlaceArgs& p = args.place;
  const std::size_t elements = p.rowBytes / elementBytes(kType);
  for (std::size_t c = p.begin; c < p.end; ++c) {
    const std::byte* row = sourceRow(p, c);
    for (std::uint32_t e = p.copies[c].firstEntry; e < p.copies[c + 1].firstEntry; ++e) {
      const plan::Entry& entry = p.entries[e];
      if (leftOut(p, entry)) continue;
      std::byte* to = rowOf(p.bases, entry, p.destinationStride);
      if (to != nullptr)
        scaleRow<kType>(to, row, elements, args.weights == nullptr ? 1.0f : args.weights[e], p.streaming);
      const std::byte* expert = rowOf(args.expertBases, entry, args.expertStride);
      if (expert != nullptr && args.dots != nullptr) args.dots[e] = dot<kType>(row, expert, elements);
    }
  }
}

void back(const BackArgs& args) {
  checkBack(args);
  if (args.type == RowType::bf16)
    backRows<RowType::bf16>(args);
  else if (args.type == RowType::f32)
    backRows<RowType::f32>(args);
  else
    backRows<RowType::f16>(args);
}

}  // namespace
}  // namespace fusco::exec
