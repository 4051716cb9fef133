// BF16 to FP8 e4m3 over vectors of one width; see host_vector.h for how this is included.
#pragma once

#include "exec/host_vector.h"

namespace fusco::exec {
namespace {

constexpr std::size_t kCastPiece = 8192;  // elements cast at a time, then written to all places

float castGroup(const std::byte* row, std::byte* codes) {
  const float largest = bf16ToFloat(Simd::largestFinite(row));
  const float scale = std::max(largest, kFp8Floor) / kFp8Max;
  const typename Simd::Floats divisor = Simd::broadcast(scale);
  for (std::size_t i = 0; i < kScaleGroup; i += 4 * Simd::kLanes) Simd::castToE4m3(codes + i, row + 2 * i, divisor);
  return scale;
}

void writeCast(const CastArgs& args, std::size_t copy, std::size_t first, const std::byte* codes, std::size_t count,
               const float* scales) {
  const PlaceArgs& p = args.place;
  std::byte* to[kMaxPlaces];
  std::size_t places = 0;
  for (std::uint32_t e = p.copies[copy].firstEntry; e < p.copies[copy + 1].firstEntry; ++e) {
    if (leftOut(p, p.entries[e])) continue;
    std::byte* scaleRow = rowOf(args.scaleBases, p.entries[e], args.scaleStride);
    if (scaleRow != nullptr)
      std::memcpy(scaleRow + first / kScaleGroup * sizeof(float), scales, count / kScaleGroup * sizeof(float));
    std::byte* row = rowOf(p.bases, p.entries[e], p.destinationStride);
    if (row == nullptr) continue;
    to[places++] = row + first;
    if (places < kMaxPlaces) continue;
    writePlaces(to, places, codes, count, nullptr, p.streaming);
    places = 0;
  }
  if (places != 0) writePlaces(to, places, codes, count, nullptr, p.streaming);
}

void cast(const CastArgs& args) {
  checkCast(args);
  alignas(kLine) std::byte codes[kCastPiece];
  float scales[kCastPiece / kScaleGroup];
  for (std::size_t c = args.place.begin; c < args.place.end; ++c) {
    const std::byte* row = sourceRow(args.place, c);
    for (std::size_t first = 0; first < args.elements; first += kCastPiece) {
      const std::size_t count = std::min(kCastPiece, args.elements - first);
      for (std::size_t i = 0; i < count; i += kScaleGroup)
        scales[i / kScaleGroup] = castGroup(row + 2 * (first + i), codes + i);
      writeCast(args, c, first, codes, count, scales);
    }
  }
}

}  // namespace
}  // namespace fusco::exec
