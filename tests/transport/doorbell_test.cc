// The doorbell by which ranks of one machine wake each other.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "base/clock.h"
#include "transport/local/rank_memory.h"

namespace fusco::transport {
namespace {

// Two threads, one of which sleeps most of the time: a lost wake-up would cost a whole sleep.
TEST(Doorbell, NoWakeUpIsLost) {
  for (std::int64_t spin : {0, 3}) {
    RankMemory first(std::size_t{0}), second(std::size_t{0});
    RankHeader& a = first.header();
    RankHeader& b = second.header();
    std::atomic<int> toA{0}, toB{0};
    constexpr int kRounds = 20000;
    auto wait = [spin](RankHeader& bell, std::atomic<int>& word, int value) {
      for (;;) {
        const std::uint32_t seen = bell.bell.load();
        if (word.load(std::memory_order_acquire) >= value) return;
        bell.sleep(seen, 30000000, spin);
      }
    };
    std::thread other([&] {
      for (int i = 1; i <= kRounds; ++i) {
        wait(b, toB, i);
        toA.store(i, std::memory_order_release);
        a.ring();
      }
    });
    const std::int64_t begin = nowNs();
    std::int64_t last = begin, longest = 0;
    for (int i = 1; i <= kRounds; ++i) {
      toB.store(i, std::memory_order_release);
      b.ring();
      wait(a, toA, i);
      const std::int64_t now = nowNs();
      longest = std::max(longest, now - last);
      last = now;
    }
    other.join();
    // A sleep to its end is past this; a round on a busy machine is not.
    EXPECT_LT(longest, 20'000'000'000);
    EXPECT_EQ(a.sleepers.load(), 0u);
    RecordProperty("microseconds_per_round", std::to_string(static_cast<double>(last - begin) / 1000 / kRounds));
  }
}

TEST(Doorbell, SleepEndsByTime) {
  RankMemory memory(std::size_t{0});
  RankHeader& header = memory.header();
  const std::uint32_t seen = header.bell.load();
  std::int64_t begin = nowNs();
  header.sleep(seen, 30000, 0);
  EXPECT_GE(nowNs() - begin, 29'000'000);
  begin = nowNs();
  header.sleep(seen + 1, 5000000, 0);
  header.sleep(seen, 0, 0);
  EXPECT_LT(nowNs() - begin, 1'000'000'000) << "slept although the bell had changed, or for no time";
}

TEST(Doorbell, TheFirstReasonOfAnAbortStays) {
  RankMemory memory(std::size_t{0});
  RankHeader& header = memory.header();
  header.abort("the first");
  header.abort(std::string(5000, 'x'));
  EXPECT_STREQ(header.reason, "the first");
  RankMemory other(std::size_t{0});
  other.header().abort(std::string(5000, 'x'));
  EXPECT_EQ(std::strlen(other.header().reason), RankHeader::kReasonBytes - 1);
}

}  // namespace
}  // namespace fusco::transport
