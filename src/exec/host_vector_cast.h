// BF16 to FP8 e4m3 over vectors of one width; see host_vector.h for how this is included.
#pragma once

#include "exec/host_vector.h"

namespace fusco::exec {
namespace {

constexpr std::size_t kCastPiece = 512;  // elements cast at a time and written to all places: casting hides the stores

// Where one row and its scales go.
struct CastPlaces {
  std::byte* rows[kMaxPlaces];
  std::byte* scales[kMaxPlaces];
  std::size_t rowCount = 0, scaleCount = 0;
};

float castGroup(const std::byte* row, std::byte* codes) {
  const float largest = bf16ToFloat(Simd::largestFinite(row));
  const float scale = std::max(largest, kFp8Floor) / kFp8Max;
  const typename Simd::Floats divisor = Simd::broadcast(scale);
  for (std::size_t i = 0; i < kScaleGroup; i += 4 * Simd::kLanes) Simd::castToE4m3(codes + i, row + 2 * i, divisor);
  return scale;
}

void castRow(const CastArgs& args, const std::byte* row, const CastPlaces& places) {
  alignas(kLine) std::byte codes[kCastPiece];
  float scales[kCastPiece / kScaleGroup];
  for (std::size_t first = 0; first < args.elements; first += kCastPiece) {
    const std::size_t count = std::min(kCastPiece, args.elements - first);
    for (std::size_t i = 0; i < count; i += kScaleGroup)
      scales[i / kScaleGroup] = castGroup(row + 2 * (first + i), codes + i);
    std::byte* to[kMaxPlaces];
    for (std::size_t p = 0; p < places.rowCount; ++p) to[p] = places.rows[p] + first;
    if (places.rowCount != 0) writePlaces(to, places.rowCount, codes, count, nullptr, args.place.streaming);
    for (std::size_t p = 0; p < places.scaleCount; ++p)
      std::memcpy(places.scales[p] + first / kScaleGroup * sizeof(float), scales, count / kScaleGroup * sizeof(float));
  }
}

void cast(const CastArgs& args) {
  checkCast(args);
  const PlaceArgs& p = args.place;
  for (std::size_t c = p.begin; c < p.end; ++c) {
    CastPlaces places;
    const std::uint32_t end = p.copies[c + 1].firstEntry;
    for (std::uint32_t e = p.copies[c].firstEntry; e < end; ++e) {
      if (leftOut(p, p.entries[e])) continue;
      std::byte* to = rowOf(p.bases, p.entries[e], p.destinationStride);
      if (to != nullptr) places.rows[places.rowCount++] = to;
      std::byte* scales = rowOf(args.scaleBases, p.entries[e], args.scaleStride);
      if (scales != nullptr) places.scales[places.scaleCount++] = scales;
      if (std::max(places.rowCount, places.scaleCount) < kMaxPlaces) continue;
      castRow(args, sourceRow(p, c), places);  // more places than fit: the row is cast again for the rest
      places.rowCount = places.scaleCount = 0;
    }
    if (places.rowCount + places.scaleCount != 0) castRow(args, sourceRow(p, c), places);
  }
}

}  // namespace
}  // namespace fusco::exec
