// Posted links over a ring, and the doorbell that waits for them.
#include "transport/local/ring.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "base/clock.h"
#include "base/status.h"
#include "transport/local/rank_memory.h"

namespace fusco::transport {
namespace {

// Two ends in one process, without a fabric.
struct Pair {
  explicit Pair(int slots, std::size_t slotBytes)
      : a(slotBytes, {[this, slots, slotBytes] { return ring[0] = make(slots, slotBytes); }, [this] { return ring[1]; },
                      [this] { ++rungB; }}),
        b(slotBytes, {[this, slots, slotBytes] { return ring[1] = make(slots, slotBytes); }, [this] { return ring[0]; },
                      [this] { ++rungA; }}) {}
  static std::shared_ptr<RingMemory> make(int slots, std::size_t slotBytes) {
    return std::make_shared<RingMemory>(SharedMemory::anonymous(RingMemory::bytesFor(slots, slotBytes)), slots,
                                        slotBytes);
  }
  std::shared_ptr<RingMemory> ring[2];
  int rungA = 0, rungB = 0;
  RingLink a, b;
};

TEST(Ring, CreditsEndAndComeBack) {
  Pair pair(3, 256);
  EXPECT_EQ(pair.b.peek(), nullptr);
  EXPECT_EQ(pair.a.bytesMade(), 0u) << "memory before the first use";
  EXPECT_TRUE(pair.a.drained());
  for (int i = 0; i < 3; ++i) {
    std::byte* slot = pair.a.acquire();
    ASSERT_NE(slot, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(slot) % 64, 0u);
    EXPECT_EQ(pair.a.acquire(), slot) << "the same slot until it is posted";
    slot[0] = static_cast<std::byte>(i);
    pair.a.post(1);
  }
  EXPECT_EQ(pair.rungB, 3);
  EXPECT_EQ(pair.a.acquire(), nullptr);
  EXPECT_FALSE(pair.a.drained());
  ASSERT_NE(pair.b.peek(), nullptr);
  EXPECT_EQ(pair.b.peek()[0], std::byte{0});
  pair.b.release();
  EXPECT_EQ(pair.rungA, 1);
  EXPECT_EQ(pair.b.peek()[0], std::byte{1});
  EXPECT_NE(pair.a.acquire(), nullptr);
  pair.a.post(256);
  EXPECT_EQ(pair.a.acquire(), nullptr);
  for (int i = 0; i < 3; ++i) pair.b.release();
  EXPECT_EQ(pair.b.peek(), nullptr);
  EXPECT_TRUE(pair.a.drained());
  EXPECT_EQ(pair.b.bytesMade(), 0u) << "the other direction was never used";
}

TEST(Ring, MisuseIsRefused) {
  Pair pair(1, 128);
  EXPECT_THROW(pair.a.post(1), Error);
  ASSERT_NE(pair.a.acquire(), nullptr);
  EXPECT_THROW(pair.a.post(129), Error);
  EXPECT_THROW(pair.b.release(), Error);
}

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
    const std::int64_t begin = nowNs();
    std::thread other([&] {
      for (int i = 1; i <= kRounds; ++i) {
        wait(b, toB, i);
        toA.store(i, std::memory_order_release);
        a.ring();
      }
    });
    for (int i = 1; i <= kRounds; ++i) {
      toB.store(i, std::memory_order_release);
      b.ring();
      wait(a, toA, i);
    }
    other.join();
    const double microseconds = static_cast<double>(nowNs() - begin) / 1000;
    // One sleep to its end is past this; a busy machine is not.
    EXPECT_LT(microseconds, 20e6);
    EXPECT_EQ(a.sleepers.load(), 0u);
    RecordProperty("microseconds_per_round", std::to_string(microseconds / kRounds));
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
