// Rows moved by vectors of one width. The host_vector*.h files are included, by way of host_vector_executor.h, by
// host_avx2.cc and host_avx512.cc, each after it has included what is used here, selected its instruction set and
// described it as a struct `Simd`. Everything in them has internal linkage, so that neither file's code can stand in
// for the other's when the linker merges what is alike.
//
// Simd: kLanes (floats of a vector), kRowVectors (vectors of a row that are loaded before they are written to its
// places), Bytes and Floats (the vectors), and functions over them.
#pragma once

namespace fusco::exec {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kMaxPlaces = 64;  // places of a row that are written together
constexpr std::size_t kVectorBytes = Simd::kLanes * sizeof(float);
constexpr std::size_t kStreamBytes = 512;     // rows from here on are worth non-temporal stores
constexpr std::size_t kStreamFill = 1 << 20;  // and zeros from here on
constexpr std::size_t kHotBytes = 16 << 10;   // of a row, read again from the first-level cache

std::size_t bytesToLine(const void* address) { return -reinterpret_cast<std::uintptr_t>(address) & (kLine - 1); }

// Copies with non-temporal stores of whole lines; what is left at both ends with ordinary ones.
void streamCopy(std::byte* to, const std::byte* from, std::size_t bytes) {
  const std::size_t head = std::min(bytesToLine(to), bytes);
  std::memcpy(to, from, head);
  std::size_t i = head;
  for (; i + 4 * kLine <= bytes; i += 4 * kLine) {
    typename Simd::Bytes v[4 * kLine / kVectorBytes];
    for (std::size_t j = 0; j < std::size(v); ++j) v[j] = Simd::load(from + i + j * kVectorBytes);
    for (std::size_t j = 0; j < std::size(v); ++j) Simd::stream(to + i + j * kVectorBytes, v[j]);
  }
  for (; i + kLine <= bytes; i += kLine)
    for (std::size_t j = 0; j < kLine; j += kVectorBytes) Simd::stream(to + i + j, Simd::load(from + i + j));
  std::memcpy(to + i, from + i, bytes - i);
}

// One row to places that all begin at the same offset in their lines: some vectors of it are loaded and written to
// every place before the next ones, and the same lines of the row that comes next are asked for on the way.
void streamAligned(std::byte* const* to, std::size_t places, const std::byte* from, std::size_t bytes,
                   const std::byte* next) {
  constexpr std::size_t kBlock = Simd::kRowVectors * kVectorBytes;
  const std::size_t head = bytesToLine(to[0]);
  std::size_t i = head;
  for (; i + kBlock <= bytes; i += kBlock) {
    typename Simd::Bytes v[Simd::kRowVectors];
    for (std::size_t j = 0; j < Simd::kRowVectors; ++j) v[j] = Simd::load(from + i + j * kVectorBytes);
    if (next != nullptr)
      for (std::size_t j = 0; j < kBlock; j += kLine) Simd::prefetch(next + i + j);
    for (std::size_t p = 0; p < places; ++p)
      for (std::size_t j = 0; j < Simd::kRowVectors; ++j) Simd::stream(to[p] + i + j * kVectorBytes, v[j]);
  }
  for (std::size_t p = 0; p < places; ++p) {
    std::memcpy(to[p], from, head);
    streamCopy(to[p] + i, from + i, bytes - i);
  }
}

// One row, or a piece of it, to all its places. `next`: what will be read after it, or null.
void writePlaces(std::byte* const* to, std::size_t places, const std::byte* from, std::size_t bytes,
                 const std::byte* next, bool streaming) {
  if (!streaming || bytes < kStreamBytes) {
    for (std::size_t p = 0; p < places; ++p) std::memcpy(to[p], from, bytes);
    return;
  }
  bool alike = true;
  for (std::size_t p = 1; p < places; ++p) alike = alike && bytesToLine(to[p]) == bytesToLine(to[0]);
  if (alike) return streamAligned(to, places, from, bytes, next);
  for (std::size_t begin = 0; begin < bytes;) {  // by pieces that stay in the first-level cache
    const std::size_t size = bytes - begin < 2 * kHotBytes ? bytes - begin : kHotBytes;
    for (std::size_t p = 0; p < places; ++p) streamCopy(to[p] + begin, from + begin, size);
    begin += size;
  }
}

void place(const PlaceArgs& args) {
  if (args.rowBytes == 0) return;
  for (std::size_t c = args.begin; c < args.end; ++c) {
    const std::byte* row = sourceRow(args, c);
    const std::byte* next = c + 1 < args.end ? sourceRow(args, c + 1) : nullptr;
    std::byte* to[kMaxPlaces];
    std::size_t places = 0;
    for (std::uint32_t e = args.copies[c].firstEntry; e < args.copies[c + 1].firstEntry; ++e) {
      if (leftOut(args, args.entries[e])) continue;
      to[places] = rowOf(args.bases, args.entries[e], args.destinationStride);
      if (to[places] != nullptr) ++places;
      if (places < kMaxPlaces) continue;
      writePlaces(to, places, row, args.rowBytes, nullptr, args.streaming);
      places = 0;
    }
    if (places != 0) writePlaces(to, places, row, args.rowBytes, next, args.streaming);
  }
}

void move(const MoveArgs& args) {
  const bool streaming = args.streaming;
  moveRows(args, [streaming](std::byte* to, const std::byte* from, std::size_t bytes, const std::byte* next) {
    writePlaces(&to, 1, from, bytes, next, streaming);
  });
}

void fill(void* address, std::size_t bytes) {
  if (bytes == 0) return;
  std::byte* to = static_cast<std::byte*>(address);
  std::size_t i = 0;
  if (bytes >= kStreamFill) {
    i = bytesToLine(to);
    std::memset(to, 0, i);
    for (; i + kLine <= bytes; i += kLine)
      for (std::size_t j = 0; j < kLine; j += kVectorBytes) Simd::stream(to + i + j, Simd::zeroBytes());
  }
  std::memset(to + i, 0, bytes - i);
}

}  // namespace
}  // namespace fusco::exec
