#include "exchange_cost.h"

#include <bit>

namespace fusco::bench {

ExchangeCost exchangeCost(int ranks, int nodes, int smallestNode, int keys) {
  constexpr std::int64_t kCount = 4;  // bytes of a count
  const std::int64_t slice = (keys + smallestNode - 1) / smallestNode;
  const int nodeSize = (ranks + nodes - 1) / nodes;
  ExchangeCost cost{};
  cost.rounds = std::bit_width(static_cast<unsigned>(nodes - 1));  // ceil(log2 nodes)
  cost.sentAcross = 2 * cost.rounds * slice * kCount;
  cost.publishedInNode = keys * kCount;
  // Its slice of all counts of the node; then before and total of all keys.
  cost.readInNode = (slice * nodeSize + 2 * std::int64_t{keys}) * kCount;
  cost.matrix = std::int64_t{ranks} * keys * kCount;
  return cost;
}

}  // namespace fusco::bench
