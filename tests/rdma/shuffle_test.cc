// Whole shuffles in the soft-RoCE machine: two nodes of two ranks, each node with two NICs of its own, two lanes. The
// results are held against the naive oracle bit by bit, as over every other medium.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include "shuffle/case.h"
#include "shuffle/ranks.h"

namespace fusco::test {
namespace {

// Before the first call of the library in this process.
void takeNics(const Rank& self) {
  setenv("FUSCO_NET", "verbs", 0);  // or what is asked for, to compare
  setenv("FUSCO_LANES", "2", 1);
  setenv("FUSCO_IB_HCA", self.world().nodeOf(self.rank()) == 0 ? "=rxe0,rxe1" : "=rxe2,rxe3", 1);
}

World nodes(const char* name, std::vector<int> nodeOf, std::int64_t sliceBytes = 16384) {
  World world{name, static_cast<int>(nodeOf.size()), 1, {}, true, sliceBytes};
  world.nodes = std::move(nodeOf);
  return world;
}

void runWorld(const World& world, std::int64_t cases, bool two) {
  const Cases some(two ? 2 * cases : cases, 900 + world.ranks);
  const std::vector<std::string> wrong = runRanks(
      world,
      [&](Rank& self) {
        takeNics(self);
        fuscoComm_t comm = self.connect();
        for (std::int64_t i = 0; i < some.count; i += two ? 2 : 1) {
          const auto caseOf = [&](std::int64_t k) { return randomCase(some.seed(k), world.ranks); };
          const std::string text =
              two ? runTwo(caseOf(i), caseOf(i + 1), comm, self.rank()) : runRank(caseOf(i), comm, self.rank());
          if (!text.empty()) {
            fuscoCommAbort(comm);
            throw std::runtime_error(text);
          }
        }
        FUSCO_OK(fuscoCommFinalize(comm));
        FUSCO_OK(fuscoCommDestroy(comm));
      },
      static_cast<int>(60 + 2 * some.count));
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

TEST(RdmaShuffle, TwoNodesOfTwo) { runWorld(nodes("two nodes of two", {0, 0, 1, 1}), 8, false); }
TEST(RdmaShuffle, SmallSlices) { runWorld(nodes("small slices", {0, 1, 1}, 4096), 6, false); }
TEST(RdmaShuffle, TwoBatchesAtOnce) { runWorld(nodes("two batches", {0, 0, 1, 1}), 3, true); }

}  // namespace
}  // namespace fusco::test
