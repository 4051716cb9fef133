// Paths between GPUs as NVML tells them, with a double of it that has been loaded before.
#include "exec/nvml.h"

#include <gtest/gtest.h>

#include "base/bus_id.h"
#include "exec/nvml_double.h"

namespace fusco::exec {
namespace {

std::uint32_t gpu(unsigned number) { return busId(1, 0x10 + number, 2); }

class Nvml : public ::testing::Test {
 protected:
  Nvml() {
    for (int from = 0; from < 4; ++from) {
      for (int to = 0; to < 4; ++to) {
        for (int capability : {0, 1}) sayStatus(from, to, capability, 0);
      }
    }
  }
};

TEST_F(Nvml, tellsOfAllOthersThatItShows) {
  const std::vector<NvmlPath> paths = nvmlPaths(gpu(1));
  ASSERT_EQ(paths.size(), 2u);
  EXPECT_EQ(paths[0].gpu, gpu(0));
  EXPECT_EQ(paths[1].gpu, gpu(2));
  EXPECT_TRUE(paths[0].there && paths[1].there);
}

TEST_F(Nvml, knowsNothingOfOtherGpus) {
  EXPECT_TRUE(nvmlPaths(gpu(3)).empty());
  EXPECT_TRUE(nvmlPaths(busId(0, 0x10, 2)).empty());
}

TEST_F(Nvml, bothWaysAndBothKindsAreNeeded) {
  for (const bool from : {false, true}) {
    for (const int capability : {0, 1}) {
      sayStatus(from ? 2 : 0, from ? 0 : 2, capability, 3);
      const std::vector<NvmlPath> paths = nvmlPaths(gpu(0));
      ASSERT_EQ(paths.size(), 2u);
      EXPECT_TRUE(paths[0].there);
      EXPECT_FALSE(paths[1].there);
      EXPECT_EQ(paths[1].gpu, gpu(2));
      EXPECT_EQ(paths[1].from, from);
      EXPECT_EQ(paths[1].why,
                std::string(capability == 0 ? "reads" : "writes") + ": they sit behind different I/O hubs");
      sayStatus(from ? 2 : 0, from ? 0 : 2, capability, 0);
    }
  }
}

// An answer that is none, or no answer, does not count.
TEST_F(Nvml, whatItDoesNotKnowIsNoAnswer) {
  for (const int none : {6, -3}) {
    for (int capability : {0, 1}) {
      sayStatus(0, 1, capability, none);
      sayStatus(1, 0, capability, none);
    }
    const std::vector<NvmlPath> paths = nvmlPaths(gpu(0));
    ASSERT_EQ(paths.size(), 1u) << none;
    EXPECT_EQ(paths[0].gpu, gpu(2));
    sayStatus(1, 0, 1, 4);
    EXPECT_EQ(nvmlPaths(gpu(0)).size(), 2u);
    EXPECT_FALSE(nvmlPaths(gpu(0))[0].there);
  }
  EXPECT_GT(nvmlCalls(), 0);
}

}  // namespace
}  // namespace fusco::exec
