// How a row crosses a link between GPUs of a node once, though several experts of one GPU want it: a dispatch brings it
// to the first of them and the receiving GPU makes the other copies (launchExpand); before a combine the GPU of the
// experts adds up its rows of a token and brings the sum (launchPartial). Conventions as in kernels/launch.h.
//
// Both may run beside what they wait for. A word in memory of the waiting GPU says that a piece of a row is there: 0
// while nobody uses it, set to 1 by the GPU that brings the piece, set back by the one that waits. Launches that wait
// leave room on the multiprocessors for those that do not, so that GPUs do not wait for each other in a circle
// (docs/design.md says how many at a time).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/launch.h"

namespace fusco::kernels {

inline constexpr int kMaxSources = 32;  // ranks on other GPUs that a launch takes rows of

// A rank on another GPU: its plan is read over the link.
struct AcrossSource {
  PlanPointers plan;
  std::uint32_t firstUnit;  // among the arrivals of this GPU
};

// Copies of rows that have come from other GPUs, to the entries that launchPlace left out there.
struct ExpandArgs {
  AcrossSource sources[kMaxSources];
  int sourceCount;
  std::byte* bases[kMaxNodeRanks];  // by Entry::rank; null: not a rank of this GPU
  std::size_t rowBytes;             // a multiple of 16, and so are the bases
  int maxTokens;                    // most tokens of a source
  RowPieces pieces;                    // as the senders have them
  std::uint32_t* arrivals;          // null: all rows are there
  ArrivalWait wait;
};
int launchExpand(const ExpandArgs& args, const Budget& budget, void* stream);

// Sums of the rows that tokens of other GPUs' ranks have here: FP32 by slot, rounded once, brought to home's
// `partials`.
struct PartialArgs {
  struct Home {
    AcrossSource from;
    std::byte* partials;      // [tokens, mostPartials] rows on its GPU
    std::uint32_t* arrivals;  // a word for each piece of these; null: nobody is told
  };
  Home homes[kMaxSources];
  int homeCount;
  const std::byte* bases[kMaxNodeRanks];  // by Entry::rank; null: not a rank of this GPU
  std::size_t elements;
  SumType type;
  bool weighted;
  int maxTokens;  // most tokens of a home
  RowPieces pieces;
  int mostPartials;
};
int launchPartial(const PartialArgs& args, const Budget& budget, void* stream);

}  // namespace fusco::kernels
