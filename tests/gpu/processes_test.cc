// Ranks in processes of their own that share a GPU: they reach each other's memory by CUDA IPC. The process of the test
// itself never touches CUDA, since a fork would inherit it.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include "gpu/space.h"
#include "shuffle/ranks.h"

namespace fusco::test {
namespace {

class GpuProcesses : public ::testing::Test {
 protected:
  void SetUp() override {
    const World probe{"probe", 1, 1, {}, true, 16384};
    const std::string why = runRanks(probe, [](Rank&) {
                              const std::string none = noGpu();
                              if (!none.empty()) throw std::runtime_error(none);
                            }).front();
    if (!why.empty()) GTEST_SKIP() << why;
  }
};

fuscoConfig_t onGpu(const Rank& self) {
  fuscoConfig_t config = self.config();
  config.device = fuscoDeviceCuda;
  return config;
}

void runWorld(const World& world, std::int64_t cases) {
  const Cases some(cases, 600 + world.ranks);
  const std::vector<std::string> wrong = runRanks(
      world,
      [&](Rank& self) {
        fuscoComm_t comm = self.connect(0, onGpu(self));
        {
          GpuSpace space;
          for (std::int64_t i = 0; i < some.count; ++i) {
            const std::string text = runRank(randomCase(some.seed(i), world.ranks), comm, self.rank(), space);
            if (text.empty()) continue;
            fuscoCommAbort(comm);
            throw std::runtime_error(text);
          }
          self.barrier();
        }
        FUSCO_OK(fuscoCommFinalize(comm));
        FUSCO_OK(fuscoCommDestroy(comm));
      },
      static_cast<int>(60 + some.count / 2));
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

TEST_F(GpuProcesses, TwoRanks) { runWorld({"two", 2, 1, {}, true, 16384}, 60); }
TEST_F(GpuProcesses, FourRanks) { runWorld({"four", 4, 1, {}, true, 16384}, 30); }
TEST_F(GpuProcesses, TwoProcessesOfTwoThreads) { runWorld({"two of two threads", 4, 2, {}, true, 16384}, 30); }

TEST_F(GpuProcesses, TwoNodesOfTwoProcesses) { runWorld({"two nodes of two", 4, 1, {0, 0, 1, 1}, true, 16384}, 20); }

// A rank that dies is told of, and the others' contexts live: they go on shuffling without it.
TEST_F(GpuProcesses, AKilledRankLeavesTheOthersAlive) {
  const World world{"three, one is killed", 3, 1, {}, true, 16384};
  const std::vector<std::string> ends = runRanks(
      world,
      [&](Rank& self) {
        fuscoConfig_t config = onGpu(self);
        config.operationTimeoutMs = 10000;
        fuscoComm_t comm = self.connect(0, config);
        GpuSpace space;
        const std::string first = runRank(randomCase(4003, 3), comm, self.rank(), space);
        if (!first.empty()) throw std::runtime_error(first);
        self.barrier();
        if (self.rank() == 2) kill(getpid(), SIGKILL);
        std::string text;
        try {
          text = runRank(randomCase(5003, 3), comm, self.rank(), space);
        } catch (const std::exception& e) {
          text = e.what();
        }
        requireContains(text, "rank 2");
        FUSCO_OK(fuscoCommDestroy(comm));
        CUDA_OK(cudaDeviceSynchronize());
        fuscoUniqueId id;
        FUSCO_OK(fuscoGetUniqueId(&id));
        fuscoComm_t alone = nullptr;
        FUSCO_OK(fuscoCommInitRankConfig(&alone, 1, id, 0, &config));
        const std::string last = runRank(randomCase(6001, 1), alone, 0, space);
        if (!last.empty()) throw std::runtime_error(last);
        FUSCO_OK(fuscoCommDestroy(alone));
      },
      60);
  EXPECT_EQ(ends[0], "");
  EXPECT_EQ(ends[1], "");
  EXPECT_NE(ends[2].find("killed by signal 9"), std::string::npos) << ends[2];
}

}  // namespace
}  // namespace fusco::test
