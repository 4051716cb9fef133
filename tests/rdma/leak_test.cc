// Communicators over queue pairs come and go in the soft-RoCE machine, and leave nothing behind: neither in the
// kernel's list of RDMA resources nor among this process's descriptors, threads and mappings.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdio>
#include <string>
#include <thread>

#include "comm/world.h"
#include "shuffle/case.h"

namespace fusco::test {
namespace {

std::string outputOf(const char* command) {
  std::string text;
  FILE* const pipe = popen(command, "re");
  if (pipe == nullptr) throw std::runtime_error("popen");
  char buffer[512];
  while (std::fgets(buffer, sizeof(buffer), pipe) != nullptr) text += buffer;
  pclose(pipe);
  return text;
}

// Two ranks, two nodes, threads of this process; all checked.
void shuffleOnce(std::uint64_t seed) {
  fuscoUniqueId id;
  FUSCO_OK(fuscoGetUniqueId(&id));
  const Case one = randomCase(seed, 2);
  runThreads(2, [&](int rank) {
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.nodeId = rank;
    config.sliceBytes = 16384;
    config.initTimeoutMs = config.operationTimeoutMs = 30000;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, 2, id, rank, &config));
    const std::string text = runRank(one, comm, rank);
    if (!text.empty()) throw std::runtime_error(text);
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
}

TEST(RdmaLeak, NothingIsLeftAfterManyCommunicators) {
  setenv("FUSCO_NET", "verbs", 1);
  setenv("FUSCO_IB_HCA", "=rxe0,rxe2", 1);
  const char* const wanted = getenv("FUSCO_TEST_ROUNDS");
  const int rounds = wanted != nullptr ? atoi(wanted) : 50;
  shuffleOnce(1);
  const std::string resources = outputOf("/sbin/rdma resource show");
  const auto before = comm::testing::footprint();
  EXPECT_NE(resources.find("rxe0: pd"), std::string::npos) << resources;
  std::string during;
  for (int round = 0; round < rounds; ++round) {
    shuffleOnce(static_cast<std::uint64_t>(round + 2));
  }
  EXPECT_EQ(outputOf("/sbin/rdma resource show"), resources);
  const auto after = comm::testing::footprint();
  EXPECT_EQ(after.descriptors, before.descriptors);
  EXPECT_EQ(after.threads, before.threads);
  // The allocator may keep an arena for a thread, which is no more than one mapping each.
  EXPECT_LE(after.mappings, before.mappings + 4);
  std::printf("%d times two ranks have made and destroyed a communicator; as before:\n%s", rounds, resources.c_str());
}

// That the check above can fail: an open communicator shows.
TEST(RdmaLeak, WhatIsOpenShows) {
  setenv("FUSCO_NET", "verbs", 1);
  const std::string before = outputOf("/sbin/rdma resource show");
  fuscoUniqueId id;
  FUSCO_OK(fuscoGetUniqueId(&id));
  std::string during;
  runThreads(2, [&](int rank) {
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.nodeId = rank;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, 2, id, rank, &config));
    if (rank == 0) during = outputOf("/sbin/rdma resource show");
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  EXPECT_NE(during, before);
}

}  // namespace
}  // namespace fusco::test
