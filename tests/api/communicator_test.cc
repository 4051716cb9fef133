// Communicators: split, non-blocking init, errors that stay, statistics, and what a fault leaves behind.
#include <dirent.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "api/worlds.h"

namespace fusco::test {
namespace {

using Clock = std::chrono::steady_clock;
double secondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

int nodeOf(fuscoComm_t comm, int rank) {
  int node = -1;
  FUSCO_OK(fuscoCommNode(comm, rank, &node));
  return node;
}

TEST(Communicator, knowsItsRanks) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    int value = -1;
    FUSCO_OK(fuscoCommCount(comm, &value));
    REQUIRE(value == self.ranks());
    FUSCO_OK(fuscoCommUserRank(comm, &value));
    REQUIRE(value == self.rank());
    for (int r = 0; r < self.ranks(); ++r) REQUIRE(nodeOf(comm, r) == self.world().nodeOf(r));
    EXPECT_CODE(fuscoCommNode(comm, self.ranks(), &value), fuscoInvalidArgument);
    fuscoResult_t error = fuscoInternalError;
    FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
    REQUIRE(error == fuscoSuccess);
    REQUIRE(std::string(fuscoGetLastError(comm)).empty());
    void* handle = nullptr;
    FUSCO_OK(fuscoCommRegister(comm, &value, sizeof value, &handle));
    FUSCO_OK(fuscoCommDeregister(comm, handle));
    EXPECT_CODE(fuscoCommDeregister(comm, handle), fuscoInvalidArgument);
    leave(comm);
  });
}

TEST(Communicator, splitByColourAndKey) {
  for (const World& world :
       {World{"threads", 4, 4, {}, true, 16384}, World{"processes", 4, 1, {}, true, 16384}, kThreadNodes, kMixed}) {
    runWell(world, [](Rank& self) {
      fuscoComm_t comm = self.connect();
      // Ranks 0 and 2 together, in reverse order; rank 1 and 3 apart, the last without any.
      const int colours[] = {0, 1, 0, -1};
      fuscoComm_t child = reinterpret_cast<fuscoComm_t>(1);
      FUSCO_OK(fuscoCommSplit(comm, colours[self.rank()], -self.rank(), &child, nullptr));
      if (self.rank() == 3) {
        REQUIRE(child == nullptr);
      } else {
        int rank = -1, count = -1;
        FUSCO_OK(fuscoCommUserRank(child, &rank));
        FUSCO_OK(fuscoCommCount(child, &count));
        REQUIRE(count == (self.rank() == 1 ? 1 : 2));
        REQUIRE(rank == (self.rank() == 0 ? 1 : 0));
        if (count == 2)
          REQUIRE((nodeOf(child, 0) == nodeOf(child, 1)) == (self.world().nodeOf(0) == self.world().nodeOf(2)));
        const std::string wrong = runRank(randomCase(17, count), child, rank);
        require(wrong.empty(), wrong);
        leave(child);
      }
      shuffleWorks(self, comm);
      fuscoComm_t everyone = nullptr;
      FUSCO_OK(fuscoCommSplit(comm, 5, 0, &everyone, nullptr));
      leave(comm);  // the child lives on
      shuffleWorks(self, everyone);
      leave(everyone);
    });
  }
}

// Who would open the place where they meet lacks a descriptor for it: nobody waits for its time-out.
TEST(Communicator, aSplitThatCannotBeginIsToldToAll) {
  runWell({"processes", 4, 1, {}, true, 16384}, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    rlimit before{};
    REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
    if (self.rank() == 2) {
      const int next = dup(0);
      REQUIRE(next >= 0 && close(next) == 0);
      const rlimit none{static_cast<rlim_t>(next), before.rlim_max};
      REQUIRE(setrlimit(RLIMIT_NOFILE, &none) == 0);
    }
    const auto begin = Clock::now();
    fuscoComm_t child = nullptr;
    const fuscoResult_t result = fuscoCommSplit(comm, self.rank() < 2 ? 0 : 1, 0, &child, nullptr);
    const std::string text = fuscoGetLastError(nullptr);
    require(secondsSince(begin) < 30, "the split took too long");
    REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
    if (self.rank() < 2) {
      FUSCO_OK(result);
      leave(child);
    } else {
      REQUIRE(child == nullptr);
      require(result == (self.rank() == 2 ? fuscoSystemError : fuscoRemoteError), "result " + std::to_string(result));
      requireContains(text, self.rank() == 2 ? "descriptors" : "rank 2 could not open a place");
    }
    self.barrier();
    FUSCO_OK(fuscoCommSplit(comm, 0, 0, &child, nullptr));
    leave(child);
    shuffleWorks(self, comm);
    leave(comm);
  });
}

TEST(Communicator, initWithoutBlocking) {
  for (const World& world : {kThreads, kProcesses, kTwoNodes}) {
    runWell(world, [](Rank& self) {
      fuscoConfig_t config = self.config();
      config.blocking = 0;
      if (self.rank() == 1) self.barrier();  // comes when rank 0 has been seen in progress
      fuscoComm_t comm = self.connect(0, config);
      fuscoResult_t error = fuscoInProgress;
      if (self.rank() == 0) {
        FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
        REQUIRE(error == fuscoInProgress);
        int value = -1;
        FUSCO_OK(fuscoCommUserRank(comm, &value));
        EXPECT_CODE(fuscoCommFinalize(comm), fuscoInvalidUsage);
      }
      if (self.rank() != 1) self.barrier();
      for (error = fuscoInProgress; error == fuscoInProgress;) {
        FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      require(error == fuscoSuccess, fuscoGetLastError(comm));
      shuffleWorks(self, comm);
      leave(comm);
    });
  }
}

TEST(Communicator, aMissingRankIsNamedAtInit) {
  runWell(kProcesses, [](Rank& self) {
    const fuscoUniqueId id = self.id();
    if (self.rank() == 1) {
      self.barrier();
      return;
    }
    fuscoConfig_t config = self.config();
    config.initTimeoutMs = 700;
    const auto start = Clock::now();
    fuscoComm_t comm = nullptr;
    requireContains(EXPECT_CODE(fuscoCommInitRankConfig(&comm, 3, id, 0, &config), fuscoRemoteError), "1");
    REQUIRE(comm == nullptr && secondsSince(start) < 3);
    // And without blocking: told by the communicator.
    config.blocking = 0;
    fuscoUniqueId another;
    FUSCO_OK(fuscoGetUniqueId(&another));
    FUSCO_OK(fuscoCommInitRankConfig(&comm, 2, another, 0, &config));
    fuscoResult_t error = fuscoInProgress;
    while (error == fuscoInProgress) FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
    REQUIRE(error == fuscoRemoteError);
    REQUIRE(!std::string(fuscoGetLastError(comm)).empty());
    FUSCO_OK(fuscoCommDestroy(comm));
    self.barrier();
  });
}

TEST(Communicator, settingsThatDisagreeAreTold) {
  runWell(kProcesses, [](Rank& self) {
    fuscoConfig_t config = self.config();
    if (self.rank() == 1) config.sliceBytes = 32768;
    fuscoComm_t comm = nullptr;
    EXPECT_CODE(fuscoCommInitRankConfig(&comm, 2, self.id(), self.rank(), &config), fuscoInvalidUsage);
    config = self.config();
    if (self.rank() == 1) config.balance = fuscoBalanceFull;
    const std::string text =
        EXPECT_CODE(fuscoCommInitRankConfig(&comm, 2, self.id(2), self.rank(), &config), fuscoInvalidUsage);
    requireContains(text, "balance none");
    requireContains(text, "balance full");
    comm = self.connect(1);
    shuffleWorks(self, comm);
    leave(comm);
  });
}

// Nobody begins then, and so nobody waits for who cannot come.
TEST(Communicator, aGroupOfInitsWithoutThreadsIsRefusedAtOnce) {
  runWell({"one process", 1, 1, {}, true, 16384}, [](Rank& self) {
    becomeNobody();
    const fuscoUniqueId id = self.id();
    fuscoConfig_t config = self.config();
    fuscoComm_t comms[3] = {};
    const auto group = [&] {
      FUSCO_OK(fuscoGroupStart());
      for (int r = 0; r < 3; ++r) FUSCO_OK(fuscoCommInitRankConfig(&comms[r], 3, id, r, &config));
      return fuscoGroupEnd();
    };
    const auto start = Clock::now();
    {
      const NoMoreThreads none;
      requireContains(EXPECT_CODE(group(), fuscoSystemError), "ulimit -u");
    }
    REQUIRE(secondsSince(start) < 5);
    for (fuscoComm_t comm : comms) REQUIRE(comm == nullptr);
    FUSCO_OK(group());
    for (fuscoComm_t comm : comms) FUSCO_OK(fuscoCommDestroy(comm));
  });
}

// Counts are what was moved, computed here from the routing alone.
TEST(Communicator, statisticsCountWhatWasMoved) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    const int n = self.ranks();
    const std::int64_t tokens = 48;
    const Routing routing(tokens, 2, 2 * n);
    fuscoPlan_t plan = routing.make(comm);
    const auto rows = static_cast<std::size_t>(receiveRows(plan));
    std::vector<float> in(tokens * 64, 1.0f), mid(rows * 64), out(tokens * 64);
    const auto statistics = [&] {
      fuscoStatistics_t s = FUSCO_STATISTICS_INIT;
      FUSCO_OK(fuscoCommGetStatistics(comm, &s));
      return s;
    };
    self.barrier();
    const fuscoStatistics_t before = statistics();
    REQUIRE(before.operations == 1 && before.rowsPlaced == 0 && before.bytesRead == 0);
    FUSCO_OK(fuscoDispatch(plan, in.data(), mid.data(), 256, nullptr));
    const fuscoStatistics_t dispatched = statistics();
    FUSCO_OK(fuscoCombine(plan, mid.data(), out.data(), 64, fuscoFloat32, nullptr));
    const fuscoStatistics_t combined = statistics();
    REQUIRE(dispatched.operations == 2 && combined.operations == 3);
    // Every row is placed by its source or by the forwarder of its node; the sum over ranks is all slots.
    self.word(0) += dispatched.rowsPlaced;
    self.word(1) += dispatched.bytesPlaced;
    self.word(2) += combined.bytesRead;
    self.barrier();
    const auto slots = static_cast<std::uint64_t>(tokens * 2 * n);
    require(self.word(0) == slots, "rows placed: " + std::to_string(self.word(0)) + " of " + std::to_string(slots));
    REQUIRE(self.word(1) == slots * 256);
    REQUIRE(self.word(2) >= slots * 256);
    const bool apart = self.world().multiNode();
    REQUIRE((dispatched.wireBytes > before.wireBytes) == apart);
    REQUIRE((combined.wireSlices > dispatched.wireSlices) == apart);
    const bool alone = self.world().oneProcess() || self.world().name == kTwoNodes.name;
    REQUIRE((combined.processVmBytes > 0) == (!alone && self.world().processVm));
    REQUIRE((combined.stagedBytes > 0) == (!alone && !self.world().processVm));
    REQUIRE(combined.workspaceBytes > 0);
    FUSCO_OK(fuscoPlanDestroy(plan));
    REQUIRE(statistics().workspaceBytes < combined.workspaceBytes);
    leave(comm);
  });
}

TEST(Communicator, abortFromAnotherThreadWakesAWaiter) {
  for (const World& world : {kThreads, kProcesses, kTwoNodes}) {
    runWell(world, [](Rank& self) {
      fuscoComm_t comm = self.connect();
      if (self.rank() == 0) {
        const auto start = Clock::now();
        // A receive that begins after the abort would be told that its communicator is none.
        std::atomic<bool> receiving{false};
        std::thread other([&] {
          while (!receiving) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          std::this_thread::sleep_for(std::chrono::milliseconds(200));
          FUSCO_OK(fuscoCommAbort(comm));
        });
        int value = 0;
        receiving = true;
        const fuscoResult_t result = fuscoRecv(&value, 1, fuscoInt32, 1, comm, nullptr);
        const std::string text = fuscoGetLastError(nullptr);
        const double seconds = secondsSince(start);
        other.join();
        require(result == fuscoRemoteError, std::to_string(result) + ": " + text);
        requireContains(text, "abort");
        REQUIRE(seconds < 5);
        EXPECT_CODE(fuscoCommDestroy(comm), fuscoInvalidArgument);
      } else {
        // Wakes too, and stays broken.
        int value = 0;
        requireContains(EXPECT_CODE(fuscoRecv(&value, 1, fuscoInt32, 0, comm, nullptr), fuscoRemoteError), "rank 0");
        EXPECT_CODE(fuscoRecv(&value, 1, fuscoInt32, 0, comm, nullptr), fuscoRemoteError);
        fuscoResult_t error = fuscoSuccess;
        FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
        REQUIRE(error == fuscoRemoteError);
        requireContains(fuscoGetLastError(comm), "rank 0");
        FUSCO_OK(fuscoCommDestroy(comm));
      }
      comm = self.connect(1);
      shuffleWorks(self, comm);
      leave(comm);
    });
  }
}

// It cannot be called off, but whoever comes later is told.
TEST(Communicator, abortOfAnInitThatIsUnderWay) {
  for (const World& world : {kThreads, kProcesses, kTwoNodes}) {
    runWell(world, [](Rank& self) {
      const fuscoUniqueId id = self.id();
      fuscoConfig_t config = self.config();
      fuscoComm_t comm = nullptr;
      if (self.rank() == 0) {
        config.blocking = 0;
        FUSCO_OK(fuscoCommInitRankConfig(&comm, 2, id, 0, &config));
        self.barrier();
        FUSCO_OK(fuscoCommAbort(comm));
        EXPECT_CODE(fuscoCommDestroy(comm), fuscoInvalidArgument);
      } else {
        self.barrier();
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        const fuscoResult_t result = fuscoCommInitRankConfig(&comm, 2, id, 1, &config);
        require(result == fuscoSuccess || result == fuscoRemoteError, fuscoGetLastError(nullptr));
        int value = 0;
        if (comm != nullptr) {
          const std::string text = EXPECT_CODE(fuscoRecv(&value, 1, fuscoInt32, 0, comm, nullptr), fuscoRemoteError);
          requireContains(text, "aborted");
          FUSCO_OK(fuscoCommDestroy(comm));
        }
      }
      comm = self.connect(1);
      shuffleWorks(self, comm);
      leave(comm);
    });
  }
}

TEST(Communicator, anOperationTimeoutNamesWhoIsMissing) {
  for (const World& world : {kThreads, kProcesses, kTwoNodes, kThreadNodes}) {
    runWell(world, [](Rank& self) {
      fuscoConfig_t config = self.config();
      config.operationTimeoutMs = 600;
      fuscoComm_t comm = self.connect(0, config);
      const Routing routing(8, 2, 8);
      fuscoPlan_t plan = nullptr;
      if (self.rank() != 1) {
        const auto start = Clock::now();
        const std::string text = EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoRemoteError);
        REQUIRE(secondsSince(start) < 5);
        requireContains(text, "waiting for rank ");
        // On several nodes a rank may wait for one that waits itself.
        if (self.ranks() == 2) requireContains(text, "waiting for rank 1");
      }
      self.barrier();
      int value = 0;
      if (self.rank() == 1) EXPECT_CODE(fuscoRecv(&value, 1, fuscoInt32, 0, comm, nullptr), fuscoRemoteError);
      self.barrier();
      FUSCO_OK(fuscoCommDestroy(comm));
      comm = self.connect(1);
      shuffleWorks(self, comm);
      leave(comm);
    });
  }
}

// Rank 1 is killed between or within operations; the others are told who, and start anew without it.
TEST(Communicator, aKilledRankIsNamed) {
  const std::vector<World> worlds = {{"three processes", 3, 1, {}, true, 16384},
                                     {"three processes, staged", 3, 1, {}, false, 16384},
                                     {"two nodes", 3, 1, {0, 1, 1}, true, 16384}};
  for (const World& world : worlds) {
    for (const int when : {0, 3, 20}) {
      const std::vector<std::string> texts = runRanks(world, [when](Rank& self) {
        fuscoUniqueId survivors = self.id(1);
        fuscoComm_t comm = self.connect(0);
        const Routing routing(200, 2, 6);
        fuscoPlan_t plan = routing.make(comm);
        const auto rows = static_cast<std::size_t>(receiveRows(plan));
        std::vector<float> in(200 * 1024, 1.0f), mid(rows * 1024), out(200 * 1024);
        self.barrier();
        fuscoResult_t result = fuscoSuccess;
        std::thread killer;
        if (self.rank() == 1) {
          killer = std::thread([when] {
            std::this_thread::sleep_for(std::chrono::milliseconds(when));
            kill(getpid(), SIGKILL);
          });
          killer.detach();
        }
        Clock::time_point start = Clock::now();
        while (result == fuscoSuccess && secondsSince(start) < 10) {
          result = fuscoDispatch(plan, in.data(), mid.data(), 4096, nullptr);
          if (result == fuscoSuccess) result = fuscoCombine(plan, mid.data(), out.data(), 1024, fuscoFloat32, nullptr);
        }
        REQUIRE(secondsSince(start) < 5 + when / 1000.0);
        const std::string text = fuscoGetLastError(nullptr);
        require(result == fuscoRemoteError, std::to_string(result) + ": " + text);
        char host[256] = {};
        gethostname(host, sizeof host - 1);
        requireContains(text, "rank 1 (" + std::string(host) + ":" + std::to_string(self.pidOf(1)) + ")");
        REQUIRE(text.find("died") != std::string::npos || text.find("its process has ended") != std::string::npos);
        REQUIRE(text.find("dispatch") != std::string::npos || text.find("combine") != std::string::npos);
        EXPECT_CODE(fuscoDispatch(plan, in.data(), mid.data(), 4096, nullptr), fuscoRemoteError);
        FUSCO_OK(fuscoPlanDestroy(plan));
        start = Clock::now();
        FUSCO_OK(fuscoCommDestroy(comm));
        REQUIRE(secondsSince(start) < 5);
        fuscoConfig_t config = self.config();
        FUSCO_OK(fuscoCommInitRankConfig(&comm, 2, survivors, self.rank() / 2, &config));
        const std::string wrong = runRank(randomCase(5, 2), comm, self.rank() / 2);
        require(wrong.empty(), wrong);
        leave(comm);
      });
      EXPECT_EQ(texts[0], "") << world.name << ", after " << when << " ms";
      EXPECT_EQ(texts[1], "killed by signal 9");
      EXPECT_EQ(texts[2], "") << world.name << ", after " << when << " ms";
    }
  }
}

// A watchdog that only polls learns of a dead peer, and of nothing when a peer leaves in order.
TEST(Communicator, theAsyncErrorTellsOfADeadPeer) {
  const std::vector<World> worlds = {{"three processes", 3, 1, {}, true, 16384},
                                     {"two nodes", 3, 1, {0, 1, 1}, true, 16384}};
  for (const World& world : worlds) {
    const std::vector<std::string> texts = runRanks(world, [](Rank& self) {
      fuscoComm_t comm = self.connect(0);
      shuffleWorks(self, comm);
      fuscoResult_t error = fuscoSuccess;
      FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
      REQUIRE(error == fuscoSuccess);
      self.barrier();
      if (self.rank() == 1) kill(getpid(), SIGKILL);
      const Clock::time_point start = Clock::now();
      while (error == fuscoSuccess && secondsSince(start) < 10) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
      }
      REQUIRE(secondsSince(start) < 5);
      require(error == fuscoRemoteError, "code " + std::to_string(error));
      requireContains(fuscoGetLastError(comm), "rank 1 (");
      FUSCO_OK(fuscoCommDestroy(comm));
    });
    EXPECT_EQ(texts[0], "") << world.name;
    EXPECT_EQ(texts[2], "") << world.name;
    runWell(world, [](Rank& self) {
      fuscoComm_t comm = self.connect(0);
      shuffleWorks(self, comm);
      self.barrier();
      if (self.rank() == 1) FUSCO_OK(fuscoCommDestroy(comm));
      self.barrier();
      for (int i = 0; i < 150 && self.rank() != 1; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        fuscoResult_t error = fuscoSuccess;
        FUSCO_OK(fuscoCommGetAsyncError(comm, &error));
        require(error == fuscoSuccess, fuscoGetLastError(comm));
      }
      self.barrier();
      if (self.rank() != 1) FUSCO_OK(fuscoCommDestroy(comm));
    });
  }
}

// Nothing is left behind by communicators that come and go: descriptors, threads, mappings.
TEST(Communicator, leavesNothingBehind) {
  for (const World& world : {kThreads, kProcesses, kStaged, kTwoNodes}) {
    runWell(world, [](Rank& self) {
      const auto entries = [](const char* folder) {
        int count = 0;
        if (DIR* dir = opendir(folder)) {
          while (readdir(dir) != nullptr) ++count;
          closedir(dir);
        }
        return count;
      };
      const auto round = [&](int k) {
        fuscoComm_t comm = self.connect(k);
        shuffleWorks(self, comm);
        const std::string wrong = runTwo(randomCase(1, self.ranks()), randomCase(2, self.ranks()), comm, self.rank());
        require(wrong.empty(), wrong);
        leave(comm);
        self.barrier();
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        self.barrier();
      };
      round(0);
      round(1);
      const int descriptors = entries("/proc/self/fd"), threads = entries("/proc/self/task");
      self.barrier();
      for (int k = 2; k < 8; ++k) round(k);
      // What ends by itself (the meeting place of the last id) has a moment for it; and a rank that is a thread counts
      // the folder that another one is just reading, so that the count which satisfied is the one that is judged.
      int more = 0, left = 0;
      for (int wait = 0; wait < 300; ++wait) {
        more = entries("/proc/self/fd");
        left = entries("/proc/self/task");
        if (more <= descriptors && left <= threads) break;
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      require(more <= descriptors, std::to_string(descriptors) + " descriptors became " + std::to_string(more));
      require(left <= threads, std::to_string(threads) + " threads became " + std::to_string(left));
      self.barrier();
    });
  }
}

}  // namespace
}  // namespace fusco::test
