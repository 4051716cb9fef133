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

// The product of one gradient row with one expert row and, in the same pass, the scaled row where `to` is not null (its
// stores then begin at a whole line). `next`: the expert row that comes after it, or null.
template <RowType kType>
float dot(const std::byte* row, const std::byte* expert, const std::byte* next, std::size_t elements, std::byte* to,
          float weight, bool streaming) {
  constexpr std::size_t size = kType == RowType::f32 ? 4 : 2;
  constexpr std::size_t kVectors = kDotLanes / Simd::kLanes;
  const typename Simd::Floats factor = Simd::broadcast(weight);
  typename Simd::Floats total[kVectors];
  for (std::size_t j = 0; j < kVectors; ++j) total[j] = Simd::zeroFloats();
  std::size_t i = 0;
  for (; i + kDotLanes <= elements; i += kDotLanes) {
    const std::byte* ahead = soon(expert, i * size, elements * size, next);
    for (std::size_t j = 0; j < kDotLanes * size; j += kLine) Simd::prefetch(ahead + j);
    typename Simd::Floats g[kVectors];
    for (std::size_t j = 0; j < kVectors; ++j) {
      const std::size_t at = (i + j * Simd::kLanes) * size;
      g[j] = Simd::template loadFloats<kType>(row + at);
      total[j] = Simd::fma(g[j], Simd::template loadFloats<kType>(expert + at), total[j]);
    }
    if (to == nullptr) continue;
    for (std::size_t j = 0; j < kVectors; j += 2)
      Simd::template storePair<kType>(to + (i + j * Simd::kLanes) * size, Simd::multiply(factor, g[j]),
                                      Simd::multiply(factor, g[j + 1]), streaming);
  }
  float partials[kDotLanes];
  for (std::size_t j = 0; j < kVectors; ++j) Simd::storeFloats(partials + j * Simd::kLanes, total[j]);
  for (; i < elements; ++i) {
    const float g = loadElement(row, i, kType);
    partials[i % kDotLanes] = std::fmaf(g, loadElement(expert, i, kType), partials[i % kDotLanes]);
    if (to != nullptr) storeElement(to, i, kType, weight * g);
  }
  return foldDot(partials);
}

template <RowType kType>
void backEntry(const BackArgs& args, const std::byte* row, std::uint32_t e, std::uint32_t nextEntry) {
  const PlaceArgs& p = args.place;
  const std::size_t elements = p.rowBytes / elementBytes(kType);
  const float weight = args.weights == nullptr ? 1.0f : args.weights[e];
  std::byte* to = rowOf(p.bases, p.entries[e], p.destinationStride);
  const std::byte* expert = rowOf(args.expertBases, p.entries[e], args.expertStride);
  if (expert == nullptr || args.dots == nullptr) {
    if (to != nullptr) scaleRow<kType>(to, row, elements, weight, p.streaming);
    return;
  }
  RowShape shape{0, false};
  if (to != nullptr) shape = rowShape(to, elements, kType, p.streaming);
  if (shape.head != 0) {  // the two passes begin at different elements
    scaleRow<kType>(to, row, elements, weight, p.streaming);
    to = nullptr;
  }
  const std::byte* next = nextEntry == e ? nullptr : rowOf(args.expertBases, p.entries[nextEntry], args.expertStride);
  args.dots[e] = dot<kType>(row, expert, next, elements, to, weight, shape.streaming);
}

// The gradient row comes from memory once: its first use brings it into the first-level cache.
template <RowType kType>
void backRows(const BackArgs& args) {
  const PlaceArgs& p = args.place;
  if (p.begin >= p.end) return;
  const std::uint32_t last = p.copies[p.end].firstEntry;
  for (std::size_t c = p.begin; c < p.end; ++c) {
    const std::byte* row = sourceRow(p, c);
    for (std::uint32_t e = p.copies[c].firstEntry; e < p.copies[c + 1].firstEntry; ++e)
      if (!leftOut(p, p.entries[e])) backEntry<kType>(args, row, e, e + 1 < last ? e + 1 : e);
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
