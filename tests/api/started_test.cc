// Operations that were started, and do not end as their caller wished.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "api/worlds.h"

namespace fusco::test {
namespace {

// A start that was refused is none: nothing is carried out later, when its caller uses the tensors for something else.
TEST(Started, whatNoThreadCouldBeHadForIsNotCarriedOut) {
  runWell({"one process", 1, 1, {}, true, 16384}, [](Rank& self) {
    becomeNobody();
    fuscoComm_t comm = self.connect();
    const Routing routing(8, 1, 1);
    fuscoPlan_t plan = routing.make(comm);
    std::vector<char> in(8 * 64, 7), refused(8 * 64, 1), out(8 * 64, 1);
    {
      const NoMoreThreads none;
      fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
      args.input = in.data();
      args.output = refused.data();
      args.rowBytes = 64;
      requireContains(EXPECT_CODE(fuscoDispatchStart(plan, &args, nullptr), fuscoSystemError), "ulimit -u");
    }
    FUSCO_OK(fuscoDispatch(plan, in.data(), out.data(), 64, nullptr));
    REQUIRE(out == in);
    REQUIRE(std::all_of(refused.begin(), refused.end(), [](char c) { return c == 1; }));
    EXPECT_CODE(fuscoFinish(plan), fuscoInvalidUsage);
    FUSCO_OK(fuscoPlanDestroy(plan));
    shuffleWorks(self, comm);
    leave(comm);
  });
}

// Whose rows are under way gives up its communicator, and has its tensors back when that returns.
void leaveWhileRowsAreUnderWay(const World& world, fuscoResult_t (*giveUp)(fuscoComm_t)) {
  runWell(world, [giveUp](Rank& self) {
    constexpr std::int64_t kTokens = 6000;
    constexpr std::size_t kRowBytes = 4096;
    for (int turn = 0; turn < 8; ++turn) {
      fuscoComm_t comm = self.connect(turn);
      const Routing routing(kTokens, 1, self.ranks());
      fuscoPlan_t plan = routing.make(comm);
      const auto bytes = static_cast<std::size_t>(receiveRows(plan)) * kRowBytes;
      std::vector<char> in(kTokens * kRowBytes, 7), out(bytes, 9);
      self.barrier();
      if (self.rank() == 0) {
        fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
        args.input = in.data();
        args.output = out.data();
        args.rowBytes = kRowBytes;
        FUSCO_OK(fuscoDispatchStart(plan, &args, nullptr));
        std::this_thread::sleep_for(std::chrono::microseconds(500 * turn));
        FUSCO_OK(fuscoPlanDestroy(plan));
        const auto start = std::chrono::steady_clock::now();
        FUSCO_OK(giveUp(comm));
        REQUIRE(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
        std::memset(out.data(), 55, bytes);
        std::this_thread::sleep_for(std::chrono::milliseconds(60));
        for (std::size_t i = 0; i < bytes; i += kRowBytes / 8)
          require(out[i] == 55,
                  "byte " + std::to_string(i) + " was written after the return, turn " + std::to_string(turn));
      } else {
        const fuscoResult_t result = fuscoDispatch(plan, in.data(), out.data(), kRowBytes, nullptr);
        require(result == fuscoSuccess || result == fuscoRemoteError, fuscoGetLastError(nullptr));
        if (result == fuscoRemoteError) requireContains(fuscoGetLastError(nullptr), "rank 0");
        FUSCO_OK(fuscoPlanDestroy(plan));
        FUSCO_OK(fuscoCommDestroy(comm));
      }
      self.barrier();
    }
  });
}

const std::vector<World> kOfThree{{"threads", 3, 3, {}, true, 16384},
                                  {"processes", 3, 1, {}, true, 16384},
                                  {"staged", 3, 1, {}, false, 16384},
                                  {"nodes of threads", 3, 3, {0, 0, 1}, true, 16384}};

TEST(Started, nobodyWritesAfterDestroy) {
  for (const World& world : kOfThree) leaveWhileRowsAreUnderWay(world, fuscoCommDestroy);
}

TEST(Started, nobodyWritesAfterAbort) {
  for (const World& world : kOfThree) leaveWhileRowsAreUnderWay(world, fuscoCommAbort);
}

}  // namespace
}  // namespace fusco::test
