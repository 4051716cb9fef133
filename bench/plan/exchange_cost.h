// What the exchange between analysis and plan costs each rank: each source needs, for each key (an expert, or in rank
// order a rank), the rows of all lower ranks and of all ranks. By formula; the engine's counters can be held against
// it.
//
// In a node, through mapped memory: each rank publishes its counts; rank j scans slice j of the keys over its node's
// ranks. Across nodes, ceil(log2 nodes) rounds of a scan (Hillis and Steele) over node sums, lower and higher nodes at
// once: in each round a rank sends its slice both ways. Then each rank reads the slices of its node's ranks.
#pragma once

#include <cstdint>

namespace fusco::bench {

struct ExchangeCost {
  int rounds;                    // one after the other, across nodes
  std::int64_t sentAcross;       // bytes that a rank sends to other nodes
  std::int64_t publishedInNode;  // bytes that a rank writes for its node
  std::int64_t readInNode;       // bytes that a rank reads from its node
  std::int64_t matrix;           // bytes that a rank would take in if all counts went to all ranks
};

// smallestNode: ranks of the smallest node; that many slices are cut.
ExchangeCost exchangeCost(int ranks, int nodes, int smallestNode, int keys);

}  // namespace fusco::bench
