// Kernels of the shuffle that do arithmetic on rows on their way: the cast to FP8 in dispatch, and the backward of
// combine. The arithmetic is that of exec::CastArgs and exec::BackArgs, bit by bit. Conventions as in kernels/launch.h.
#pragma once

#include "kernels/launch.h"

namespace fusco::kernels {

// Dispatch, as launchPlace, of BF16 rows that become FP8 e4m3 with an FP32 scale for each 128 elements. place.rowBytes
// and place.sourceStride are of the BF16 rows (a multiple of 256 bytes), place.destinationStride of the FP8 rows.
struct CastPlaceArgs {
  PlaceArgs place;
  std::byte* scaleBases[kMaxNodeRanks];  // by Entry::rank
  std::size_t scaleStride;
};
int launchCastPlace(const CastPlaceArgs& args, const Budget& budget, void* stream);

// The backward of combine: each gradient row is read once; for each of its entries weight * row is written to
// bases[entry.rank], and its product with the row of the same number under expertBases to dots[token, slot].
struct BackArgs {
  struct Rank {
    PlanPointers plan;
    const std::byte* gradient;  // rows by token
    float* dots;                // [tokens, topk]; only slots with an entry are written
  };
  Rank ranks[kMaxLocalRanks];
  int rankCount;
  int maxTokens;
  int topk;
  std::byte* bases[kMaxNodeRanks];              // by Entry::rank
  const std::byte* expertBases[kMaxNodeRanks];  // the same
  std::size_t elements;                         // of a row
  SumType type;
  // From row to row: of the gradients, and of the rows under both bases. 0: rows are dense.
  std::size_t gradientStride, stride;
};
int launchBack(const BackArgs& args, const Budget& budget, void* stream);

}  // namespace fusco::kernels
