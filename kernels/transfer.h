// The kernel of transfers as the host calls it: bytes from one layout of rows to another, many such copies in one launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/launch.h"

namespace fusco::kernels {

// One end of a copy: where byte `at` of what travels lies. Without a list: at base + at. Else rows of rowBytes bytes, the
// k-th that travels being row list[k].
struct RowEnd {
  std::byte* base;
  const void* list;      // in GPU memory; null: contiguous
  std::size_t rowBytes;  // with a list
  std::size_t start;     // bytes that have travelled before: a copy may be a part of a transfer
  bool narrow;           // the list is of int32, else of int64
};

struct RowCopy {
  RowEnd source, destination;
  std::size_t bytes;
};

inline constexpr int kMaxCopies = 32;  // of one launch

// Copies of one launch must not overlap where one of them writes. Any alignment, any sizes; row numbers are not checked.
int launchCopies(const RowCopy* copies, int count, const Budget& budget, void* stream);

}  // namespace fusco::kernels
