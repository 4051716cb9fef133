// Whole shuffles with ranks as threads, against the naive oracle: one node, and nodes emulated on this machine.
#include <gtest/gtest.h>

#include <functional>

#include "shuffle/case.h"

namespace fusco::test {
namespace {

struct Shape {
  int ranks;
  std::vector<int> nodes;  // by rank
  std::int64_t sliceBytes;
};

void runShape(const Shape& shape, int cases, const std::function<Case(std::uint64_t, int)>& caseOf) {
  const Cases some(cases, shape.ranks);
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess) << fuscoGetLastError(nullptr);
  std::vector<std::string> wrong(static_cast<std::size_t>(shape.ranks));
  runThreads(shape.ranks, [&](int rank) {
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.nodeId = shape.nodes[static_cast<std::size_t>(rank)];
    config.sliceBytes = shape.sliceBytes;
    config.operationTimeoutMs = 20000;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, shape.ranks, id, rank, &config));
    // What a rank finds wrong comes first, then what that does to the others.
    std::string& text = wrong[static_cast<std::size_t>(rank)];
    try {
      for (std::int64_t i = 0; i < some.count && text.empty(); ++i) {
        text = runRank(caseOf(some.seed(i), shape.ranks), comm, rank);
      }
    } catch (const std::exception& e) {
      text = e.what();
    }
    if (!text.empty()) {
      fuscoCommAbort(comm);
      return;
    }
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

void runShape(const Shape& shape, int cases) {
  runShape(shape, cases, [](std::uint64_t seed, int ranks) { return randomCase(seed, ranks); });
}

TEST(ShuffleThreads, oneRank) { runShape({1, {0}, 16384}, 1000); }
TEST(ShuffleThreads, twoRanks) { runShape({2, {0, 0}, 16384}, 2000); }
TEST(ShuffleThreads, threeRanks) { runShape({3, {0, 0, 0}, 16384}, 1500); }
TEST(ShuffleThreads, sevenRanks) { runShape({7, {0, 0, 0, 0, 0, 0, 0}, 16384}, 400); }
TEST(ShuffleThreads, twoNodesOfOne) { runShape({2, {0, 1}, 16384}, 1500); }
TEST(ShuffleThreads, twoNodesOfTwo) { runShape({4, {0, 0, 1, 1}, 16384}, 800); }
TEST(ShuffleThreads, unequalNodes) { runShape({5, {0, 1, 1, 1, 2}, 16384}, 600); }
TEST(ShuffleThreads, longRoutingMaps) { runShape({5, {0, 0, 0, 1, 1}, 16384}, 12, longCase); }
TEST(ShuffleThreads, rowsLargerThanSlices) { runShape({3, {0, 1, 1}, 4096}, 900); }

}  // namespace
}  // namespace fusco::test
