// Dead, leaving and aborting ranks, and what is left behind.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "base/clock.h"
#include "base/status.h"
#include "comm/fabric.h"
#include "comm/world.h"

namespace fusco::comm::testing {
namespace {

FabricConfig configOf(int rank, int ranks) {
  FabricConfig config;
  config.rank = rank;
  config.ranks = ranks;
  config.controlBytes = 4096;
  config.slotBytes = 4096;
  config.initTimeoutMs = 20000;
  return config;
}

struct Stage {
  std::atomic<int> ready{0};
  std::atomic<int> connected{0};
  char id[128] = {};

  std::unique_ptr<Fabric> connect(int rank, int ranks, std::vector<int> nodes = {}) {
    while (ready.load() == 0) usleep(200);
    FabricConfig config = configOf(rank, ranks);
    if (!nodes.empty()) config.nodeId = nodes[static_cast<std::size_t>(rank)];
    auto fabric = Fabric::connect(config, id);
    ++connected;
    return fabric;
  }
  void open() {
    makeUniqueId(id);
    ready.store(1);
  }
  void awaitConnected(int count) {
    while (connected.load() < count) usleep(200);
  }
};

// Waits for what never comes; returns the error and how long it took.
std::string waitInVain(Fabric& fabric, std::int64_t* milliseconds = nullptr) {
  const std::int64_t begin = nowNs();
  std::string text = "nothing happened";
  try {
    while (nowNs() - begin < 8'000'000'000) {
      const std::uint32_t seen = fabric.bell();
      fabric.check();
      fabric.sleep(seen, 100000);
    }
  } catch (const Error& error) {
    text = error.code() == Code::remoteError ? error.what() : "wrong code: " + std::string(error.what());
  }
  if (milliseconds != nullptr) *milliseconds = (nowNs() - begin) / 1000000;
  return text;
}

// What rank 2 of 3 does makes the others' waits end in time, with a text that names it.
void expectNoticed(const std::function<void(Fabric&)>& misbehave, const std::string& words, std::vector<int> nodes = {},
                   std::int64_t withinMs = 2000) {
  SharedPage<Stage> stage;
  Children children(3, [&](int rank) -> std::string {
    auto fabric = stage->connect(rank, 3, nodes);
    if (rank == 2) {
      usleep(30000);
      misbehave(*fabric);
      fabric.reset();
      usleep(1800000);
      return "rank 2";
    }
    std::int64_t took = 0;
    std::string text = waitInVain(*fabric, &took);
    if (took > withinMs) text += " (after " + std::to_string(took) + " ms)";
    // It stays so.
    if (waitInVain(*fabric) != text) return "the second check said something else";
    return text;
  });
  stage->open();
  stage->awaitConnected(3);
  const auto texts = children.join();
  for (int rank : {0, 1}) {
    const std::string& text = texts[static_cast<std::size_t>(rank)];
    EXPECT_TRUE(text.starts_with("rank 2 (")) << text;
    EXPECT_NE(text.find(words), std::string::npos) << text;
    EXPECT_EQ(text.find("(after"), std::string::npos) << text;
  }
}

TEST(Fault, KilledRankIsNoticed) {
  expectNoticed([](Fabric&) { raise(SIGKILL); }, "died");
}

TEST(Fault, KilledRankOfAnotherNodeIsNoticed) {
  expectNoticed([](Fabric&) { raise(SIGKILL); }, "died", {0, 0, 1});
}

TEST(Fault, ExitWithoutDestroyIsLeaving) {
  // exit() runs exit handlers; what gtest has registered does not matter here.
  expectNoticed([](Fabric&) { exit(0); }, "left: its process exited");
}

TEST(Fault, DestroyDuringAnOperationIsLeaving) {
  // Who may still need it waits for a second.
  expectNoticed([](Fabric&) {}, "left: it destroyed", {}, 5000);
}

// Who waits for another rank than the one that has left waits on, however long nothing comes.
TEST(Fault, LeavingHurtsOnlyWhoWaitsForThatRank) {
  SharedPage<Stage> stage;
  Children children(3, [&](int rank) -> std::string {
    auto fabric = stage->connect(rank, 3);
    if (rank == 2) return {};
    std::string text;
    try {
      for (const Deadline deadline = Deadline::afterMs(2500); !deadline.passed();) {
        const std::uint32_t seen = fabric->bell();
        fabric->checkAwaited([](int peer) { return peer != 2; });
        fabric->sleep(seen, 100000);
      }
    } catch (const Error& error) {
      return std::string("it did not need rank 2: ") + error.what();
    }
    text = waitInVain(*fabric);
    return text.find("rank 2 (") == 0 && text.find("left: it destroyed") != std::string::npos ? "" : text;
  });
  stage->open();
  stage->awaitConnected(3);
  for (const std::string& text : children.join()) EXPECT_EQ(text, "");
}

TEST(Fault, LeavingDoesNotHurtWhoHasAllItNeeds) {
  SharedPage<Stage> stage;
  Children children(2, [&](int rank) -> std::string {
    auto fabric = stage->connect(rank, 2);
    auto* word = reinterpret_cast<std::atomic<int>*>(fabric->control(1));
    if (rank == 0) {
      word->store(7);
      fabric->ring(1);
      return {};
    }
    // The operation goes on for longer than a wait for nothing would last: somebody still rings.
    for (int i = 0; i < 7; ++i) {
      usleep(200000);
      fabric->ring(1);
      fabric->check();
    }
    return word->load() == 7 ? "" : "the last word was lost";
  });
  stage->open();
  for (const std::string& text : children.join()) EXPECT_EQ(text, "");
}

TEST(Fault, StoppedRankIsNoError) {
  SharedPage<Stage> stage;
  SharedPage<std::atomic<int>> go;
  Children children(2, [&](int rank) -> std::string {
    auto fabric = stage->connect(rank, 2);
    int mine = rank, all[2];
    fabric->allGather(&mine, sizeof(mine), all, 20000);
    if (rank == 1) {
      while (go->load() == 0) usleep(200);
    }
    fabric->allGather(&mine, sizeof(mine), all, 20000);
    return all[0] == 0 && all[1] == 1 ? "" : "wrong";
  });
  stage->open();
  stage->awaitConnected(2);
  kill(children.pid(1), SIGSTOP);
  usleep(300000);
  kill(children.pid(1), SIGCONT);
  go->store(1);
  for (const std::string& text : children.join()) EXPECT_EQ(text, "");
}

TEST(Fault, AbortWakesSleepersWithItsReason) {
  for (Kind kind : {Kind::threads, Kind::processes}) {
    const auto texts = runRanks(kind, 3, configOf(0, 3), [](Fabric& fabric) {
      if (fabric.rank() == 1) {
        usleep(30000);
        fabric.abort("rank 1 found a malformed routing map");
      }
      // One sleep longer than the test may take: only the bell ends it.
      const std::uint32_t seen = fabric.bell();
      const std::int64_t begin = nowNs();
      try {
        fabric.check();
        fabric.sleep(seen, 5000000);
        fabric.check();
      } catch (const Error& error) {
        require(nowNs() - begin < 2'000'000'000, "woken late");
        throw;
      }
    });
    for (const std::string& text : texts) EXPECT_EQ(text, "code 6: rank 1 found a malformed routing map");
  }
}

TEST(Fault, GatherNamesWhoIsLate) {
  for (Kind kind : {Kind::threads, Kind::processes}) {
    SharedPage<std::atomic<int>> failed;
    const auto texts = runRanks(kind, 2, configOf(0, 2), [&](Fabric& fabric) {
      if (fabric.rank() == 1) {
        for (const Deadline patience = Deadline::afterMs(20000); failed->load() == 0 && !patience.passed();)
          usleep(1000);
        return;
      }
      int mine = 0, all[2];
      try {
        fabric.allGather(&mine, sizeof(mine), all, 200);
      } catch (const Error&) {
        failed->store(1);
        throw;
      }
    });
    EXPECT_TRUE(texts[0].starts_with("code 6: rank 0 (")) << texts[0];
    EXPECT_NE(texts[0].find("for rank 1 ("), std::string::npos) << texts[0];
  }
}

TEST(Fault, ChildOfARankIsRefused) {
  SharedPage<Stage> stage;
  Children children(2, [&](int rank) -> std::string {
    auto fabric = stage->connect(rank, 2);
    if (rank == 0) {
      const pid_t child = fork();
      if (child == 0) {
        int result = 1;
        try {
          fabric->check();
        } catch (const Error& error) {
          result = error.code() == Code::invalidUsage ? 0 : 2;
        }
        fabric.reset();
        _exit(result);
      }
      int status = -1;
      waitpid(child, &status, 0);
      if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return "the child was not refused";
    }
    // The child has destroyed its copy: the rank has not left.
    usleep(1200000);
    fabric->check();
    int mine = rank, all[2];
    fabric->allGather(&mine, sizeof(mine), all, 20000);
    fabric->check();
    return {};
  });
  stage->open();
  for (const std::string& text : children.join()) EXPECT_EQ(text, "");
}

// Everything that a rank may hold: windows both ways, rings both ways, sleepers.
void useEverything(Fabric& fabric) {
  const int peer = 1 - fabric.rank();
  void* window = windowAllocate(100000);
  transport::MemoryRef mine = fabric.describe(window, 100000), all[2];
  fabric.allGather(&mine, sizeof(mine), all, 20000);
  if (fabric.topology().nodes() == 1) require(fabric.reach(peer, all[peer]) != nullptr, "not reached");
  transport::PostedLink& link = fabric.link(peer, 0);
  require(link.acquire() != nullptr, "no slot");
  link.post(64);
  while (link.peek() == nullptr) {
    const std::uint32_t seen = fabric.bell();
    fabric.check();
    if (link.peek() == nullptr) fabric.sleep(seen, 1000);
  }
  link.release();
  fabric.allGather(nullptr, 0, nullptr, 20000);
  windowFree(window);
}

TEST(Fault, NothingIsLeftBehind) {
  auto threadRound = [](const std::vector<int>& nodes) {
    char id[128];
    makeUniqueId(id);
    std::string texts[2];
    auto rank = [&](int i) {
      try {
        FabricConfig config = configOf(i, 2);
        if (!nodes.empty()) config.nodeId = nodes[static_cast<std::size_t>(i)];
        auto fabric = Fabric::connect(config, id);
        useEverything(*fabric);
      } catch (const std::exception& error) {
        texts[i] = error.what();
      }
    };
    std::thread other(rank, 1);
    rank(0);
    other.join();
    return texts[0] + texts[1];
  };
  // In a child, so that nothing of other tests counts.
  Children alone(1, [&](int) -> std::string {
    std::string text = threadRound({});
    const Footprint before = footprint();
    for (int round = 0; round < 50; ++round)
      text += threadRound(round % 2 ? std::vector<int>{0, 1} : std::vector<int>{});
    return text + leftBehind(before);
  });
  EXPECT_EQ(alone.join()[0], "") << "threads";

  // Two processes that meet fifty times; rank 0 makes the ids.
  struct Board {
    std::atomic<int> round{0};
    char id[128] = {};
  };
  SharedPage<Board> board;
  Children children(2, [&](int rank) -> std::string {
    Footprint first;
    for (int round = 1; round <= 51; ++round) {
      if (rank == 0) {
        makeUniqueId(board->id);
        board->round.store(round);
      }
      while (board->round.load() < round) usleep(100);
      FabricConfig config = configOf(rank, 2);
      if (round % 2) config.nodeId = rank;
      {
        auto fabric = Fabric::connect(config, board->id);
        useEverything(*fabric);
        fabric->allGather(nullptr, 0, nullptr, 20000);
      }
      if (round == 1) first = footprint();
    }
    return leftBehind(first);
  });
  for (const std::string& text : children.join()) EXPECT_EQ(text, "") << "processes";
}

TEST(Fault, ANewFabricWorksAfterAFailure) {
  for (int round = 0; round < 2; ++round) {
    const auto texts = runRanks(Kind::threads, 2, configOf(0, 2), [](Fabric& fabric) {
      if (fabric.rank() == 1) fabric.abort("on purpose");
      throw std::runtime_error(waitInVain(fabric));
    });
    for (const std::string& text : texts) EXPECT_EQ(text, "on purpose");
    expectRanks(Kind::threads, 2, configOf(0, 2), [](Fabric& fabric) { useEverything(fabric); });
  }
}

}  // namespace
}  // namespace fusco::comm::testing
