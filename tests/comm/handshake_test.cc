// What goes over a connection between machines before ranks meet by it: proofs, frames; and by which interfaces.
#include "comm/handshake.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "comm/frames.h"
#include "transport/tcp/connect.h"

namespace fusco::comm::testing {
namespace {

// ---- proofs

struct Ends {
  UniqueFd a, b;
};

Ends connectedPair() {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) != 0) return {};
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

const std::uint8_t kKey[32] = {1, 2, 3, 4, 5, 6, 7, 8};

TEST(Handshake, BothEndsProveThemselvesAndThePurposeArrives) {
  for (const bool take : {true, false}) {
    Ends ends = connectedPair();
    Handshake caller(Handshake::Side::caller, kKey, {Purpose::link, 7, 2, 1});
    Handshake host(Handshake::Side::host, kKey);
    Handshake::Result called = Handshake::Result::again, hosted = Handshake::Result::again;
    for (int turn = 0; turn < 10; ++turn) {
      if (called == Handshake::Result::again) called = caller.step(ends.a.get());
      if (hosted == Handshake::Result::again) hosted = host.step(ends.b.get());
      if (hosted == Handshake::Result::proved && turn == 5) Handshake::answer(ends.b.get(), take);
    }
    EXPECT_EQ(hosted, Handshake::Result::proved);
    EXPECT_EQ(called, take ? Handshake::Result::taken : Handshake::Result::refused);
    EXPECT_EQ(host.purpose().rank, 7);
    EXPECT_EQ(host.purpose().channel, 2);
  }
}

TEST(Handshake, AWrongKeyIsSeenByBothEnds) {
  std::uint8_t other[32] = {};
  for (const bool callerKnows : {true, false}) {
    Ends ends = connectedPair();
    Handshake caller(Handshake::Side::caller, callerKnows ? kKey : other, {Purpose::tree, 1, 0, 0});
    Handshake host(Handshake::Side::host, callerKnows ? other : kKey);
    Handshake::Result called = Handshake::Result::again;
    for (int turn = 0; turn < 10 && called == Handshake::Result::again; ++turn) {
      called = caller.step(ends.a.get());
      host.step(ends.b.get());
    }
    // The caller gives no proof of its own to such a host.
    EXPECT_EQ(called, Handshake::Result::failed);
    EXPECT_EQ(host.step(ends.b.get()), Handshake::Result::again);
  }
}

TEST(Handshake, WhatWasCapturedDoesNotServeAgain) {
  // A wire-tap between the two.
  Ends left = connectedPair(), right = connectedPair();
  Handshake caller(Handshake::Side::caller, kKey, {Purpose::tree, 1, 0, 0});
  Handshake host(Handshake::Side::host, kKey);
  std::string captured;
  const auto pass = [](const UniqueFd& from, const UniqueFd& to, std::string* copy) {
    char buffer[512];
    const ssize_t got = ::recv(from.get(), buffer, sizeof(buffer), MSG_DONTWAIT);
    if (got <= 0) return;
    if (copy != nullptr) copy->append(buffer, static_cast<std::size_t>(got));
    ASSERT_EQ(::send(to.get(), buffer, static_cast<std::size_t>(got), 0), got);
  };
  Handshake::Result result = Handshake::Result::again;
  for (int turn = 0; turn < 10 && result == Handshake::Result::again; ++turn) {
    caller.step(left.a.get());
    pass(left.b, right.a, &captured);
    result = host.step(right.b.get());
    pass(right.a, left.b, nullptr);
  }
  ASSERT_EQ(result, Handshake::Result::proved);

  Ends again = connectedPair();
  ASSERT_EQ(::send(again.a.get(), captured.data(), captured.size(), 0), static_cast<ssize_t>(captured.size()));
  Handshake next(Handshake::Side::host, kKey);
  result = Handshake::Result::again;
  for (int turn = 0; turn < 10 && result == Handshake::Result::again; ++turn) result = next.step(again.b.get());
  EXPECT_EQ(result, Handshake::Result::failed);
}

// ---- random bytes, for hosts of handshakes and for frames

TEST(Handshake, RandomBytesNeverProveAnything) {
  std::mt19937_64 random(3);
  for (int round = 0; round < 3000; ++round) {
    Ends ends = connectedPair();
    std::string bytes(random() % 300, 0);
    for (char& byte : bytes) byte = static_cast<char>(random());
    const std::uint64_t magic = 0x314B485343535546;
    if (round % 2 == 0) bytes.insert(0, reinterpret_cast<const char*>(&magic), sizeof(magic));
    ::send(ends.a.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    ends.a.reset();
    Handshake host(Handshake::Side::host, kKey);
    EXPECT_EQ(host.step(ends.b.get()), Handshake::Result::failed);
  }
}

TEST(Frames, ArriveWholeHoweverTheyAreCut) {
  std::mt19937_64 random(4);
  for (int round = 0; round < 200; ++round) {
    Ends ends = connectedPair();
    Frames from(1 << 20), to(1 << 20);
    std::vector<std::string> sent, got;
    for (int i = 0; i < 20; ++i) {
      sent.push_back(std::string(random() % 30000, static_cast<char>('a' + i)));
      from.queue(static_cast<std::uint32_t>(i), sent.back());
    }
    for (int turn = 0; turn < 10000 && got.size() < sent.size(); ++turn) {
      ASSERT_EQ(from.flush(ends.a.get()), Frames::State::open);
      ASSERT_EQ(to.receive(ends.b.get(),
                           [&](std::uint32_t kind, std::string_view body) {
                             EXPECT_EQ(kind, got.size());
                             got.emplace_back(body);
                           }),
                Frames::State::open);
    }
    EXPECT_EQ(got, sent);
  }
}

TEST(Frames, TooLongOnesAndEndsAreTold) {
  Ends ends = connectedPair();
  Frames from(100), to(100);
  from.queue(1, std::string(101, 'x'));
  from.flush(ends.a.get());
  EXPECT_EQ(to.receive(ends.b.get(), [](std::uint32_t, std::string_view) { FAIL(); }), Frames::State::malformed);
  ends.a.reset();
  Frames next(100);
  EXPECT_EQ(next.receive(ends.b.get(), [](std::uint32_t, std::string_view) { FAIL(); }), Frames::State::closed);
}

// ---- interfaces

TEST(Interfaces, AreChosenAsNamed) {
  const auto of = [](const char* name, bool loopback = false) {
    transport::Interface one;
    one.name = name;
    one.loopback = loopback;
    return one;
  };
  const std::vector<transport::Interface> all = {of("lo", true), of("docker0"), of("eth0"), of("eth1"), of("ib0")};
  const auto names = [&](const std::string& pattern) {
    std::string list;
    for (const auto& one : transport::chooseInterfaces(all, pattern)) list += one.name + " ";
    return list;
  };
  EXPECT_EQ(names(""), "eth0 eth1 ib0 docker0 lo ");
  EXPECT_EQ(names("eth"), "eth0 eth1 ");
  EXPECT_EQ(names("ib,eth"), "ib0 eth0 eth1 ");
  EXPECT_EQ(names("=eth1,lo"), "eth1 lo ");
  EXPECT_EQ(names("=eth"), "");
  EXPECT_EQ(names("^eth"), "ib0 docker0 lo ");
  EXPECT_EQ(names("^docker,lo"), "eth0 eth1 ib0 ");
  for (const auto& one : transport::listInterfaces(4)) EXPECT_EQ(one.address.family, 4) << one.name;
}

// Where nobody listens, and the kernel takes the very port that is called for the caller's own.
TEST(Connections, NoneIsMadeWithOneself) {
  transport::Address address = transport::resolve("127.0.0.1:1");
  address.port = 0;
  // A port that is free.
  transport::listenTcp(&address, 1);
  UniqueFd socket = transport::beginConnect(address, address);
  ASSERT_TRUE(socket);
  pollfd polled{socket.get(), POLLOUT, 0};
  ASSERT_EQ(::poll(&polled, 1, 5000), 1);
  EXPECT_EQ(transport::connectResult(socket.get()), ECONNREFUSED);
  socket.reset();
  // Nor does it keep the port from who is to listen there.
  EXPECT_TRUE(transport::listenTcp(&address, 1, true));
}

TEST(Interfaces, AddressesAreReadAndWritten) {
  EXPECT_EQ(transport::textOf(transport::resolve("127.0.0.1:80")), "127.0.0.1:80");
  EXPECT_EQ(transport::textOf(transport::resolve("[::1]:81")), "[::1]:81");
  EXPECT_EQ(transport::textOf({}), "no address");
  const transport::Address own = transport::resolve("127.0.1.1:80");
  EXPECT_TRUE(transport::meansOnlyItself("node7:80", own));
  EXPECT_TRUE(transport::meansOnlyItself("node7:80", transport::resolve("[::1]:80")));
  for (const char* text : {"127.0.1.1:80", "localhost:80", "ip6-loopback:80", "[::1]:80"})
    EXPECT_FALSE(transport::meansOnlyItself(text, own)) << text;
  EXPECT_FALSE(transport::meansOnlyItself("node7:80", transport::resolve("10.0.0.1:80")));
  // An interface belongs to these, whose number here says nothing elsewhere.
  for (const char* text : {"[fe80::1]:80", "[fe80::1%lo]:80"}) {
    try {
      transport::resolve(text);
      ADD_FAILURE() << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::invalidArgument);
      EXPECT_NE(std::string(error.what()).find("link-local"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace fusco::comm::testing
