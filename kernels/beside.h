// What a plan on a GPU holds beside its received rows, and the kernels that fill it: gaps of the output, tickets,
// counters of complete rows, and what the rank-order layout says of each row. Conventions as in kernels/launch.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/launch.h"

namespace fusco::kernels {

// Where a received row came from (the same bytes as fuscoTicket_t). source -1: no row.
struct TicketRow {
  std::int32_t source;
  std::int32_t token;
  std::int32_t slot;
  float weight;
  std::uint32_t primary;
};
static_assert(sizeof(TicketRow) == 20);

// A rank's counters: [localExperts] complete rows of each expert; behind them int32 [localExperts + 1], the first row
// of each.
struct BesideBoard {
  std::uint64_t* counters;
  std::int32_t localExperts;
  std::int32_t firstExpert;
};

// One rank's memory beside its rows. What is null is not wanted.
struct BesideRows {
  BesideBoard board;
  TicketRow* tickets;
  std::int32_t* localIds;  // rank order: [rows, topk]
  float* weights;          // rank order: [rows, topk]
};

// Zeroes the rows between an expert's last and the next one's first.
struct GapsArgs {
  struct Rank {
    const std::int32_t* rows;    // [experts]: received
    const std::int32_t* starts;  // [experts + 1]
    int experts;
    std::byte* outputs[2];
  };
  Rank ranks[kMaxLocalRanks];
  int rankCount;
  int mostExperts;  // of a rank
  int mostRows;     // of a gap
  std::size_t rowBytes[2];
};
int launchGaps(const GapsArgs& args, const Budget& budget, void* stream);

// Before a dispatch: counters begin at zero and learn where experts begin, tickets say that there are no rows.
struct ResetArgs {
  struct Rank {
    BesideBoard board;
    TicketRow* tickets;
    const std::int32_t* starts;  // from the arena
    std::size_t rows;            // that have a ticket
  };
  Rank ranks[kMaxLocalRanks];
  int rankCount;
};
int launchReset(const ResetArgs& args, const Budget& budget, void* stream);

// After the rows of a dispatch have been written: each rank of the launch describes the rows that it has sent.
struct DescribeArgs {
  struct Rank {
    PlanPointers plan;
    const void* ids;       // rank order: [tokens, topk], as the routing map was
    const float* weights;  // the same, or null
    int idBytes;
  };
  Rank ranks[kMaxLocalRanks];
  int rankCount;
  int maxTokens;
  int topk;
  bool oneGpu;                     // nobody but this GPU looks at counters
  BesideRows rows[kMaxNodeRanks];  // by Entry::rank
};
int launchDescribe(const DescribeArgs& args, const Budget& budget, void* stream);

// Dispatch, as launchPlace, that counts each row as soon as it is complete: whoever reads a counter (acquire) finds so
// many rows of the expert written.
struct CountedPlaceArgs {
  PlaceArgs place;
  bool oneGpu;
  BesideBoard boards[kMaxNodeRanks];  // by Entry::rank
};
int launchCountedPlace(const CountedPlaceArgs& args, const Budget& budget, void* stream);

}  // namespace fusco::kernels
