// Sums and scaled rows over vectors of one width; see host_vector.h for how this is included.
#pragma once

#include "exec/host_vector.h"

namespace fusco::exec {
namespace {

constexpr std::size_t kPair = 2 * Simd::kLanes;  // elements that are converted and stored together
constexpr std::size_t kSumVectors = 8;           // accumulators of a block
constexpr std::size_t kSumBlock = kSumVectors * Simd::kLanes;
constexpr std::size_t kAhead = 1024;  // bytes of each term's row asked for ahead of their use

// Where a loop over a row may use non-temporal stores: `head` elements lie before the first whole line.
struct RowShape {
  std::size_t head;
  bool streaming;
};

RowShape rowShape(const std::byte* out, std::size_t elements, RowType type, bool wanted) {
  const std::size_t size = elementBytes(type);
  const std::size_t skew = bytesToLine(out);
  if (!wanted || elements * size < kStreamBytes || skew % size != 0) return {0, false};
  return {skew / size, true};
}

template <RowType kType>
void accumulate(typename Simd::Floats* total, typename Simd::Floats weight, const std::byte* row, std::size_t i,
                const std::byte* ahead) {
  constexpr std::size_t size = kType == RowType::f32 ? 4 : 2;
  for (std::size_t j = 0; j < kSumBlock * size; j += kLine) Simd::prefetch(ahead + j);
  for (std::size_t j = 0; j < kSumVectors; ++j)
    total[j] = Simd::fma(weight, Simd::template loadFloats<kType>(row + (i + j * Simd::kLanes) * size), total[j]);
}

// Where a reader that is `at` bytes into a row will be soon: in this row, or in the one that it reads next (null:
// none).
const std::byte* soon(const std::byte* row, std::size_t at, std::size_t bytes, const std::byte* next) {
  if (at + kAhead < bytes) return row + at + kAhead;
  return next == nullptr ? row + at : next + (at + kAhead - bytes);
}

float sumElement(const SumArgs& args, std::size_t r, std::size_t i) {
  const std::byte* bias = args.bias == nullptr ? nullptr : args.bias[r];
  float total = bias == nullptr ? 0.0f : loadElement(bias, i, args.outType);
  for (std::uint32_t t = args.first[r]; t < args.first[r + 1]; ++t)
    total = std::fmaf(args.terms[t].weight, loadElement(args.terms[t].row, i, args.terms[t].type), total);
  return total;
}

// All terms of one row together, block by block: each row is read once and the sums stay in registers. Towards their
// ends the terms ask for the beginnings of the next row's terms.
template <RowType kOut>
void sumRow(const SumArgs& args, std::size_t r) {
  constexpr std::size_t size = kOut == RowType::f32 ? 4 : 2;
  std::byte* out = args.out[r];
  const std::byte* bias = args.bias == nullptr ? nullptr : args.bias[r];
  const Term* begin = args.terms + args.first[r];
  const Term* end = args.terms + args.first[r + 1];
  const Term* nextEnd = r + 1 < args.rows ? args.terms + args.first[r + 2] : end;
  const RowShape shape = rowShape(out, args.elements, kOut, args.streaming);
  std::size_t i = 0;
  for (; i < std::min(shape.head, args.elements); ++i) storeElement(out, i, kOut, sumElement(args, r, i));
  for (; i + kSumBlock <= args.elements; i += kSumBlock) {
    typename Simd::Floats total[kSumVectors];
    for (std::size_t j = 0; j < kSumVectors; ++j)
      total[j] =
          bias == nullptr ? Simd::zeroFloats() : Simd::template loadFloats<kOut>(bias + (i + j * Simd::kLanes) * size);
    for (const Term* term = begin; term != end; ++term) {
      const std::byte* row = static_cast<const std::byte*>(term->row);
      const Term* successor = term + (end - begin);
      const std::byte* next = successor < nextEnd ? static_cast<const std::byte*>(successor->row) : nullptr;
      const std::size_t width = term->type == RowType::f32 ? 4 : 2;
      const std::byte* ahead = soon(row, i * width, args.elements * width, next);
      const typename Simd::Floats weight = Simd::broadcast(term->weight);
      if (term->type == RowType::bf16)
        accumulate<RowType::bf16>(total, weight, row, i, ahead);
      else if (term->type == RowType::f32)
        accumulate<RowType::f32>(total, weight, row, i, ahead);
      else
        accumulate<RowType::f16>(total, weight, row, i, ahead);
    }
    for (std::size_t j = 0; j < kSumVectors; j += 2) {
      std::byte* to = out + (i + j * Simd::kLanes) * size;
      Simd::template storePair<kOut>(to, total[j], total[j + 1], shape.streaming);
    }
  }
  for (; i < args.elements; ++i) storeElement(out, i, kOut, sumElement(args, r, i));
}

void sum(const SumArgs& args) {
  checkSum(args);
  for (std::size_t r = 0; r < args.rows; ++r) {
    if (args.outType == RowType::bf16)
      sumRow<RowType::bf16>(args, r);
    else if (args.outType == RowType::f32)
      sumRow<RowType::f32>(args, r);
    else
      sumRow<RowType::f16>(args, r);
  }
}

}  // namespace
}  // namespace fusco::exec
