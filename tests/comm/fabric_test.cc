// The fabric as the engine uses it: the same cases for ranks as threads and as processes.
#include "comm/fabric.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "comm/world.h"

namespace fusco::comm::testing {
namespace {

class FabricTest : public ::testing::TestWithParam<Kind> {};

FabricConfig smallConfig() {
  FabricConfig config;
  config.controlBytes = 4096;
  config.initTimeoutMs = 20000;
  return config;
}

std::atomic<std::uint32_t>& word(std::byte* memory) { return *reinterpret_cast<std::atomic<std::uint32_t>*>(memory); }

// Waits as the engine does.
template <typename Condition>
void await(Fabric& fabric, Condition condition, std::int64_t limitMs = 20000) {
  const Deadline deadline = Deadline::afterMs(limitMs);
  for (;;) {
    const std::uint32_t seen = fabric.bell();
    if (condition()) return;
    fabric.check();
    require(!deadline.passed(), "waited too long");
    fabric.sleep(seen, 20000);
  }
}

// Tells something to all ranks.
template <typename T>
std::vector<T> gather(Fabric& fabric, const T& mine) {
  std::vector<T> all(static_cast<std::size_t>(fabric.ranks()));
  fabric.allGather(&mine, sizeof(T), all.data(), 20000);
  return all;
}

TEST_P(FabricTest, ControlMemoryIsTheSameForAll) {
  for (int ranks : {1, 2, 3, 8}) {
    expectRanks(GetParam(), ranks, smallConfig(), [](Fabric& fabric) {
      const int me = fabric.rank();
      require(reinterpret_cast<std::uintptr_t>(fabric.control(me)) % 64 == 0, "not aligned");
      for (int i = 0; i < 4096; ++i)
        require(i < 4 * fabric.ranks() || fabric.control(me)[i] == std::byte{0}, "not zeroed");
      for (int peer = 0; peer < fabric.ranks(); ++peer) {
        word(fabric.control(peer) + 4 * me).store(static_cast<std::uint32_t>(100 * me + peer + 1));
        fabric.ring(peer);
      }
      for (int peer = 0; peer < fabric.ranks(); ++peer) {
        await(fabric, [&] {
          return word(fabric.control(me) + 4 * peer).load() == static_cast<std::uint32_t>(100 * peer + me + 1);
        });
      }
      require(fabric.topology().ranks() == fabric.ranks() && fabric.topology().nodes() == 1, "topology");
      require(fabric.describeRank(me).starts_with("rank " + std::to_string(me) + " ("), fabric.describeRank(me));
    });
  }
}

TEST_P(FabricTest, OneProcessIsKnown) {
  const bool threads = GetParam() == Kind::threads;
  expectRanks(GetParam(), 2, smallConfig(),
              [threads](Fabric& fabric) { require(fabric.oneProcess() == threads, "oneProcess is wrong"); });
}

TEST_P(FabricTest, WindowsOfManySizesAreReached) {
  // Threads free and allocate at the same time: the next window may lie where this one was.
  const bool alone = GetParam() == Kind::processes;
  expectRanks(GetParam(), 3, smallConfig(), [alone](Fabric& fabric) {
    const int me = fabric.rank();
    const int next = (me + 1) % 3, before = (me + 2) % 3;
    for (std::size_t bytes : {std::size_t{1}, std::size_t{4096}, std::size_t{70001}, std::size_t{5} << 20}) {
      auto* window = static_cast<std::byte*>(windowAllocate(bytes));
      require(windowContains(window, bytes), "not contained");
      require(window[0] == std::byte{0} && window[bytes - 1] == std::byte{0}, "not zeroed");
      const transport::MemoryRef ref = fabric.describe(window, bytes);
      require(ref.kind == transport::MemoryRef::window && ref.offset == 0, "not described as a window");
      const auto refs = gather(fabric, ref);
      std::byte* there = fabric.reach(next, refs[static_cast<std::size_t>(next)]);
      require(there != nullptr, "not reached");
      there[0] = static_cast<std::byte>(me + 1);
      there[bytes - 1] = static_cast<std::byte>(me + 1);
      gather(fabric, 0);
      require(window[0] == static_cast<std::byte>(before + 1), "first byte");
      require(window[bytes - 1] == static_cast<std::byte>(before + 1), "last byte");
      gather(fabric, 0);
      require(windowFree(window), "not freed");
      if (alone) require(!windowFree(window) && !windowContains(window, 1), "still there");
    }
  });
}

// A new window often gets the address of the one freed before: peers must see the new memory.
TEST_P(FabricTest, FreedWindowsAreNeverReachedAgain) {
  expectRanks(GetParam(), 2, smallConfig(), [](Fabric& fabric) {
    const int peer = 1 - fabric.rank();
    gather(fabric, 0);
    const int mappings = footprint().mappings;
    gather(fabric, 0);
    for (int round = 0; round < 30; ++round) {
      auto* window = static_cast<int*>(windowAllocate(8192));
      const auto refs = gather(fabric, fabric.describe(window, 8192));
      *reinterpret_cast<int*>(fabric.reach(peer, refs[static_cast<std::size_t>(peer)])) = 1000 * peer + round;
      gather(fabric, 0);
      require(*window == 1000 * fabric.rank() + round, "wrote to another window");
      windowFree(window);
    }
    // The peer's view of them goes as well.
    gather(fabric, 0);
    const Deadline deadline = Deadline::afterMs(2000);
    while (footprint().mappings > mappings && !deadline.passed()) {
      fabric.check();
      usleep(5000);
    }
    require(footprint().mappings == mappings, "freed windows are still mapped");
    gather(fabric, 0);
  });
}

TEST_P(FabricTest, ManyWindowsAtOnceDoNotBlock) {
  expectRanks(GetParam(), 2, smallConfig(), [](Fabric& fabric) {
    const int peer = 1 - fabric.rank();
    std::vector<void*> windows;
    std::vector<transport::MemoryRef> refs;
    for (int i = 0; i < 600; ++i) {
      windows.push_back(windowAllocate(64));
      *static_cast<int*>(windows.back()) = i;
      refs.push_back(fabric.describe(windows.back(), 64));
    }
    std::vector<transport::MemoryRef> all(1200);
    fabric.allGather(refs.data(), refs.size() * sizeof(refs[0]), all.data(), 20000);
    for (int i = 0; i < 600; ++i) {
      const std::byte* there = fabric.reach(peer, all[static_cast<std::size_t>(600 * peer + i)]);
      require(*reinterpret_cast<const int*>(there) == i, "another window");
    }
    gather(fabric, 0);
    for (void* window : windows) windowFree(window);
  });
}

TEST_P(FabricTest, PrivateMemoryIsReachedOrCopied) {
  for (bool allowed : {true, false}) {
    FabricConfig config = smallConfig();
    config.allowProcessVm = allowed;
    const bool threads = GetParam() == Kind::threads;
    expectRanks(GetParam(), 2, config, [=](Fabric& fabric) {
      const int peer = 1 - fabric.rank();
      std::vector<int> data(5000, fabric.rank());
      const auto refs = gather(fabric, fabric.describe(data.data(), data.size() * sizeof(int)));
      const auto& ref = refs[static_cast<std::size_t>(peer)];
      require(ref.kind == transport::MemoryRef::privateMemory, "not private");
      std::byte* there = fabric.reach(peer, ref);
      require((there != nullptr) == threads, "reach");
      if (!allowed) require(!fabric.processVm(), "process_vm in spite of the setting");
      if (fabric.processVm()) {
        // 5000 single numbers there in reverse order, in pieces of 3 from here.
        std::vector<int> source(5000);
        for (int i = 0; i < 5000; ++i) source[static_cast<std::size_t>(i)] = 10000 * fabric.rank() + i;
        std::vector<transport::Segment> local, remote;
        for (std::size_t i = 0; i < 5000; i += 3) local.push_back({&source[i], std::min<std::size_t>(3, 5000 - i) * 4});
        for (std::uint64_t i = 0; i < 5000; ++i) {
          remote.push_back({reinterpret_cast<void*>(ref.address + (4999 - i) * 4), 4});
        }
        fabric.vmWrite(peer, local, remote);
        gather(fabric, 0);
        for (int i = 0; i < 5000; ++i) {
          require(data[static_cast<std::size_t>(4999 - i)] == 10000 * peer + i, "wrong row");
        }
        std::vector<int> back(5000);
        std::vector<transport::Segment> whole{{back.data(), 20000}};
        fabric.vmRead(peer, whole, remote);
        require(back == source, "read back something else");
      }
      gather(fabric, 0);
    });
  }
}

TEST_P(FabricTest, PostedLinksKeepOrderAndCredits) {
  FabricConfig config = smallConfig();
  config.slotBytes = 1024;
  config.slots = 3;
  expectRanks(GetParam(), 4, config,
              [](Fabric& fabric) {
                const int peer = 3 - fabric.rank();
                require(fabric.topology().nodes() == 2 &&
                            fabric.topology().nodeOf(peer) != fabric.topology().nodeOf(fabric.rank()),
                        "nodes");
                constexpr std::uint64_t kSlices = 200;
                for (int channel = 0; channel < Fabric::kChannels; channel += 2) {
                  transport::PostedLink& link = fabric.link(peer, channel);
                  require(link.slotBytes() == 1024 && link.drained(), "fresh link");
                  std::uint64_t sent = 0, received = 0;
                  await(fabric, [&] {
                    for (std::byte* slot; sent < kSlices && (slot = link.acquire()) != nullptr; ++sent) {
                      require(slot == link.acquire(), "acquire must give the same slot");
                      std::memcpy(slot, &sent, sizeof(sent));
                      std::memset(slot + 8, static_cast<int>(sent), 1016);
                      link.post(1024);
                    }
                    while (const std::byte* slot = link.peek()) {
                      std::uint64_t sequence;
                      std::memcpy(&sequence, slot, sizeof(sequence));
                      require(sequence == received, "out of order");
                      require(slot[1023] == static_cast<std::byte>(received), "payload");
                      link.release();
                      ++received;
                    }
                    return sent == kSlices && received == kSlices && link.drained();
                  });
                }
              },
              {0, 0, 1, 1});
}

// So many rings that their announcements do not fit the peer's socket: their sender has settled only when the peer has
// all, and after that need not look at anything any more.
TEST(Fabric, WhatIsToldArrivesThoughItsSenderWaitsForNothing) {
  FabricConfig config = smallConfig();
  config.lanesPerNode = 64;
  config.slotBytes = 128;
  config.slots = 1;
  SharedPage<std::atomic<int>> stage;
  const auto texts = runRanks(Kind::processes, 2, config,
                              [&](Fabric& fabric) {
                                const auto eachLink = [&](const std::function<void(transport::PostedLink&)>& visit) {
                                  for (int path = 0; path < fabric.topology().paths(); ++path) {
                                    for (int channel = 0; channel < Fabric::kChannels; ++channel)
                                      visit(fabric.link(1 - fabric.rank(), channel, path));
                                  }
                                };
                                if (fabric.rank() == 0) {
                                  eachLink([](transport::PostedLink& link) {
                                    require(link.acquire() != nullptr, "no slot");
                                    link.post(64);
                                  });
                                  require(!fabric.settled(), "all went at once: the test shows nothing");
                                  stage->store(1);
                                  await(fabric, [&] { return fabric.settled(); });
                                  while (stage->load() < 2) usleep(1000);
                                  return;
                                }
                                while (stage->load() < 1) usleep(1000);
                                eachLink([&](transport::PostedLink& link) {
                                  await(
                                      fabric, [&] { return link.peek() != nullptr; }, 5000);
                                  link.release();
                                });
                                stage->store(2);
                              },
                              {0, 1});
  for (const std::string& text : texts) EXPECT_EQ(text, "");
}

// A rank whose operation has failed gets its memory back: nobody touches it after awaitMoves().
TEST_P(FabricTest, WhoAbortsWaitsForMovesAndNoneBeginsAfterwards) {
  SharedPage<std::atomic<int>> stage;
  const auto texts = runRanks(GetParam(), 2, smallConfig(), [&](Fabric& fabric) {
    if (fabric.rank() == 1) {
      fabric.moveBegins();
      stage->store(1);
      usleep(50000);
      stage->store(2);
      fabric.moveEnds();
      for (const Deadline patience = Deadline::afterMs(5000); !patience.passed(); usleep(1000)) {
        fabric.moveBegins();
        fabric.moveEnds();
      }
      return;
    }
    while (stage->load() < 1) usleep(100);
    fabric.abort("on purpose");
    fabric.awaitMoves();
    require(stage->load() == 2, "somebody still moves");
    fabric.check();
  });
  for (const std::string& text : texts) EXPECT_EQ(text, "code 6: on purpose");
}

TEST_P(FabricTest, GathersOfAnySizeInTurn) {
  expectRanks(GetParam(), 4, smallConfig(), [](Fabric& fabric) {
    for (std::size_t bytes : {0, 1, 8192, 8193, 100000}) {
      std::vector<unsigned char> mine(bytes + 1, static_cast<unsigned char>(fabric.rank() + bytes));
      std::vector<unsigned char> all(4 * bytes + 1);
      fabric.allGather(mine.data(), bytes, all.data(), 20000);
      for (std::size_t i = 0; i < 4 * bytes; ++i) {
        require(all[i] == static_cast<unsigned char>(i / bytes + bytes), "gathered something else");
      }
    }
  });
}

TEST_P(FabricTest, GatherOfDifferentSizesNamesBoth) {
  const auto texts = runRanks(GetParam(), 2, smallConfig(), [](Fabric& fabric) {
    char buffer[200];
    fabric.allGather(buffer, fabric.rank() == 0 ? 10 : 20, buffer + 50, 20000);
  });
  for (const std::string& text : texts) {
    EXPECT_TRUE(text.starts_with("code 5")) << text;
    EXPECT_NE(text.find(" 10"), std::string::npos) << text;
    EXPECT_NE(text.find(" 20"), std::string::npos) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, FabricTest, ::testing::Values(Kind::threads, Kind::processes),
                         [](const auto& one) { return std::string(nameOf(one.param)); });

}  // namespace
}  // namespace fusco::comm::testing
