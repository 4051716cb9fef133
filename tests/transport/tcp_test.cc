// What is particular to links over TCP: connections that come later, end, or are not what they should be.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/status.h"
#include "transport/link_pair.h"

namespace fusco::transport {
namespace {

using testing::TcpPair;

TEST(TcpLink, ConnectionsMayComeLater) {
  Reactor reactor;
  int asked = 0;
  std::atomic<int> rung{0};
  TcpLink link(reactor, {256, 2, 2, [&] { ++asked; }, [&] { ++rung; }});
  EXPECT_EQ(link.peek(), nullptr);
  EXPECT_EQ(asked, 0) << "the side that only listens asks for nothing";
  EXPECT_EQ(link.acquire(), nullptr);
  EXPECT_EQ(link.acquire(), nullptr);
  EXPECT_EQ(asked, 1);
  EXPECT_TRUE(link.drained());
  auto [a, b] = testing::unixPair();
  auto [c, d] = testing::unixPair();
  link.attach(1, std::move(a));
  EXPECT_EQ(link.acquire(), nullptr) << "one stream is missing";
  EXPECT_THROW(link.attach(1, UniqueFd()), Error);
  EXPECT_EQ(rung, 0);
  link.attach(0, std::move(c));
  EXPECT_EQ(rung, 1);
  EXPECT_TRUE(link.attached());
  EXPECT_NE(link.acquire(), nullptr);
}

TEST(TcpLink, CountsWhatSocketsWereGiven) {
  TcpPair pair(4, 1024, 1, true);
  for (int i = 0; i < 3; ++i) {
    ASSERT_NE(pair.a().acquire(), nullptr);
    pair.a().post(1000);
  }
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(pair.await(1, [&] { return pair.b().peek() != nullptr; }));
    pair.b().release();
  }
  EXPECT_EQ(pair.link(0).bytesSent(), 3 * (1000 + sizeof(TcpFrame)));
  EXPECT_EQ(pair.link(1).bytesReceived(), pair.link(0).bytesSent());
  EXPECT_EQ(pair.link(1).bytesSent(), sizeof(TcpFrame)) << "credits of half of the slots go at once";
  EXPECT_GE(pair.link(0).bytesMade(), 4 * 1024u);
}

// Sends twelve slots over a new connection that is held to `pace` bytes per second, if not to 0: the slices after that.
std::size_t slicesAfterTwelve(std::size_t slot, unsigned pace) {
  auto [mine, theirs] = testing::tcpPair();
  if (pace != 0) {
    EXPECT_EQ(::setsockopt(mine.get(), SOL_SOCKET, SO_MAX_PACING_RATE, &pace, sizeof(pace)), 0);
  }
  Reactor reactor;
  TcpLink link(reactor, {slot, 16, 1, {}, [] {}});
  link.attach(0, std::move(mine));
  EXPECT_EQ(link.sliceBytes(), slot);
  std::thread reader([&] {
    std::vector<std::byte> bytes(slot);
    std::size_t left = 12 * (slot + sizeof(TcpFrame));
    while (left > 0) {
      const ssize_t got = ::recv(theirs.get(), bytes.data(), std::min(left, bytes.size()), 0);
      if (got <= 0) break;
      left -= static_cast<std::size_t>(got);
    }
  });
  for (int i = 0; i < 12; ++i) {
    EXPECT_NE(link.acquire(), nullptr);
    link.post(slot);
  }
  while (!link.drained()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  reader.join();
  return link.sliceBytes();
}

// Slices are as large as their slots until the connection is seen to be slow.
TEST(TcpLink, SlicesOfASlowConnectionAreSmaller) {
  constexpr std::size_t kSlot = 65536;
  const std::size_t slow = slicesAfterTwelve(kSlot, 1'000'000);
  EXPECT_LE(slow, kSlot / 2) << "8 ms of 1 MB/s are less than the least";
  EXPECT_GE(slow, 16 * 1024u);
  // A machine that is busy elsewhere for a tenth of a second makes any connection slow: not each time.
  std::size_t fast = 0;
  for (int i = 0; i < 10 && fast != kSlot; ++i) fast = slicesAfterTwelve(kSlot, 0);
  EXPECT_EQ(fast, kSlot);
}

// Posts three slices over a new connection that `leave` ends: what the other side missed of them and of the end, or "".
std::string missedAfter(const std::function<void(TcpPair&)>& leave) {
  TcpPair pair(4, 1 << 20, 2, true);
  for (int i = 0; i < 3; ++i) {
    std::byte* slot = pair.a().acquire();
    if (slot == nullptr) return "no slot is free";
    std::memset(slot, i + 1, 1 << 20);
    pair.a().post(1 << 20);
  }
  std::jthread leaving([&] { leave(pair); });
  for (int i = 0; i < 3; ++i) {
    const std::byte* slot = nullptr;
    if (!pair.await(1, [&] { return (slot = pair.b().peek()) != nullptr; }))
      return "slice " + std::to_string(i) + " was lost: " + pair.link(1).failure();
    if (slot[(1 << 20) - 1] != static_cast<std::byte>(i + 1)) return "slice " + std::to_string(i) + " is another";
    pair.b().release();
  }
  leaving.join();
  if (!pair.await(1, [&] { return pair.b().peek() == nullptr && pair.link(1).state() == TcpLink::State::closed; }))
    return "the end was not told";
  if (pair.link(1).failure() != "closed its connection") return pair.link(1).failure();
  return pair.b().acquire() == nullptr ? "" : "a slot of a link that has ended";
}

// The peer leaves: what it sent before can be taken, then the link says so.
TEST(TcpLink, EndOfFileIsToldAfterTheLastSlice) {
  bool taken = false;
  const std::string missed = missedAfter([&](TcpPair& pair) {
    taken = pair.link(0).farewell(Deadline::afterMs(20000));
    pair.links[0].reset();
  });
  EXPECT_EQ(missed, "");
  EXPECT_TRUE(taken);
}

// Without a farewell a link gives what was posted a second to leave. A reader that a busy machine keeps waiting for
// longer loses something: not each time.
TEST(TcpLink, ALinkThatEndsSaysFarewell) {
  std::string missed = "untried";
  for (int i = 0; i < 5 && !missed.empty(); ++i) missed = missedAfter([](TcpPair& pair) { pair.links[0].reset(); });
  EXPECT_EQ(missed, "");
}

// Broken while somebody sleeps: the bell rings.
TEST(TcpLink, AResetWakesWhoSleeps) {
  TcpPair pair(2, 4096, 1, true);
  auto [mine, theirs] = testing::tcpPair();
  Reactor reactor;
  std::atomic<int> rung{0};
  TcpLink link(reactor, {4096, 2, 1, {}, [&] { ++rung; }});
  link.attach(0, std::move(mine));
  rung = 0;
  EXPECT_EQ(link.peek(), nullptr);
  reactor.attend();
  const linger hard{1, 0};
  ASSERT_EQ(::setsockopt(theirs.get(), SOL_SOCKET, SO_LINGER, &hard, sizeof(hard)), 0);
  theirs.reset();
  for (int i = 0; i < 2000 && rung == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_GT(rung, 0);
  EXPECT_EQ(link.peek(), nullptr);
  EXPECT_EQ(link.state(), TcpLink::State::failed);
  EXPECT_NE(link.failure().find("reset by peer"), std::string::npos) << link.failure();
}

// A peer that has gone does not end this process by a signal.
TEST(TcpLink, SendingToNobodyRaisesNoSignal) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::signal(SIGPIPE, SIG_DFL);
    Reactor reactor;
    TcpLink link(reactor, {1 << 16, 4, 1, {}, [] {}});
    auto [mine, theirs] = testing::unixPair();
    link.attach(0, std::move(mine));
    theirs.reset();
    for (int i = 0; i < 100 && link.acquire() != nullptr; ++i) link.post(1 << 16);
    _exit(link.state() == TcpLink::State::open ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

// Nothing that comes in makes the link write outside its slots or hand over a slice that was not sent.
TEST(TcpLink, WhatIsNoFrameIsRefused) {
  const TcpFrame good{TcpFrame::kSlice, 0, 0, 64, 0};
  std::vector<TcpFrame> bad(7, good);
  bad[0].kind = 0x20544547;  // "GET "
  bad[1].bytes = 4097;       // more than a slot
  bad[2].sequence = 1;       // out of turn
  bad[3].headBytes = 65;     // more than the slice
  bad[4].released = 1;       // more than was posted
  bad[5] = {TcpFrame::kCredit, 0, 0, 8, 0};
  bad[6].bytes = ~std::uint64_t{0};
  for (const TcpFrame& frame : bad) {
    Reactor reactor;
    TcpLink link(reactor, {4096, 2, 1, {}, [] {}});
    auto [mine, theirs] = testing::unixPair();
    link.attach(0, std::move(mine));
    ASSERT_EQ(::write(theirs.get(), &frame, sizeof(frame)), static_cast<ssize_t>(sizeof(frame)));
    EXPECT_EQ(link.peek(), nullptr);
    EXPECT_EQ(link.state(), TcpLink::State::failed);
    EXPECT_NE(link.failure().find("no frame"), std::string::npos);
  }
  // One slice more than there are slots.
  Reactor reactor;
  TcpLink link(reactor, {4096, 1, 1, {}, [] {}});
  auto [mine, theirs] = testing::unixPair();
  link.attach(0, std::move(mine));
  for (std::uint64_t i = 0; i < 2; ++i) {
    const TcpFrame frame{TcpFrame::kSlice, 0, i, 0, 0};
    ASSERT_EQ(::write(theirs.get(), &frame, sizeof(frame)), static_cast<ssize_t>(sizeof(frame)));
  }
  EXPECT_NE(link.peek(), nullptr);
  reactor.poke();
  EXPECT_EQ(link.state(), TcpLink::State::open);
  link.release();
}

TEST(Reactor, TimersRunUntilTheyAreCancelled) {
  Reactor reactor;
  std::atomic<int> count{0};
  const std::uint64_t timer = reactor.every(1, [&] { ++count; });
  for (int i = 0; i < 2000 && count < 3; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_GE(count, 3);
  reactor.cancel(timer);
  const int after = count;
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(count, after);
}

TEST(Reactor, GoesOnAfterCallsThatFail) {
  Reactor reactor;
  auto [mine, theirs] = testing::unixPair();
  std::atomic<int> told{0}, ticks{0};
  reactor.add(mine.get(), [&](std::uint32_t) {
    ++told;
    fail(Code::systemError, "cannot watch a socket");
  });
  const std::uint64_t timer = reactor.every(1, [&] {
    ++ticks;
    throw std::bad_alloc();
  });
  ASSERT_EQ(::write(theirs.get(), "x", 1), 1);
  for (int round = 1; round <= 2; ++round) {
    reactor.arm(mine.get(), 1 /* EPOLLIN */);
    for (int i = 0; i < 2000 && (told < round || ticks < 2 * round); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_EQ(told, round);
    EXPECT_GE(ticks, 2 * round);
  }
  reactor.cancel(timer);
  reactor.remove(mine.get());
}

TEST(Reactor, TellsOnceAndNothingAfterRemove) {
  Reactor reactor;
  auto [mine, theirs] = testing::unixPair();
  std::atomic<int> told{0};
  reactor.add(mine.get(), [&](std::uint32_t) { ++told; });
  ASSERT_EQ(::write(theirs.get(), "x", 1), 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(told, 0) << "told before it was asked";
  reactor.arm(mine.get(), 1 /* EPOLLIN */);
  for (int i = 0; i < 2000 && told == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(told, 1);
  reactor.arm(mine.get(), 1);
  reactor.remove(mine.get());
  const int after = told;
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(told, after);
}

TEST(Reactor, RemoveAndSettleWaitForACallThatHasRemovedItself) {
  for (const bool byDescriptor : {true, false}) {
    Reactor reactor;
    auto [mine, theirs] = testing::unixPair();
    std::atomic<bool> inside{false}, over{false};
    reactor.add(mine.get(), [&, descriptor = mine.get()](std::uint32_t) {
      reactor.remove(descriptor);
      inside = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      over = true;
    });
    reactor.arm(mine.get(), 4 /* EPOLLOUT */);
    for (int i = 0; i < 2000 && !inside; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ASSERT_TRUE(inside);
    if (byDescriptor) {
      reactor.remove(mine.get());
    } else {
      reactor.settle();
    }
    EXPECT_TRUE(over) << byDescriptor;
  }
}

// A child that was forked off gives back its copies; the parent's links go on.
TEST(TcpLink, AForkedChildTakesNothingAway) {
  TcpPair pair(2, 4096, 1, true);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    for (auto& link : pair.links) link.reset();
    for (auto& reactor : pair.reactors) reactor.reset();
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  ASSERT_NE(pair.a().acquire(), nullptr);
  pair.a().post(100);
  EXPECT_TRUE(pair.await(1, [&] { return pair.b().peek() != nullptr; }));
  pair.b().release();
}

}  // namespace
}  // namespace fusco::transport
