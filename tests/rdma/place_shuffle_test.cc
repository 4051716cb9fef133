// Whole shuffles whose rows are written to where they belong (FUSCO_IB_PLACE_ROWS=1), in the soft-RoCE machine: 2 nodes
// of 2 ranks, a NIC for each.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>

#include "rdma/routed.h"
#include "shuffle/case.h"
#include "shuffle/ranks.h"

namespace fusco::test {
namespace {

constexpr int kRanks = 4, kExperts = 8, kTopk = 3, kTokens = 60;
constexpr std::size_t kRow = 4096, kSlice = 32768;
constexpr int kSlots = 4;

// What is left of a run, in memory that the ranks share with the test.
struct Kept {
  std::uint64_t rows[kRanks], sums[kRanks];  // of dispatch and combine, hashed
  std::uint64_t placed[kRanks];              // rows that processors wrote
};

// Tokens of a rank with their experts; some of them want two on one rank, and most want several of a node.
Routed routedOf(int rank) { return {static_cast<unsigned>(77 + rank), kTokens, kTopk, kExperts}; }

// Rows that come from the other node to this one, and are the first of their token there.
std::uint64_t firstRowsInto(int node) {
  std::uint64_t rows = 0;
  for (int rank = 2 * (1 - node); rank < 2 * (1 - node) + 2; ++rank) {
    const Routed routed = routedOf(rank);
    for (int t = 0; t < kTokens; ++t) rows += routed.wants(t, node) ? 1 : 0;
  }
  return rows;
}

void shuffle(Rank& self, fuscoComm_t comm, Kept& kept) {
  const int rank = self.rank();
  const Routed routed = routedOf(rank);
  const fuscoPlan_t plan = routed.plan(comm);
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  FUSCO_OK(fuscoPlanGetInfo(plan, &info));
  const std::size_t bytes = static_cast<std::size_t>(info.receiveRows) * kRow;
  void *input = nullptr, *rows = nullptr;
  FUSCO_OK(fuscoMemAlloc(&input, kTokens * kRow));
  FUSCO_OK(fuscoMemAlloc(&rows, bytes));
  fillNumbers(input, kTokens * kRow, static_cast<unsigned>(rank + 1));
  std::vector<std::uint8_t> sums(kTokens * kRow);
  fuscoStatistics_t before = FUSCO_STATISTICS_INIT, after = FUSCO_STATISTICS_INIT;
  FUSCO_OK(fuscoCommGetStatistics(comm, &before));
  FUSCO_OK(fuscoDispatch(plan, input, rows, kRow, nullptr));
  FUSCO_OK(fuscoCommGetStatistics(comm, &after));
  FUSCO_OK(fuscoCombine(plan, rows, sums.data(), kRow / 2, fuscoBfloat16, nullptr));
  kept.rows[rank] = hashOf(rows, bytes);
  kept.sums[rank] = hashOf(sums.data(), sums.size());
  kept.placed[rank] = after.rowsPlaced - before.rowsPlaced;
  FUSCO_OK(fuscoPlanDestroy(plan));
  FUSCO_OK(fuscoMemFree(input));
  FUSCO_OK(fuscoMemFree(rows));
}

// Several steps, each with windows of its own, which come and go.
Kept run(const char* net, bool place) {
  void* const memory = mmap(nullptr, sizeof(Kept), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("mmap");
  auto* const kept = new (memory) Kept{};
  World world{net, kRanks, 1, {0, 0, 1, 1}, true, kSlice};
  const std::vector<std::string> wrong = runRanks(world, [&](Rank& self) {
    setenv("FUSCO_NET", net, 1);
    setenv("FUSCO_IB_PLACE_ROWS", place ? "1" : "0", 1);
    setenv("FUSCO_LANES", "2", 1);
    setenv("FUSCO_IB_HCA", self.world().nodeOf(self.rank()) == 0 ? "=rxe0,rxe1" : "=rxe2,rxe3", 1);
    fuscoComm_t comm = self.connect();
    for (int step = 0; step < 3; ++step) shuffle(self, comm, *kept);
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << net << (place ? ", placed" : "");
  const Kept result = *kept;
  munmap(memory, sizeof(Kept));
  return result;
}

// The bits of the ring and of shared memory; and of the rows that come in, processors write those alone that were on
// their way before the places were known (a ring of them for each sender), and further places of a token.
TEST(RdmaPlaces, SameBitsAndNoScatter) {
  const Kept placed = run("verbs", true), ring = run("verbs", false), shared = run("shm", false);
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(placed.rows[rank], shared.rows[rank]) << rank;
    EXPECT_EQ(placed.sums[rank], shared.sums[rank]) << rank;
    EXPECT_EQ(ring.rows[rank], shared.rows[rank]) << rank;
    EXPECT_EQ(ring.sums[rank], shared.sums[rank]) << rank;
  }
  for (int node = 0; node < 2; ++node) {
    const auto of = [&](const Kept& kept) { return kept.placed[2 * node] + kept.placed[2 * node + 1]; };
    const std::uint64_t byNic = of(ring) - of(placed), first = firstRowsInto(node);
    const std::uint64_t ofRings = 2 * kSlots * (kSlice / kRow);
    EXPECT_LE(byNic, first);
    EXPECT_GE(byNic + ofRings, first);
    EXPECT_GT(byNic, first / 4);
    std::printf("node %d: of %d rows that came, %d were written by the NIC to their first place\n", node,
                static_cast<int>(first), static_cast<int>(byNic));
  }
}

// Random shapes: private and staged tensors, casts, capacities, tickets, slotted layouts, two at once.
TEST(RdmaPlaces, RandomCases) {
  const World world{"places", 4, 1, {0, 0, 1, 1}, true, kSlice};
  const std::vector<std::string> wrong = runRanks(world, [&](Rank& self) {
    setenv("FUSCO_NET", "verbs", 1);
    setenv("FUSCO_IB_PLACE_ROWS", "1", 1);
    setenv("FUSCO_IB_HCA", self.world().nodeOf(self.rank()) == 0 ? "=rxe0" : "=rxe2", 1);
    fuscoComm_t comm = self.connect();
    for (std::uint64_t i = 0; i < 6; ++i) {
      Case one = randomCase(61000 + i, 4), other = randomCase(62000 + i, 4);
      one.rowBytes = other.rowBytes = 4096 + 64 * (i % 3);
      const std::string text = i % 2 == 0 ? runRank(one, comm, self.rank()) : runTwo(one, other, comm, self.rank());
      if (text.empty()) continue;
      fuscoCommAbort(comm);
      throw std::runtime_error(text);
    }
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  for (const std::string& text : wrong) EXPECT_EQ(text, "");
}

}  // namespace
}  // namespace fusco::test
