// What the host executors share: who they are, and where a copy's row comes from and goes to.
#pragma once

#include <cstddef>

#include "exec/executor.h"

namespace fusco::exec {

// One for each instruction set. Null where the library was built for another architecture; whether the CPU has the
// instructions is checked by hostExecutor().
Executor* scalarExecutor();
Executor* avx2Executor();
Executor* avx512Executor();

// Throws where the type has no arithmetic (RowType::bytes, or a number that is none of the types).
void requireNumber(RowType type, const char* where);
void checkSum(const SumArgs& args);
void checkBack(const BackArgs& args);
void checkCast(const CastArgs& args);

inline const std::byte* sourceRow(const PlaceArgs& args, std::size_t copy) {
  const std::size_t row = args.packed ? copy - args.begin : args.copies[copy].token;
  return args.source + row * args.sourceStride;
}

inline bool leftOut(const PlaceArgs& args, const plan::Entry& entry) {
  return args.skipDuplicates && (entry.slot & plan::kDuplicate) != 0;
}

// Row `entry.row` under the base of its rank, or null where that rank has none.
inline std::byte* rowOf(std::byte* const* bases, const plan::Entry& entry, std::size_t stride) {
  std::byte* base = bases == nullptr ? nullptr : bases[entry.rank];
  return base == nullptr ? nullptr : base + entry.row * stride;
}

inline const std::byte* rowOf(const std::byte* const* bases, const plan::Entry& entry, std::size_t stride) {
  const std::byte* base = bases == nullptr ? nullptr : bases[entry.rank];
  return base == nullptr ? nullptr : base + entry.row * stride;
}

// Rows by lists on both sides, with `copyRow(to, from, bytes, next)` for each, where `next` is the row to be read after
// it or null; rows that lie end to end on both sides as one.
template <class CopyRow>
void moveRows(const MoveArgs& args, CopyRow copyRow) {
  const bool dense = args.sourceRows == nullptr && args.destinationRows == nullptr &&
                     args.sourceStride == args.rowBytes && args.destinationStride == args.rowBytes;
  if (args.rowBytes == 0 || args.rows == 0) return;
  if (dense) return copyRow(args.destination, args.source, args.rows * args.rowBytes, nullptr);
  auto from = [&args](std::size_t i) {
    const std::int64_t row = args.sourceRows == nullptr ? static_cast<std::int64_t>(i) : args.sourceRows[i];
    return args.source + row * static_cast<std::int64_t>(args.sourceStride);
  };
  for (std::size_t i = 0; i < args.rows; ++i) {
    const std::int64_t to = args.destinationRows == nullptr ? static_cast<std::int64_t>(i) : args.destinationRows[i];
    const std::byte* next = i + 1 < args.rows ? from(i + 1) : nullptr;
    copyRow(args.destination + to * static_cast<std::int64_t>(args.destinationStride), from(i), args.rowBytes, next);
  }
}

}  // namespace fusco::exec
