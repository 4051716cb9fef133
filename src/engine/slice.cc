#include "engine/slice.h"

#include <fmt/format.h>

#include <cstring>

#include "base/status.h"

namespace fusco::engine {

using transport::SliceHeader;

namespace {
std::size_t align64(std::size_t n) { return (n + 63) & ~std::size_t{63}; }
}  // namespace

std::size_t sliceRowStride(std::size_t rowBytes) { return align64(rowBytes); }

std::size_t sliceHead(std::size_t rows, std::size_t entries) {
  return align64(sizeof(SliceHeader) + (rows + 1) * sizeof(plan::Copy) +
                 entries * (sizeof(plan::Entry) + sizeof(float)));
}

std::size_t sliceBytes(std::size_t rows, std::size_t entries, std::size_t rowBytes) {
  return sliceHead(rows, entries) + rows * sliceRowStride(rowBytes);
}

static Slice parts(std::byte* slot, std::size_t rows, std::size_t entries, std::size_t payloadOffset) {
  Slice s;
  s.header = reinterpret_cast<SliceHeader*>(slot);
  s.copies = reinterpret_cast<plan::Copy*>(slot + sizeof(SliceHeader));
  s.entries = reinterpret_cast<plan::Entry*>(s.copies + rows + 1);
  s.weights = reinterpret_cast<float*>(s.entries + entries);
  s.payload = slot + payloadOffset;
  return s;
}

Slice layOutSlice(std::byte* slot, SliceKind kind, std::size_t rows, std::size_t entries, std::size_t rowBytes) {
  const std::size_t head = sliceHead(rows, entries);
  Slice s = parts(slot, rows, entries, head);
  *s.header = SliceHeader{};
  s.header->kind = static_cast<std::uint32_t>(kind);
  s.header->rows = static_cast<std::uint32_t>(rows);
  s.header->entries = static_cast<std::uint32_t>(entries);
  s.header->payloadOffset = head;
  s.header->rowBytes = rowBytes;
  return s;
}

Slice readSlice(const std::byte* slot, std::size_t slotBytes) {
  SliceHeader h;
  std::memcpy(&h, slot, sizeof h);
  const std::size_t head = sliceHead(h.rows, h.entries);
  const bool fits = h.payloadOffset == head && head <= slotBytes &&
                    (h.rows == 0 ? h.rowBytes == 0 : h.rowBytes <= (slotBytes - head) / h.rows) &&
                    sliceBytes(h.rows, h.entries, h.rowBytes) <= slotBytes;
  if (!fits) {
    fail(Code::internalError,
         fmt::format(
             "a slice from rank {} does not fit its slot of {} bytes ({} rows of {} bytes, {} entries): the peer runs "
             "another version, or its memory is damaged",
             h.source, slotBytes, h.rows, h.rowBytes, h.entries));
  }
  Slice s = parts(const_cast<std::byte*>(slot), h.rows, h.entries, head);
  std::uint32_t at = 0;
  for (std::uint32_t i = 0; i <= h.rows; ++i) {
    if (s.copies[i].firstEntry < at || s.copies[i].firstEntry > h.entries) {
      fail(Code::internalError,
           fmt::format("a slice from rank {} has its entries out of order at row {}", h.source, i));
    }
    at = s.copies[i].firstEntry;
  }
  return s;
}

std::size_t partBytes(std::size_t rowBytes, std::size_t entries, std::size_t slotBytes) {
  const std::size_t head = sliceHead(1, entries);
  if (head + 64 > slotBytes) {
    fail(Code::invalidUsage,
         fmt::format("slices of {} bytes cannot hold the {} places of one row: raise FUSCO_SLICE_BYTES to at "
                     "least {}",
                     slotBytes, entries, head + 4096));
  }
  const std::size_t room = (slotBytes - head) & ~std::size_t{63};
  return rowBytes <= room ? rowBytes : room;
}

}  // namespace fusco::engine
