// Ranks in processes of their own on the GPUs of the machine: they reach each other's memory by CUDA IPC. The process
// of the test itself never touches CUDA, since a fork would inherit it.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu/space.h"
#include "shuffle/ranks.h"

namespace fusco::test {

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

inline fuscoConfig_t onGpu(const Rank& self, int maxSms = 0) {
  fuscoConfig_t config = self.config();
  config.maxSms = maxSms;
  config.device = fuscoDeviceCuda;
  CUDA_OK(cudaSetDevice(gpuOfRank(self.rank(), self.ranks())));
  return config;
}

// As if each rank had a GPU of its own: processes that share one take turns, and wait for each other in kernels.
inline void apartFromNow() { setenv("FUSCO_GPU_APART", "1", 1); }

// The last of three ranks has been killed, the others have found nothing wrong.
inline void expectLastKilled(const std::vector<std::string>& ends) {
  EXPECT_EQ(ends[0], "");
  EXPECT_EQ(ends[1], "");
  EXPECT_NE(ends[2].find("killed by signal 9"), std::string::npos) << ends[2];
}

}  // namespace fusco::test
