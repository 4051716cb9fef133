// Links by queue pairs, in the soft-RoCE machine: what every link does, and what is particular to these.
#include <gmock/gmock.h>
#include <unistd.h>

#include <barrier>
#include <cstdio>
#include <fstream>

#include "rdma/pair.h"
#include "transport/link_cases.h"
#include "transport/local/window.h"

namespace fusco::transport {
namespace {

using ::testing::HasSubstr;
using testing::VerbsPair;

const Medium kMedia[] = {
    {"queuePairs",
     [](int slots, std::size_t slotBytes) -> std::unique_ptr<LinkPair> {
       return std::make_unique<VerbsPair>(slots, slotBytes);
     },
     4},
};

INSTANTIATE_TEST_SUITE_P(Verbs, Link, ::testing::ValuesIn(kMedia),
                         [](const auto& one) { return std::string(one.param.name); });

// Slices of one end, all the same, taken by the other.
void stream(VerbsPair& pair, int count, std::size_t bytes) {
  int sent = 0, received = 0;
  const auto send = [&] {
    while (sent < count && pair.a().acquire() != nullptr) {
      pair.a().post(bytes);
      ++sent;
    }
  };
  while (received < count) {
    send();
    const bool came = pair.await(1, [&] {
      send();
      return pair.b().peek() != nullptr;
    });
    ASSERT_TRUE(came) << received << " of " << count;
    pair.b().release();
    ++received;
  }
  // Until all are acknowledged.
  ASSERT_TRUE(pair.await(0, [&] {
    pair.a().peek();
    return pair.link(0).counts().sendsDone >= static_cast<std::uint64_t>(count);
  }));
}

// Calls of read and write by this process, which are how soft-RoCE's provider and completion channels reach the kernel.
std::uint64_t systemCalls() {
  std::ifstream file("/proc/self/io");
  std::string name;
  std::uint64_t value = 0, calls = 0;
  while (file >> name >> value) calls += name == "syscr:" || name == "syscw:" ? value : 0;
  return calls;
}

// What a megabyte costs: a slice is a write and a notice, posted by one call and completed once, whatever its size.
TEST(VerbsLink, WorkRequestsAndCompletionsOfAMegabyte) {
  constexpr int kSlices = 16;
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  VerbsPair pair(4, kMiB);
  const auto sent0 = pair.link(0).counts(), got0 = pair.link(1).counts();
  const std::uint64_t calls0 = systemCalls();
  stream(pair, kSlices, kMiB);
  const std::uint64_t calls = systemCalls() - calls0;
  const auto sent = pair.link(0).counts(), got = pair.link(1).counts();
  EXPECT_EQ(sent.bytesWritten - sent0.bytesWritten, kSlices * kMiB);
  EXPECT_EQ(sent.workRequests - sent0.workRequests, 2u * kSlices);
  EXPECT_EQ(sent.posts - sent0.posts, 1u * kSlices);
  EXPECT_EQ(sent.sendsDone - sent0.sendsDone, 1u * kSlices) << "one signalled completion a slice";
  // Credits: one for two slices here (half of the slots), an eighth of them signalled.
  EXPECT_LE(got.workRequests - got0.workRequests, kSlices / 2u + 1);
  EXPECT_LE(got.sendsDone - got0.sendsDone, kSlices / 16u + 1);
  EXPECT_EQ(got.bytesWritten - got0.bytesWritten, 0u);
  EXPECT_LE(got.receives - got0.receives, 1u * kSlices + 1);
  // Posts and requests for an event are one each here, and an event at most three (told, read, nothing more).
  const auto notified = sent.notifications - sent0.notifications + got.notifications - got0.notifications;
  const auto events = sent.events - sent0.events + got.events - got0.events;
  const auto posts = sent.posts - sent0.posts + got.posts - got0.posts;
  EXPECT_LE(calls, posts + notified + 3 * events + 20);
  const double mib = kSlices;
  std::printf(
      "a MiB: sender %.2f requests in %.2f posts, %.2f completions, %.2f interrupts; receiver %.2f requests, "
      "%.2f completions, %.2f interrupts; %.2f events asked for and %.2f system calls by both\n",
      static_cast<double>(sent.workRequests - sent0.workRequests) / mib,
      static_cast<double>(sent.posts - sent0.posts) / mib,
      static_cast<double>(sent.sendsDone - sent0.sendsDone + sent.arrivals - sent0.arrivals) / mib,
      static_cast<double>(sent.events - sent0.events) / mib,
      static_cast<double>(got.workRequests - got0.workRequests) / mib,
      static_cast<double>(got.sendsDone - got0.sendsDone + got.arrivals - got0.arrivals) / mib,
      static_cast<double>(got.events - got0.events) / mib, static_cast<double>(notified) / mib,
      static_cast<double>(calls) / mib);
}

// How much has left, and for how long something was on its way, where whoever sends waits for it.
TEST(VerbsLink, TellsHowFastSlicesLeave) {
  constexpr std::size_t kBytes = 1 << 16, kMostSlices = 500;
  VerbsPair pair(2, kBytes);
  EXPECT_EQ(pair.a().sent().bytes, 0u);
  const std::int64_t begin = nowNs();
  std::size_t slices = 0;
  // A slice whose end nobody saw for a while, since the machine was busy, is not counted.
  for (; slices < kMostSlices && (slices < 10 || pair.a().sent().bytes < 3 * kBytes); ++slices) {
    ASSERT_TRUE(pair.await(0, [&] { return pair.a().acquire() != nullptr; }));
    pair.a().post(kBytes);
    ASSERT_TRUE(pair.await(0, [&] {
      pair.a().peek();
      return pair.link(0).counts().sendsDone > slices;
    }));
    ASSERT_TRUE(pair.await(1, [&] { return pair.b().peek() != nullptr; }));
    pair.b().release();
  }
  const PostedLink::Sent sent = pair.a().sent();
  EXPECT_GE(sent.bytes, 3 * kBytes);
  EXPECT_LE(sent.bytes, slices * kBytes);
  EXPECT_EQ(sent.bytes % kBytes, 0u);
  EXPECT_GT(sent.busyNs, 0);
  EXPECT_LT(sent.busyNs, nowNs() - begin);
  EXPECT_EQ(pair.b().sent().bytes, 0u);
  // Nothing is on its way: time that passes is nobody's.
  ::usleep(20000);
  EXPECT_EQ(pair.a().sent().busyNs, sent.busyNs);
  std::printf("%zu of %zu slices were seen to leave, in %lld us\n", sent.bytes / kBytes, slices,
              static_cast<long long>(sent.busyNs / 1000));
}

TEST(VerbsLink, SmallSlicesAreOneRequest) {
  VerbsPair pair(4, 4096);
  const auto before = pair.link(0).counts();
  stream(pair, 20, 4096);
  EXPECT_EQ(pair.link(0).counts().workRequests - before.workRequests, 20u);
}

// Rows in a window are read by the NIC from where they lie, in requests of 16 pieces; others are packed.
TEST(VerbsLink, RowsOfAWindowAreGathered) {
  constexpr std::size_t kRowBytes = 8192, kRows = 48, kHead = 4096;
  VerbsPair pair(2, std::size_t{1} << 19);
  auto* const window = static_cast<std::byte*>(allocateWindow(4 * kRows * kRowBytes));
  std::vector<std::byte> packed(4 * kRows * kRowBytes);
  for (std::size_t i = 0; i < packed.size(); ++i) packed[i] = window[i] = static_cast<std::byte>(i * 2654435761u >> 20);
  const auto sendRows = [&](std::byte* from, std::size_t stride) {
    std::vector<Segment> rows;
    for (std::size_t r = 0; r < kRows; ++r) rows.push_back({from + r * stride, kRowBytes});
    std::byte* const slot = pair.a().acquire();
    ASSERT_NE(slot, nullptr);
    std::memset(slot, 7, kHead);
    pair.a().postRows(kHead, rows);
    const std::byte* got = nullptr;
    ASSERT_TRUE(pair.await(1, [&] { return (got = pair.b().peek()) != nullptr; }));
    EXPECT_EQ(got[kHead - 1], std::byte{7});
    for (std::size_t r = 0; r < kRows; ++r) {
      EXPECT_EQ(std::memcmp(got + kHead + r * kRowBytes, packed.data() + r * stride, kRowBytes), 0) << r;
    }
    pair.b().release();
    ASSERT_TRUE(pair.await(0, [&] { return pair.a().drained(); }));
  };
  const auto requests = [&] { return pair.link(0).counts().workRequests; };
  ASSERT_TRUE(pair.a().gathers());
  std::uint64_t before = requests();
  sendRows(window, 2 * kRowBytes);
  EXPECT_EQ(requests() - before, 5u) << "49 pieces and a notice";
  EXPECT_EQ(pair.link(0).counts().bytesGathered, kRows * kRowBytes);
  before = requests();
  sendRows(window, kRowBytes);
  EXPECT_EQ(requests() - before, 2u) << "rows that follow each other are one piece";
  before = requests();
  sendRows(packed.data(), 2 * kRowBytes);
  EXPECT_EQ(requests() - before, 2u) << "packed into the slot";
  EXPECT_EQ(pair.link(0).counts().bytesGathered, 2 * kRows * kRowBytes);
  EXPECT_GE(pair.link(0).counts().sendsDone, 2u);
  EXPECT_LE(pair.link(0).counts().sendsDone, 3u) << "one completion a slice, however many requests";
  // Before the window goes, so does its registration.
  pair.nics[0]->forgetWindow(findWindow(window, 1)->id);
  removeWindow(window);
}

// The text of an end once it has failed.
std::string failureOf(VerbsPair& pair, int end) {
  const bool failed = pair.await(end, [&] {
    pair.ends[end]->peek();
    return pair.link(end).state() != NetworkLink::State::open;
  });
  return failed ? pair.link(end).failure() : "nothing failed";
}

TEST(VerbsLink, QueuePairInErrorNamesBothEnds) {
  VerbsPair pair(2, 4096);
  const std::int64_t begin = nowNs();
  ASSERT_NE(pair.a().acquire(), nullptr);
  pair.link(0).breakQueuePair();
  pair.a().post(4096);
  const std::string text = failureOf(pair, 0);
  EXPECT_LT(nowNs() - begin, 10'000'000'000);
  EXPECT_THAT(text, HasSubstr("Work Request Flushed Error (work completion 5"));
  EXPECT_THAT(text, HasSubstr("rxe0 port 1 of this rank (10.77.0.1)"));
  EXPECT_THAT(text, HasSubstr("rxe2 port 1 of the other (10.77.0.3)"));
  EXPECT_EQ(pair.a().acquire(), nullptr);
  EXPECT_TRUE(pair.a().drained()) << "nobody waits for a link that has failed";
}

TEST(VerbsLink, WrongKeyIsRefusedByTheOther) {
  VerbsPair pair(2, 4096);
  const std::int64_t begin = nowNs();
  pair.link(0).spoilKey();
  ASSERT_NE(pair.a().acquire(), nullptr);
  pair.a().post(4096);
  const std::string text = failureOf(pair, 0);
  EXPECT_LT(nowNs() - begin, 10'000'000'000);
  EXPECT_THAT(text, HasSubstr("remote access error (work completion 10"));
  EXPECT_THAT(text, HasSubstr("rxe0 port 1 of this rank"));
  EXPECT_THAT(text, HasSubstr("rxe2 port 1 of the other"));
}

// With two ports at each end a queue pair may break as often as it likes (well, fifteen times).
TEST(VerbsLink, OtherPortsTakeOverAndNothingIsLost) {
  VerbsPair pair(4, 4096, {"=rxe0,rxe1", "=rxe2,rxe3"});
  std::string wrong[2];
  std::atomic<bool> over{false}, again{true};
  std::barrier<> bothEnds(2);
  // Until queue pairs have broken twice: a fast machine has exchanged all slices before.
  const auto exchangeOften = [&](int end) {
    for (unsigned round = 0; again; ++round) {
      exchange(pair, end, 300, 4096, 42 + 2 * round, wrong[end]);
      bothEnds.arrive_and_wait();
      if (end == 0) again = wrong[0].empty() && wrong[1].empty() && pair.link(0).moves() < 2 && round < 20;
      bothEnds.arrive_and_wait();
    }
  };
  std::thread other([&] { exchangeOften(1); });
  std::thread breaker([&] {
    for (int i = 0; i < 12 && !over;) {
      ::usleep(60000);
      if (!pair.link(i % 2).attached()) continue;
      pair.link(i % 2).breakQueuePair();
      ++i;
    }
  });
  exchangeOften(0);
  other.join();
  over = true;
  breaker.join();
  EXPECT_EQ(wrong[0], "");
  EXPECT_EQ(wrong[1], "");
  EXPECT_GE(pair.link(0).moves(), 2);
}

// One port here, two there: the other end takes its other one.
TEST(VerbsLink, TheOtherEndHasAnotherPort) {
  VerbsPair pair(2, 4096, {"=rxe0", "=rxe2,rxe3"});
  ASSERT_NE(pair.a().acquire(), nullptr);
  pair.link(0).breakQueuePair();
  pair.a().post(4096);
  ASSERT_TRUE(pair.await(1, [&] { return pair.b().peek() != nullptr; })) << pair.link(0).failure();
  pair.b().release();
  EXPECT_EQ(pair.link(0).moves(), 1);
  stream(pair, 5, 4096);
}

}  // namespace
}  // namespace fusco::transport
