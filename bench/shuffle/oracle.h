// The naive shuffle: what every rank must end up with, computed from all ranks' routing maps, one slot after the other.
// It shares no code with the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "shuffle/data.h"
#include "shuffle/options.h"
#include "shuffle/routing.h"

namespace fusco::bench {

struct Slot {
  std::int32_t source;
  std::int32_t token;
  std::int32_t slot;
};

// Where every routed slot of every rank goes, in expert order: by local expert, source rank, token, slot.
struct ShuffleMap {
  int ranks = 0, topk = 0, experts = 0;
  std::vector<Routing> routing;                // [ranks]
  std::vector<std::vector<Slot>> received;     // [ranks][rows]: which slot each row of a rank's output is
  std::vector<std::vector<std::int32_t>> row;  // [ranks][tokens * topk]: the slot's row at its expert's rank, or -1

  std::int64_t rowsOf(int rank) const { return static_cast<std::int64_t>(received[rank].size()); }
  std::int64_t busiestRows() const;   // received
  std::int64_t busiestSlots() const;  // routed slots of a rank's own tokens
  std::int64_t mostTokens() const;
};
ShuffleMap naiveShuffle(const RoutingSource& source, std::int64_t tokens, int ranks);

// A part of a rank's send buffer and its place in another rank's receive buffer, in bytes.
struct Move {
  std::int32_t destination;
  std::uint64_t from, to, bytes;
};

// The three operations without a routing map. Buffers of `bytes` a rank, in elements of `elementBytes`.
//  alltoallv: uneven blocks, about bytes / ranks each.  gathersend: rows of rowBytes, as many for each rank, from rows
//  in random order to rows in random order.  sendrecv: all of it to the next rank.
struct MoveMap {
  std::uint64_t rowBytes = 1;                          // gathersend; else the element size
  std::vector<std::vector<Move>> moves;                // [ranks], in order of destination
  std::vector<std::uint64_t> sendBytes, receiveBytes;  // [ranks]
  std::uint64_t busiestBytes() const;                  // received
};
MoveMap naiveMoves(Op op, std::uint64_t bytes, std::size_t elementBytes, std::uint64_t rowBytes, int ranks,
                   std::uint64_t seed);

// What `rank` must hold, compared element by element; the number of wrong elements.
std::uint64_t wrongInDispatch(const ShuffleMap& map, int rank, const std::byte* output, std::size_t rowBytes, Type type,
                              std::uint64_t seed);
std::uint64_t wrongInMoves(const MoveMap& map, int rank, const std::byte* output, Type type, std::uint64_t seed);
// Combine against float64: |error| <= (levels * u + K * 2^-24) * sum |w x|, where u is the type's unit of rounding,
// levels the number of roundings on the way, and K * 2^-24 what adding K terms in FP32 may cost. NaN is wrong.
std::uint64_t wrongInCombine(const ShuffleMap& map, int rank, const std::byte* output, std::int64_t hidden, Type type,
                             int levels, std::uint64_t seed);

// Inputs of a rank.
void fillTokens(std::byte* out, const ShuffleMap& map, int rank, std::size_t rowBytes, Type type, std::uint64_t seed);
void fillExpertRows(std::byte* out, const ShuffleMap& map, int rank, std::size_t rowBytes, Type type,
                    std::uint64_t seed);

}  // namespace fusco::bench
