// Whole shuffles with ranks as threads on the GPUs of the machine, against the naive oracle: the cases of the host.
#include <gtest/gtest.h>

#include "gpu/space.h"

namespace fusco::test {
namespace {

class GpuShuffle : public GpuTest, public ::testing::WithParamInterface<int> {
 protected:
  static void expectWhatTheOracleSays(std::int64_t cases, int family, int maxSms) {
    const int ranks = GetParam();
    const Cases some(cases, family);
    const std::vector<std::string> wrong = runGpuRanks(
        ranks,
        [&](fuscoComm_t comm, int rank) {
          GpuSpace space;
          space.setRanks(ranks, ranks);
          std::string text;
          for (std::int64_t i = 0; i < some.count && text.empty(); ++i)
            text = runRank(gpuCase(some.seed(i), ranks), comm, rank, space);
          return text;
        },
        maxSms);
    for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
  }
};

TEST_P(GpuShuffle, IsWhatTheOracleSays) { expectWhatTheOracleSays(300, GetParam(), 0); }

// Kernels that have some multiprocessors to themselves are others: they fill these.
TEST_P(GpuShuffle, IsTheSameOnFewMultiprocessors) { expectWhatTheOracleSays(60, 100 + GetParam(), 5); }

INSTANTIATE_TEST_SUITE_P(Ranks, GpuShuffle, ::testing::Values(1, 2, 3, 7, 8));

}  // namespace
}  // namespace fusco::test
