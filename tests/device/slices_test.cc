// How long slices between nodes are where nobody says it: longer from and to GPUs than on the host. With
// FUSCO_SLICE_BYTES set the same cases hold for that.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

#include "device/stand_in.h"

namespace fusco::test {
namespace {

std::size_t wanted(int device) {
  if (const char* said = std::getenv("FUSCO_SLICE_BYTES")) return static_cast<std::size_t>(std::atoi(said));
  return device == fuscoDeviceHost ? 262144 : 1048576;
}

fuscoConfig_t configOf(int device, std::int64_t sliceBytes) {
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  config.device = device;
  if (sliceBytes > 0) config.sliceBytes = sliceBytes;
  config.operationTimeoutMs = 20000;
  return config;
}

// Two nodes have two rings of four slices and a page between them.
TEST(DeviceSlices, areCountedInTheWorkspace) {
  fuscoPlanConfig_t plan = FUSCO_PLAN_CONFIG_INIT;
  plan.tokens = 64;
  plan.topk = 2;
  plan.experts = 8;
  const auto bytesOf = [&](int device, std::int64_t sliceBytes) {
    const fuscoConfig_t config = configOf(device, sliceBytes);
    std::size_t bytes = 0;
    EXPECT_EQ(fuscoWorkspaceSize(&config, &plan, 2, 2, 256, 0, &bytes), fuscoSuccess) << fuscoGetLastError(nullptr);
    return bytes;
  };
  for (const int device : {fuscoDeviceHost, fuscoDeviceCuda}) {
    EXPECT_EQ(bytesOf(device, 0) - bytesOf(device, 4096), 2 * 4 * (wanted(device) - 4096)) << device;
    EXPECT_EQ(bytesOf(device, 65536) - bytesOf(device, 4096), 2 * 4 * (65536 - 4096)) << device;
  }
  const char* automatic = nullptr;
  ASSERT_EQ(fuscoGetSetting("FUSCO_DEVICE", &automatic), fuscoSuccess);
  const int meant = std::strcmp(automatic, "host") == 0 ? fuscoDeviceHost : fuscoDeviceCuda;
  EXPECT_EQ(bytesOf(fuscoDeviceAuto, 0), bytesOf(meant, 0));
}

// What crosses is one block of bytes; how many slices it takes shows how long they are.
TEST(DeviceSlices, areSoLongOnTheirWay) {
  constexpr std::size_t kBytes = 3 << 20;
  for (const std::int64_t given : {0, 131072}) {
    fuscoUniqueId id;
    ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess) << fuscoGetLastError(nullptr);
    std::uint64_t slices = 0;
    runThreads(2, [&](int rank) {
      fuscoConfig_t config = configOf(fuscoDeviceCuda, given);
      config.nodeId = rank;
      fuscoComm_t comm = nullptr;
      FUSCO_OK(fuscoCommInitRankConfig(&comm, 2, id, rank, &config));
      {
        StandInSpace space;
        void* const memory = space.allocate(kBytes, true);
        if (rank == 0) FUSCO_OK(fuscoSend(memory, kBytes, fuscoInt8, 1, comm, space.stream()));
        if (rank == 1) FUSCO_OK(fuscoRecv(memory, kBytes, fuscoInt8, 0, comm, space.stream()));
        space.release(memory, true);
      }
      fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
      FUSCO_OK(fuscoCommGetStatistics(comm, &statistics));
      if (rank == 0) slices = statistics.wireSlices;
      FUSCO_OK(fuscoCommFinalize(comm));
      FUSCO_OK(fuscoCommDestroy(comm));
    });
    // A slice's head takes a little of it, so there is one more.
    const std::size_t bytes = given > 0 ? static_cast<std::size_t>(given) : wanted(fuscoDeviceCuda);
    EXPECT_EQ(slices, kBytes / bytes + 1) << given;
  }
}

// The device is told, not the sizes that follow from it.
TEST(DeviceSlices, hostAndGpuDoNotMix) {
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess) << fuscoGetLastError(nullptr);
  std::string told[2];
  runThreads(2, [&](int rank) {
    const fuscoConfig_t config = configOf(rank == 0 ? fuscoDeviceHost : fuscoDeviceCuda, 0);
    fuscoComm_t comm = nullptr;
    if (fuscoCommInitRankConfig(&comm, 2, id, rank, &config) == fuscoInvalidUsage)
      told[rank] = fuscoGetLastError(nullptr);
  });
  for (const std::string& text : told) {
    EXPECT_NE(text.find("has device host, balance none"), std::string::npos) << text;
    EXPECT_NE(text.find("has device cuda, balance none"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace fusco::test
