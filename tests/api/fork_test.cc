// A child of a fork has none of its parent's communicators, and is told so. What a process may do while it ends.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "api/worlds.h"

namespace fusco::test {
namespace {

TEST(Fork, aChildCannotUseItsParentsCommunicator) {
  runWell(kProcesses, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(4, 2, 8);
    fuscoPlan_t plan = routing.make(comm);
    std::vector<float> in(64), out(4096);
    const pid_t child = fork();
    if (child == 0) {
      fuscoPlan_t another = nullptr;
      int wrong = 0;
      wrong |= fuscoPlanCreate(&another, &routing.config, comm, nullptr) == fuscoInvalidUsage ? 0 : 1;
      wrong |= fuscoDispatch(plan, in.data(), out.data(), 16, nullptr) == fuscoInvalidUsage ? 0 : 2;
      wrong |= fuscoSend(in.data(), 1, fuscoInt8, 0, comm, nullptr) == fuscoInvalidUsage ? 0 : 4;
      wrong |= fuscoCommDestroy(comm) == fuscoInvalidUsage ? 0 : 8;
      wrong |= fuscoCommFinalize(comm) == fuscoInvalidUsage ? 0 : 16;
      wrong |= fuscoCommAbort(comm) == fuscoInvalidUsage ? 0 : 32;
      fuscoResult_t error = fuscoSuccess;
      wrong |= fuscoCommGetAsyncError(comm, &error) == fuscoInvalidUsage ? 0 : 64;
      fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
      wrong |= fuscoCommGetStatistics(comm, &statistics) == fuscoInvalidUsage ? 0 : 128;
      _exit(wrong);
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    require(WEXITSTATUS(status) == 0, "calls of the child were refused, bits " + std::to_string(WEXITSTATUS(status)));
    FUSCO_OK(fuscoDispatch(plan, in.data(), out.data(), 16, nullptr));
    FUSCO_OK(fuscoPlanDestroy(plan));
    shuffleWorks(self, comm);
    leave(comm);
  });
}

// Nor does it wait for a lock that another thread held when it was forked off.
TEST(Fork, aChildIsRefusedWhateverOthersDoMeanwhile) {
  runWell({"one process", 1, 1, {}, true, 16384}, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    std::atomic<bool> stop{false};
    std::vector<std::thread> pollers;
    for (int i = 0; i < 2; ++i) {
      pollers.emplace_back([&] {
        while (!stop) {
          fuscoResult_t error = fuscoSuccess;
          FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
        }
      });
    }
    int status = 0;
    for (int i = 0; i < 400 && status == 0; ++i) {
      const pid_t child = fork();
      if (child == 0) {
        alarm(20);
        fuscoResult_t error = fuscoSuccess;
        const bool told = fuscoCommGetAsyncError(comm, &error) == fuscoInvalidUsage &&
                          std::string(fuscoGetLastError(comm)).find("fork") != std::string::npos;
        _exit(told ? 0 : 1);
      }
      REQUIRE(waitpid(child, &status, 0) == child);
    }
    stop = true;
    for (std::thread& one : pollers) one.join();
    require(status == 0, "a child ended with status " + std::to_string(status));
    leave(comm);
  });
}

// Static objects end after the main thread's own variables; a new text has to grow.
struct LastWords {
  std::string first;
  ~LastWords() {
    const auto never = reinterpret_cast<fuscoComm_t>(std::uintptr_t{0x5708});
    bool well = fuscoGroupStart() == fuscoSuccess && fuscoCommAbort(never) == fuscoInvalidArgument;
    well = well && fuscoGroupEnd() == fuscoInvalidArgument && fuscoGetLastError(nullptr) == first;
    fuscoDevice_t device = fuscoDeviceAuto;
    const char* why = nullptr;
    well = well && fuscoGetAutoDevice(&device, &why) == fuscoSuccess && why != nullptr;
    if (!well) _exit(1);
  }
};
TEST(Exit, staticObjectsMayCall) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    static LastWords end;
    const auto never = reinterpret_cast<fuscoComm_t>(std::uintptr_t{0x5708});
    fuscoDevice_t device = fuscoDeviceAuto;
    const char* why = nullptr;
    bool well = fuscoGetAutoDevice(&device, &why) == fuscoSuccess;
    well = well && fuscoGroupStart() == fuscoSuccess && fuscoCommAbort(never) == fuscoInvalidArgument;
    well = well && fuscoGroupEnd() == fuscoInvalidArgument;
    end.first = fuscoGetLastError(nullptr);
    std::exit(well ? 0 : 2);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace fusco::test
