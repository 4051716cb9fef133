// Executors move and sum rows in memory. They know addresses and row lists, neither plans, peers nor links.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/layout.h"

namespace fusco::exec {

enum class RowType : int {
  bytes = 0,
  f16 = 6,
  f32 = 7,
  bf16 = 9
};  // numeric values of fuscoDataType_t where they exist
std::size_t elementBytes(RowType type);

// Place: row `token` of `source` (or, when `packed`, row i - begin) is read once and written to its entries' rows:
// bases[entry.rank] + entry.row * destinationStride. Source and destination never overlap.
struct PlaceArgs {
  const std::byte* source = nullptr;
  std::size_t sourceStride = 0;          // bytes from row to row
  bool packed = false;                   // source rows lie in the order of the copies, not by token
  const plan::Copy* copies = nullptr;    // copies[end].firstEntry must be readable
  const plan::Entry* entries = nullptr;  // indexed by Copy::firstEntry
  std::size_t begin = 0, end = 0;        // range of copies
  std::byte* const* bases = nullptr;     // by Entry::rank; null: entries for that rank are left out
  std::size_t destinationStride = 0;
  std::size_t rowBytes = 0;     // bytes to move of each row, any number
  bool skipDuplicates = false;  // leave out entries with kDuplicate
  bool streaming = true;        // destination will not be read soon: non-temporal stores where that pays
};

// A term of a sum. `type` may differ from the sum's row type (FP32 partials).
struct Term {
  const void* row;
  float weight;
  RowType type;
};

// Sum: out row i = bias row i + sum over terms [first[i], first[i+1]) of weight * row, in that order, in FP32 with one
// rounding (to nearest even) at the end. No terms and no bias: zeros. For each element the arithmetic is
//   acc = bias or +0;  for each term: acc = fma(weight, x, acc), one FP32 rounding;  out = round(acc)
// whatever the instruction set, and every NaN result is the quiet NaN of the type (0x7fc0, 0x7e00, 0x7fc00000), so that
// all executors give the same bits.
struct SumArgs {
  std::byte* const* out = nullptr;         // [rows]
  const std::byte* const* bias = nullptr;  // [rows] or null; of type outType; a null entry: none
  const Term* terms = nullptr;
  const std::uint32_t* first = nullptr;  // [rows + 1]
  std::size_t rows = 0;
  std::size_t elements = 0;  // per row
  RowType outType = RowType::bf16;
  bool streaming = true;
};

// Back: for the backward of combine. For each copy, its gradient row g (read once) is scaled and written to the rows of
// its entries: weight * g (rounded to FP32, then to the type), and dot = sum(g * expertRow) is stored for each entry,
// where expertRow is the row of the same index under expertBases. Without a base the row is not written, without an
// expert base or `dots` the product is not taken. A dot product is 32 partial sums, element i added by fma to partial i
// mod 32, folded in halves (p[i] += p[i + 16], then 8, 4, 2, 1): the same bits from all executors.
struct BackArgs {
  PlaceArgs place;                                // rowBytes = elements * elementBytes(type)
  const float* weights = nullptr;                 // beside entries; null: 1
  const std::byte* const* expertBases = nullptr;  // by Entry::rank
  std::size_t expertStride = 0;
  RowType type = RowType::bf16;
  float* dots = nullptr;  // beside entries; indexed like entries
};

// Cast: as place, but each BF16 row of `elements` becomes FP8 e4m3 with one FP32 scale per 128 elements
// (scale = max |x| / 448, at least 1e-4 / 448; value = round(x / scale), to nearest even, saturating). The scale
// follows the finite elements; infinities become +-448, NaN 0x7f. `elements` is a multiple of 128; place.rowBytes is
// not used.
struct CastArgs {
  PlaceArgs place;  // source rows are BF16; destinationStride is of the FP8 rows
  std::size_t elements = 0;
  std::byte* const* scaleBases = nullptr;  // by Entry::rank
  std::size_t scaleStride = 0;             // bytes from row to row of scales (elements / 128 * 4 when dense)
};

// Rows by lists on both sides: row sourceRows[i] (or i when null) to destinationRows[i] (or i when null).
struct MoveArgs {
  const std::byte* source = nullptr;
  std::byte* destination = nullptr;
  std::size_t sourceStride = 0, destinationStride = 0, rowBytes = 0, rows = 0;
  const std::int64_t* sourceRows = nullptr;
  const std::int64_t* destinationRows = nullptr;
  bool streaming = false;
};

// Memory of the library (the payload of a slice) as an executor's rows see it: on the host the memory itself; for a GPU
// that cannot reach it a copy in its own memory. Used once at a time: in() or out(), the calls that read or write
// there, close(), and then done() until it says so; one that is used again before that waits.
class Passage {
 public:
  virtual ~Passage() = default;
  // Where calls find these bytes. The memory stays as it is until done().
  virtual const std::byte* in(const std::byte* memory, std::size_t /*bytes*/) { return memory; }
  // Where calls are to write what belongs into the memory; it lies there when done() says so.
  virtual std::byte* out(std::byte* memory, std::size_t /*bytes*/) { return memory; }
  // All calls that use it have been made.
  virtual void close() {}
  // They have ended.
  virtual bool done() { return true; }
};

class Executor {
 public:
  virtual ~Executor() = default;
  virtual void place(const PlaceArgs& args) = 0;
  virtual void sum(const SumArgs& args) = 0;
  virtual void back(const BackArgs& args) = 0;
  virtual void cast(const CastArgs& args) = 0;
  virtual void move(const MoveArgs& args) = 0;
  virtual void fill(void* address, std::size_t bytes) = 0;  // zeros
  // Makes what was written visible to whoever is told afterwards (a store fence where non-temporal stores were used).
  virtual void fence() = 0;
  virtual const char* name() const = 0;  // "avx512", "avx2", "scalar", "cuda"
  // Whether calls return before their work is done: in order, and complete after fence(). Lists may be reused at once.
  virtual bool defers() const { return false; }
  // The passage with this number, made when first asked for; lives as long as the executor.
  virtual Passage& passage(std::uint64_t number);
};

// The best executor for this CPU; and, for tests, the one of a given name (null if this CPU has not got it).
Executor& hostExecutor();
Executor* hostExecutor(const char* name);

}  // namespace fusco::exec
