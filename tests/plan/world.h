// A made-up shuffle of all ranks, and what must become of it, worked out by sorting instead of by the planner.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "plan/plan.h"

namespace fusco::plan::testing {

// A 64-byte aligned block of exactly the asked size, so that a sanitizer sees a byte too much.
struct Arena {
  explicit Arena(std::uint64_t size) : bytes(size), memory(std::aligned_alloc(64, size), &std::free) {}
  const void* get() const { return memory.get(); }
  void* get() { return memory.get(); }
  std::uint64_t bytes;
  std::unique_ptr<void, decltype(&std::free)> memory;
};

struct World {
  Topology topology{{0}};
  Options options;
  int topk = 1;
  int experts = 1;
  int idBytes = 8;
  bool weighted = true;
  std::vector<std::int64_t> tokens;               // [ranks]
  std::vector<std::vector<std::int64_t>> wide;    // ids of each rank
  std::vector<std::vector<std::int32_t>> narrow;  // the same in 32 bits
  std::vector<std::vector<float>> weights;

  RoutingMap map(int rank) const;
  std::int64_t id(int rank, std::int64_t token, int slot) const { return wide[rank][token * topk + slot]; }
};

World randomWorld(std::mt19937& random);
std::string describe(const World& world);

// One delivered row.
struct Row {
  int destination;
  std::int64_t row;
  int source;
  std::int64_t token;
  int slot;
  auto operator<=>(const Row&) const = default;
};

struct Expected {
  std::vector<Exchanged> exchanged;                                // [ranks]
  std::vector<std::vector<std::int32_t>> rowsOfKey;                // [ranks][keys], before any drop
  std::vector<Row> rows;                                           // sorted
  std::vector<std::int64_t> dropped;                               // by source
  std::vector<std::int64_t> receiveRows;                           // by destination
  std::vector<std::vector<std::int64_t>> expertRows, expertStart;  // by destination
};

Expected naive(const World& world);

// The plan of every rank.
std::vector<Arena> planAll(const World& world, const Expected& expected);

}  // namespace fusco::plan::testing
