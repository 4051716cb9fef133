// Slices as the engine fills and reads them. Pure: works on memory, needs no link.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/layout.h"
#include "transport/transport.h"

namespace fusco::engine {

enum class SliceKind : std::uint32_t {
  rows = 1,      // dispatch: rows of tensor `flags >> 8` with their places
  partials = 2,  // combine: sums on their way home
  dots = 3,      // backward: router-weight gradients on their way home
  bytes = 4,     // point to point
  counts = 5,    // planning
};

inline constexpr std::uint32_t kLastSlice = 1;

// A slice that has arrived (or is being filled), with its parts found and checked.
struct Slice {
  transport::SliceHeader* header = nullptr;
  plan::Copy* copies = nullptr;    // [rows + 1]
  plan::Entry* entries = nullptr;  // [entries]
  float* weights = nullptr;        // [entries]
  std::byte* payload = nullptr;

  SliceKind kind() const { return static_cast<SliceKind>(header->kind); }
  bool last() const { return (header->flags & kLastSlice) != 0; }
  std::uint32_t tensor() const { return header->flags >> 8; }
};

// Bytes in front of the payload for so many rows and entries.
std::size_t sliceHead(std::size_t rows, std::size_t entries);
// Bytes of a whole slice. Rows lie one after the other, each rounded up to 64.
std::size_t sliceBytes(std::size_t rows, std::size_t entries, std::size_t rowBytes);
std::size_t sliceRowStride(std::size_t rowBytes);

// Writes the header for the given numbers into `slot` and returns the parts to be filled.
Slice layOutSlice(std::byte* slot, SliceKind kind, std::size_t rows, std::size_t entries, std::size_t rowBytes);

// Finds the parts of a slice that came from a peer; throws Error(internalError) when it does not fit its slot or
// contradicts itself.
Slice readSlice(const std::byte* slot, std::size_t slotBytes);

// How a row is cut when it does not fit into a slice by itself: the largest part, a multiple of 64 (or the row).
// Throws invalidUsage when not even the descriptors of one row fit.
std::size_t partBytes(std::size_t rowBytes, std::size_t entries, std::size_t slotBytes);

}  // namespace fusco::engine
