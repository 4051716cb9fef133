// The kernels as the host calls them: one argument struct for each, plain C++. A launch function takes a cudaStream_t
// as void* and returns a cudaError_t as int. Nothing here waits, allocates or synchronises, and launch shapes depend on
// capacities and the SM budget only: counts are read on the device, from plan arenas.
//
// A launch works for one or more ranks that share a GPU ("local" ranks). They need not wait for each other inside a
// kernel: the end of a launch is their barrier (docs/design.md). Pointers may lead into any memory that the GPU has
// mapped, a peer's included.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/layout.h"

namespace fusco::kernels {

inline constexpr int kMaxLocalRanks = 16;  // ranks of one launch
inline constexpr int kMaxNodeRanks = 72;   // ranks whose memory a launch reaches: a rack of one NVLink fabric

// What a kernel reads of a rank's plan: pointers into its arena in GPU memory. The copies of one flow are worked on.
struct PlanPointers {
  const plan::ArenaHeader* header;
  const plan::Flow* flow;
  const plan::Copy* copies;
  const plan::Entry* entries;
  const float* weights;
};

// How much of the GPU a launch may take. 0: all of it.
struct Budget {
  int blocks = 0;  // counted over all local ranks: one block takes one SM
};

// Bounds of a wait for another GPU. A launch that gives up says so, and leaves its output as it is.
struct ArrivalWait {
  std::uint64_t nanoseconds;
  const std::uint32_t* abort;  // leave when it is not 0
  std::uint32_t* failed;       // set to 1 by a launch that gave up; nobody waits for long then
};

// Pieces that a row crosses links in (kernels/across.h). Copies are made of whole rows where these fit a buffer:
// waiting for a store to end costs more than a warp that is idle. Sums are cut finer when there are few tokens: into
// about `wanted` pieces of all tokens, of `least` bytes or more.
struct RowPieces {
  unsigned bytes;  // of all but the last
  unsigned count;
};
inline constexpr std::size_t kMostPieceBytes = 14336;
constexpr RowPieces wholePieces(std::size_t rowBytes) {
  const std::size_t bytes = rowBytes < kMostPieceBytes ? rowBytes : kMostPieceBytes;
  return {static_cast<unsigned>(bytes), static_cast<unsigned>((rowBytes + bytes - 1) / bytes)};
}
constexpr RowPieces piecesOf(std::size_t rowBytes, std::int64_t tokens, std::int64_t wanted, std::size_t least) {
  constexpr std::size_t kStep = 512;
  const auto ofRow = static_cast<std::size_t>((wanted + tokens) / (tokens + 1));
  std::size_t bytes = (rowBytes + ofRow - 1) / ofRow;
  bytes = (bytes + kStep - 1) / kStep * kStep;
  bytes = bytes < least ? least : bytes > kMostPieceBytes ? kMostPieceBytes : bytes;
  if (bytes > rowBytes) bytes = rowBytes;
  return {static_cast<unsigned>(bytes), static_cast<unsigned>((rowBytes + bytes - 1) / bytes)};
}

// Dispatch in a node: each row of a flow is read once and written to bases[entry.rank] + entry.row * destinationStride
// for all of its entries.
struct PlaceArgs {
  struct Rank {
    PlanPointers plan;
    const std::byte* source;  // rows by token
  };
  Rank ranks[kMaxLocalRanks];
  int rankCount;
  int maxTokens;                                          // most tokens of a local rank; shapes the launch
  std::byte* bases[kMaxNodeRanks];                        // by Entry::rank; null: entries for that rank are left out
  std::size_t sourceStride, destinationStride, rowBytes;  // any numbers
  bool skipDuplicates;                                    // leave out entries with kDuplicate
  // Rows that cross a link once (kernels/across.h): GPUs that are told when a copy that has duplicates there has come.
  bool across;  // without it nothing of this is read
  RowPieces pieces;
  bool expands[kMaxNodeRanks];              // by Entry::rank: its duplicates are left out
  std::uint32_t* arrivals[kMaxNodeRanks];   // by Entry::rank, of its GPU; null: nobody is told
  std::uint32_t firstUnit[kMaxLocalRanks];  // among these
};
// Whether rows of this shape can be placed with `across` on the current GPU.
bool placesAcross(const PlaceArgs& args);
int launchPlace(const PlaceArgs& args, const Budget& budget, void* stream);

// Combine in a node: out[t] = bias[t] + sum over the entries of token t, by rank, then slot, of weight * row, with the
// arithmetic of exec::SumArgs. Tokens without an entry get their bias, or zeros.
enum class SumType : int { f16 = 6, f32 = 7, bf16 = 9 };  // numeric values of fuscoDataType_t
struct SumArgs {
  struct Rank {
    PlanPointers plan;
    std::byte* out;         // rows by token
    const std::byte* bias;  // rows by token, or null
  };
  Rank ranks[kMaxLocalRanks];
  int rankCount;
  int maxTokens;
  int topk;
  const std::byte* bases[kMaxNodeRanks];  // by Entry::rank
  std::size_t elements;                   // of a row; rows are dense
  SumType type;
  bool weighted;
  // Sums that other GPUs bring (kernels/across.h), instead of the rows of their ranks.
  bool across;  // without it nothing of this is read
  RowPieces pieces;
  bool brings[kMaxNodeRanks];                 // by Entry::rank
  const std::byte* partials[kMaxLocalRanks];  // of each local rank: [tokens, mostPartials]
  std::uint32_t* arrivals[kMaxLocalRanks];    // a word for each piece of these; null: all are there
  int mostPartials;
  ArrivalWait wait;
};
int launchSum(const SumArgs& args, const Budget& budget, void* stream);
// Whether a launch within a budget, and one of launchPartial for the same rows, makes the most of the multiprocessors
// that it is given on the current GPU.
bool sumFillsMultiprocessors(const SumArgs& args);

// Sums of rows that lie anywhere and may differ in type (partial sums of other nodes): exec::SumArgs as it is, with its
// lists in memory of the GPU. The same arithmetic as launchSum.
struct Term {
  const std::byte* row;
  float weight;
  SumType type;
};
struct TermSumArgs {
  std::byte* const* out;         // [rows]
  const std::byte* const* bias;  // [rows], or null; a null entry: none
  const Term* terms;
  const std::uint32_t* first;  // [rows + 1]
  int rows;
  std::size_t elements;  // of a row
  SumType type;          // of out and bias
};
int launchTermSum(const TermSumArgs& args, const Budget& budget, void* stream);

}  // namespace fusco::kernels
