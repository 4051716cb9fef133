// A staged shuffle as lists: tokens are copied into packed order (by destination rank, then final row), packed pieces
// travel, and what came is sorted into its final rows. Plain numbers, so that a test can walk through them.
#pragma once

#include <cstdint>
#include <vector>

#include "shuffle/oracle.h"

namespace fusco::bench::gpu {

struct StagedLists {
  std::vector<std::vector<std::int32_t>> packed;  // [source][token * topk + slot]: its place in the packed rows, or -1
  std::vector<std::vector<std::int64_t>> count;   // [source][destination]: rows of a piece
  std::vector<std::vector<std::int64_t>> sendAt;  // [source][destination]: where it begins in the packed rows
  std::vector<std::vector<std::int64_t>> arriveAt;  // [destination][source]: where it arrives
  std::vector<std::vector<std::int32_t>> arrived;   // [destination][final row]: where that row arrives

  std::int64_t rowsPacked(int source) const;
};
StagedLists stagedLists(const ShuffleMap& map);

// Copies of a token that go from source to destination if a rank gets one of each token: [source][destination].
std::vector<std::vector<std::int64_t>> distinctCopies(const ShuffleMap& map);

}  // namespace fusco::bench::gpu
