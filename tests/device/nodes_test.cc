// Shuffles of ranks on GPUs of several nodes, with the stand-in for the GPU, against the naive oracle.
#include <gtest/gtest.h>

#include "device/stand_in.h"

namespace fusco::test {
namespace {

struct Shape {
  std::vector<int> nodes;  // by rank
  std::int64_t sliceBytes;
};

void PrintTo(const Shape& shape, std::ostream* out) {
  *out << shape.nodes.size() << "_ranks_on_" << shape.nodes.back() + 1 << "_nodes_slices_of_" << shape.sliceBytes;
}

class DeviceNodes : public ::testing::TestWithParam<Shape> {};

TEST_P(DeviceNodes, isWhatTheOracleSays) {
  const Shape& shape = GetParam();
  const int ranks = static_cast<int>(shape.nodes.size());
  const Cases some(60, ranks);
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess) << fuscoGetLastError(nullptr);
  std::vector<std::string> wrong(shape.nodes.size());
  runThreads(ranks, [&](int rank) {
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    config.nodeId = shape.nodes[static_cast<std::size_t>(rank)];
    config.sliceBytes = shape.sliceBytes;
    config.operationTimeoutMs = 20000;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, ranks, id, rank, &config));
    std::string& text = wrong[static_cast<std::size_t>(rank)];
    try {
      StandInSpace space;
      for (std::int64_t i = 0; i < some.count && text.empty(); ++i)
        text = runRank(randomCase(some.seed(i), ranks), comm, rank, space);
      fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
      FUSCO_OK(fuscoCommGetStatistics(comm, &statistics));
      if (text.empty() && statistics.wireSlices == 0) text = "nothing went by slices";
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

INSTANTIATE_TEST_SUITE_P(Nodes, DeviceNodes,
                         ::testing::Values(Shape{{0, 1}, 16384}, Shape{{0, 0, 1, 1}, 16384},
                                           Shape{{0, 1, 1, 1, 2}, 16384}, Shape{{0, 1, 1}, 4096}));

}  // namespace
}  // namespace fusco::test
