// Relays: who dies with one, what those behind it hear, and what they are told.
#include "comm/relay.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <ctime>
#include <deque>
#include <memory>
#include <thread>

#include "comm/frames.h"
#include "comm/handshake.h"
#include "comm/meeting.h"
#include "comm/rendezvous.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm::testing {
namespace {

// A rank of another machine comes and hangs up; the others are told who.
TEST(Relay, ARankBehindARelayThatDiesIsNoticed) {
  const Taken taken;
  const UniqueId id = openMeetingPlace();
  std::atomic<bool> stop{false};
  std::thread doomed([&] {
    // It has a relay of its own machine; its first caller says hello as rank 2, and goes.
    const std::string name = Relay::nameFor(id, 7);
    UniqueFd listener = transport::listenAbstract(name, 16);
    Relay relay(id, listener.get(), {});
    std::thread caller([&] {
      UniqueFd socket = transport::connectAbstract(name, Deadline::afterMs(2000));
      Hello hello;
      std::memcpy(hello.key, id.key, sizeof(hello.key));
      hello.record = recordOf(2, 4, 7);
      transport::sendMessage(socket.get(), &hello, sizeof(hello));
      Taken::await(1u << 2);
    });
    relay.serve(stop);
    caller.join();
  });
  const std::int64_t begin = nowNs();
  expectErrors(meetAll(id, {recordOf(0, 4, id.domain), recordOf(1, 4, 8)}), "code 6",
               {"rank 2 (host7:1002) died or gave up"});
  EXPECT_LT(nowNs() - begin, 5'000'000'000);
  doomed.join();
}

// A relay that does what the test says: it listens, takes the records of some ranks to the meeting place, and dies with
// this object.
class RelayByHand {
 public:
  // Whoever finds no relay opens one: this one has to be made first.
  RelayByHand(const UniqueId& id, std::uint64_t domain)
      : listener_(transport::listenAbstract(Relay::nameFor(id, domain), 16)),
        socket_(transport::beginConnect(id.address)),
        handshake_(Handshake::Side::caller, id.key, Purpose::ofProcess(kProcess)) {}

  static constexpr std::uint64_t kProcess = 4711;

  void bring(int callers) {
    ASSERT_TRUE(wait(socket_.get(), POLLOUT));
    for (auto result = Handshake::Result::again; result != Handshake::Result::taken;) {
      result = handshake_.step(socket_.get());
      ASSERT_TRUE(result == Handshake::Result::taken || (result == Handshake::Result::again && wait(socket_.get())));
    }
    for (int i = 0; i < callers; ++i) {
      ASSERT_TRUE(wait(listener_.get()));
      bool exhausted = false;
      guests_.push_back(transport::acceptOne(listener_.get(), &exhausted));
      ASSERT_TRUE(wait(guests_.back().get()));
      Hello hello;
      std::size_t bytes = 0;
      ASSERT_EQ(transport::receiveMessage(guests_.back().get(), &hello, sizeof(hello), &bytes), transport::Io::done);
      frames_.queue(static_cast<std::uint32_t>(RecordFrame::hello), bytesOf(hello));
    }
    frames_.flush(socket_.get());
  }

  bool hearAnswer() {
    bool answered = false;
    while (!answered && wait(socket_.get())) {
      frames_.receive(socket_.get(), [&](std::uint32_t kind, std::string_view) {
        answered = kind == static_cast<std::uint32_t>(RecordFrame::answer);
      });
    }
    return answered;
  }

 private:
  static bool wait(int descriptor, short events = POLLIN) {
    pollfd polled{descriptor, events, 0};
    return ::poll(&polled, 1, 5000) == 1;
  }

  UniqueFd listener_, socket_;
  Handshake handshake_;
  Frames frames_{1 << 20};
  std::vector<UniqueFd> guests_;
};

// It goes with the answer.
void tellNobody(std::unique_ptr<RelayByHand> relay, int callers) {
  relay->bring(callers);
  EXPECT_TRUE(relay->hearAnswer());
}

TEST(Relay, ARelayThatDiesWithTheAnswerIsReplaced) {
  const UniqueId id = openMeetingPlace();
  std::vector<Record> records = severalHosts(id, 2);
  std::uint64_t member = 1;
  for (Record& record : records) record.member = member++;
  std::thread relay(tellNobody, std::make_unique<RelayByHand>(id, 1), 3);
  const std::int64_t begin = nowNs();
  expectComplete(meetAll(id, records));
  // Late comers would be told for 5 s.
  EXPECT_LT(nowNs() - begin, 4'000'000'000);
  relay.join();
}

// From its own machine and from another one, where there is no relay and none is opened for it.
TEST(Relay, AFailureIsToldToWhoWaits) {
  for (const bool near : {true, false}) {
    const UniqueId id = openMeetingPlace();
    std::vector<Met> met;
    std::thread waiting([&] { met = meetAll(id, {recordOf(0, 3, id.domain), recordOf(1, 3, 8)}); });
    Record failed = recordOf(2, 3, near ? id.domain : 9);
    std::snprintf(failed.failure, sizeof(failed.failure), "no room for it");
    failed.failureCode = static_cast<int>(Code::systemError);
    const std::int64_t begin = nowNs();
    tellFailure(id, failed, Deadline::afterMs(5000));
    EXPECT_LT(nowNs() - begin, 3'000'000'000);
    if (!near) {
      EXPECT_TRUE(transport::listenAbstractUnlessTaken(Relay::nameFor(id, 9), 1));
    }
    waiting.join();
    expectErrors(met, "code 6", {"rank 2 (host", "failed at init: no room for it"});
  }
}

// A rank that comes to a relay by hand.
class Visitor {
 public:
  Visitor(const UniqueId& id, const Record& record)
      : socket_(transport::connectAbstract(Relay::nameFor(id, record.domain), Deadline::afterMs(2000))) {
    std::memcpy(hello_.key, id.key, sizeof(hello_.key));
    hello_.record = record;
  }
  void sayHello() { transport::sendMessage(socket_.get(), &hello_, sizeof(hello_)); }
  // The relay's verdict; -1: it has hung up, or says nothing.
  int verdict() {
    AnswerHead head{};
    std::size_t bytes = 0;
    pollfd polled{socket_.get(), POLLIN, 0};
    const bool heard = ::poll(&polled, 1, 10000) == 1 &&
                       transport::receiveMessage(socket_.get(), &head, sizeof(head), &bytes) == transport::Io::done;
    return heard && bytes == sizeof(head) ? head.code : -1;
  }

 private:
  UniqueFd socket_;
  Hello hello_;
};

// The meeting place has decided by then: the answer reaches the relay before all its ranks have said who they are.
TEST(Relay, TheRelayThatTakesAnothersPlaceWaitsForEveryRankAtItsDoor) {
  const UniqueId id = openMeetingPlace();
  std::vector<Record> records = {recordOf(0, 3, id.domain), recordOf(1, 3, 7), recordOf(2, 3, 7)};
  for (Record& record : records) record.member = static_cast<std::uint64_t>(record.rank) + 1;
  std::thread first(tellNobody, std::make_unique<RelayByHand>(id, 7), 2);
  std::thread near([&] { EXPECT_NO_THROW(meet(id, records[0], Deadline::afterMs(5000))); });
  {
    Visitor one(id, records[1]), two(id, records[2]);
    one.sayHello();
    two.sayHello();
    EXPECT_EQ(one.verdict(), -1);
  }
  first.join();
  near.join();

  UniqueFd listener = transport::listenAbstract(Relay::nameFor(id, 7), 16);
  std::atomic<bool> stop{false};
  Relay relay(id, listener.get(), {});
  std::thread second([&] { relay.serve(stop); });
  Visitor one(id, records[1]), two(id, records[2]);
  one.sayHello();
  EXPECT_EQ(one.verdict(), 0);
  usleep(50000);
  two.sayHello();
  EXPECT_EQ(two.verdict(), 0);
  second.join();
  leaveMeetingPlace(id);
}

// The process of one rank dies, and with it the relay; the other rank behind it comes again. Both count once among
// those that the meeting place stays open for.
TEST(Relay, WhoComesLateHearsOfARankThatDiedWithItsRelay) {
  const UniqueId id = openMeetingPlace();
  std::vector<Record> records;
  for (int rank = 0; rank < 4; ++rank) {
    records.push_back(recordOf(rank, 4, rank == 1 || rank == 2 ? 7 : id.domain));
    records.back().member = static_cast<std::uint64_t>(rank) + 1;
  }
  records[1].process[0] = RelayByHand::kProcess;
  auto relay = std::make_unique<RelayByHand>(id, 7);
  std::vector<std::string> errors(4);
  const auto come = [&](int rank) {
    try {
      meet(id, records[rank], Deadline::afterMs(5000));
    } catch (const Error& error) {
      errors[rank] = error.what();
    }
  };
  auto dying = std::make_unique<Visitor>(id, records[1]);
  dying->sayHello();
  std::thread zero(come, 0), two(come, 2);
  relay->bring(2);
  dying.reset();
  relay.reset();
  zero.join();
  two.join();
  usleep(200000);
  come(3);
  for (const int rank : {0, 2, 3})
    EXPECT_NE(errors[rank].find("rank 1 (host7:1001) died"), std::string::npos) << errors[rank];
}

// While ranks are missing, and after a failure: whoever waits sleeps.
TEST(Relay, WaitingTakesNoProcessor) {
  constexpr Lobby::Patience kPatience{.firstProgressMs = 20};
  const UniqueId id = openMeetingPlace(kPatience);
  UniqueFd listener = transport::listenAbstract(Relay::nameFor(id, 7), 16);
  std::atomic<bool> stop{false};
  Relay relay(id, listener.get(), kPatience);
  std::thread serving([&] { relay.serve(stop); });
  Visitor visitor(id, recordOf(1, 2, 7, 900));
  const std::clock_t begin = std::clock();
  visitor.sayHello();
  EXPECT_EQ(visitor.verdict(), static_cast<int>(Code::remoteError));
  usleep(900000);
  // Of this process's threads; whoever does not sleep takes almost a second.
  EXPECT_LT(static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC, 0.35);
  stop.store(true);
  ::shutdown(listener.get(), SHUT_RDWR);
  serving.join();
}

// Whom a flood of strangers has pushed out, or who was stopped for longer than the meeting place waits, calls again.
TEST(Relay, ACallThatIsHungUpOnIsMadeAgain) {
  UniqueId id{};
  id.magic = UniqueId::kMagic;
  id.version = UniqueId::kVersion;
  id.address = transport::resolve("127.0.0.1:1");
  id.address.port = 0;
  transport::randomBytes(id.key, sizeof(id.key));
  const UniqueFd network = transport::listenTcp(&id.address, 16);
  std::atomic<bool> stop{false};
  Rendezvous place(id, -1, network.get(), {});
  std::thread serving([&] {
    for (int hungUp = 0; hungUp < 3;) {
      pollfd polled{network.get(), POLLIN, 0};
      if (::poll(&polled, 1, 5000) != 1) return;
      bool exhausted = false;
      hungUp += transport::acceptOne(network.get(), &exhausted) ? 1 : 0;
    }
    place.serve(stop);
  });
  expectComplete(meetAll(id, {recordOf(0, 2, 7, 3000), recordOf(1, 2, 8, 3000)}));
  serving.join();
}

// Too many to be asked to make room, but none that says nothing.
TEST(Relay, ManyRanksAreToldThatDescriptorsAreShort) {
  constexpr int kRanks = 80;
  const UniqueId id = openMeetingPlace();
  UniqueFd listener = transport::listenAbstract(Relay::nameFor(id, 7), kRanks);
  std::atomic<bool> stop{false};
  Rendezvous place(id, listener.get(), -1, {});
  std::thread serving([&] { place.serve(stop); });
  std::deque<Visitor> visitors;
  for (int rank = 0; rank < kRanks; ++rank) {
    visitors.emplace_back(id, recordOf(rank, kRanks + 1, 7));
    visitors.back().sayHello();
  }
  usleep(300000);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  {
    // One for the end that calls, none for the one that is called.
    const UniqueFd lowest(::dup(0));
    rlimit little = before;
    little.rlim_cur = static_cast<rlim_t>(lowest.get()) + 1;
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &little), 0);
  }
  visitors.emplace_back(id, recordOf(kRanks, kRanks + 1, 7));
  EXPECT_EQ(visitors.front().verdict(), static_cast<int>(Code::systemError));
  EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  serving.join();
}

}  // namespace
}  // namespace fusco::comm::testing
