// How ranks of several machines meet: relays, proofs, strangers, agreed addresses. Machines are domains that the tests
// make up; everything goes over loopback or this machine's own address.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <ctime>
#include <deque>
#include <fstream>
#include <memory>
#include <random>
#include <thread>

#include "base/clock.h"
#include "base/point.h"
#include "base/status.h"
#include "comm/bootstrap.h"
#include "comm/frames.h"
#include "comm/handshake.h"
#include "comm/relay.h"
#include "comm/rendezvous.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm::testing {
namespace {

Record recordOf(int rank, int ranks, std::uint64_t domain, std::int64_t timeoutMs = 10000) {
  Record record{};
  record.rank = rank;
  record.ranks = ranks;
  record.nodeId = -1;
  record.lanesPerNode = 1;
  record.pid = 1000 + rank;
  record.domain = domain;
  record.initTimeoutMs = timeoutMs;
  std::snprintf(record.hostName, sizeof(record.hostName), "host%d", static_cast<int>(domain));
  return record;
}

struct Met {
  std::string error;
  std::vector<Record> records;
};

// One thread for each record.
std::vector<Met> meetAll(const UniqueId& id, const std::vector<Record>& records) {
  std::vector<Met> met(records.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < records.size(); ++i) {
    threads.emplace_back([&, i] {
      try {
        met[i].records = meet(id, records[i], Deadline::afterMs(records[i].initTimeoutMs * 21 / 20 + 5000));
      } catch (const Error& error) {
        met[i].error = "code " + std::to_string(static_cast<int>(error.code())) + ": " + error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (met.front().error.empty()) leaveMeetingPlace(id);
  return met;
}

void expectComplete(const std::vector<Met>& met) {
  for (const Met& one : met) {
    EXPECT_EQ(one.error, "");
    ASSERT_EQ(one.records.size(), met.size());
    for (std::size_t rank = 0; rank < met.size(); ++rank) EXPECT_EQ(one.records[rank].rank, static_cast<int>(rank));
  }
}

void expectErrors(const std::vector<Met>& met, const std::string& code, const std::vector<std::string>& words) {
  for (const Met& one : met) {
    EXPECT_TRUE(one.error.starts_with(code)) << one.error;
    for (const std::string& word : words)
      EXPECT_NE(one.error.find(word), std::string::npos) << word << ": " << one.error;
  }
}

// Which ranks meeting places of this process have taken since this was made.
class Taken {
 public:
  Taken() {
    ranks.store(0);
    pointWatcher.store([](const char* name, int rank) {
      if (std::strcmp(name, "taken") == 0) ranks.fetch_or(1u << rank);
    });
  }
  ~Taken() { pointWatcher.store(nullptr); }
  static void await(unsigned wanted) {
    for (const Deadline patience = Deadline::afterMs(10000); (ranks.load() & wanted) != wanted; usleep(1000)) {
      if (patience.passed()) return ADD_FAILURE() << "taken: " << ranks.load() << ", of " << wanted;
    }
  }

 private:
  static inline std::atomic<unsigned> ranks{0};  // a bit for each
};

// Two ranks near the meeting place, and `hosts` other machines of three.
std::vector<Record> severalHosts(const UniqueId& id, int hosts) {
  std::vector<Record> records;
  const int ranks = 2 + 3 * hosts;
  for (int rank = 0; rank < ranks; ++rank) {
    records.push_back(recordOf(rank, ranks, rank < 2 ? id.domain : static_cast<std::uint64_t>(1 + (rank - 2) / 3)));
  }
  return records;
}

TEST(Meeting, RanksOfSeveralMachinesMeet) {
  const UniqueId id = openMeetingPlace();
  ASSERT_TRUE(id.address);
  expectComplete(meetAll(id, severalHosts(id, 4)));
}

TEST(Meeting, NobodyNearTheMeetingPlace) {
  const UniqueId id = openMeetingPlace();
  expectComplete(meetAll(id, {recordOf(0, 3, 5), recordOf(1, 3, 6), recordOf(2, 3, 6)}));
}

TEST(Meeting, MissingRanksAreNamedBehindRelays) {
  const UniqueId id = openMeetingPlace();
  const std::int64_t begin = nowNs();
  expectErrors(meetAll(id, {recordOf(0, 4, id.domain, 400), recordOf(2, 4, 7, 400)}), "code 6",
               {"2 of 4 came", "missing: rank 1, rank 3"});
  EXPECT_LT(nowNs() - begin, 5'000'000'000);
}

TEST(Meeting, DisagreementsAreToldBehindRelays) {
  const UniqueId id = openMeetingPlace();
  auto records = severalHosts(id, 2);
  records[4].net = 1;
  expectErrors(meetAll(id, records), "code 5", {"FUSCO_NET", "has 0", "has 1"});
}

// A rank of another machine comes and hangs up; the others are told who.
TEST(Meeting, ARankBehindARelayThatDiesIsNoticed) {
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

TEST(Meeting, ARelayThatDiesWithTheAnswerIsReplaced) {
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
TEST(Meeting, AFailureIsToldToWhoWaits) {
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
TEST(Meeting, TheRelayThatTakesAnothersPlaceWaitsForEveryRankAtItsDoor) {
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
TEST(Meeting, WhoComesLateHearsOfARankThatDiedWithItsRelay) {
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
TEST(Meeting, WaitingTakesNoProcessor) {
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

// Too many to be asked to make room, but none that says nothing.
TEST(Meeting, ManyRanksAreToldThatDescriptorsAreShort) {
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

TEST(Meeting, AnotherVersionIsToldToAll) {
  for (const bool near : {true, false}) {
    const Taken taken;
    const UniqueId id = openMeetingPlace();
    std::thread other([&] {
      Taken::await(0b11);
      const std::string name = near ? std::string(id.socketName) : Relay::nameFor(id, 8);
      UniqueFd socket = transport::connectAbstract(name, Deadline::afterMs(2000));
      Hello hello;
      std::memcpy(hello.key, id.key, sizeof(hello.key));
      hello.format = 99;
      // As another version may have it: its record is longer.
      std::string message(reinterpret_cast<const char*>(&hello), sizeof(hello));
      message.resize(sizeof(hello) + (near ? 100 : 0), 'x');
      transport::sendMessage(socket.get(), message.data(), message.size());
      usleep(300000);
    });
    expectErrors(meetAll(id, {recordOf(0, 3, id.domain), recordOf(1, 3, 8)}), "code 5",
                 {"different versions", "format 99", "format " + std::to_string(Hello::kFormat)});
    other.join();
  }
}

TEST(Meeting, AWrongKeyIsRefusedAndHoldsNobodyUp) {
  const UniqueId id = openMeetingPlace();
  UniqueId wrong = id;
  wrong.key[7] ^= 1;
  std::vector<Met> liars;
  std::thread liar([&] { liars = meetAll(wrong, {recordOf(1, 2, 9)}); });
  liar.join();
  expectErrors(liars, "code 6", {"does not hold the id's key"});
  expectComplete(meetAll(id, {recordOf(0, 2, id.domain), recordOf(1, 2, 9)}));
}

UniqueFd connectTo(const transport::Address& address) {
  UniqueFd socket = transport::beginConnect(address);
  pollfd polled{socket.get(), POLLOUT, 0};
  poll(&polled, 1, 2000);
  return socket;
}

// How far the memory of this process has grown at most, since it was made: the kernel's high-water mark.
class MemoryGrowth {
 public:
  MemoryGrowth() {
    std::ofstream("/proc/self/clear_refs") << "5";  // the mark begins anew
    begin_ = statusKib("VmRSS:");
  }
  std::size_t bytes() const {
    const std::size_t most = statusKib("VmHWM:");
    return most > begin_ ? (most - begin_) << 10 : 0;
  }

 private:
  static std::size_t statusKib(const std::string& wanted) {
    std::ifstream file("/proc/self/status");
    for (std::string word; file >> word;) {
      std::size_t kib = 0;
      if (word == wanted && file >> kib) return kib;
    }
    return 0;
  }
  std::size_t begin_ = 0;
};

// What strangers may cost a process. Sanitizers keep what was freed, and shadows of everything.
constexpr std::size_t kMostStrangersCost = std::size_t{8} << 20;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMemoryIsOurs = false;
#else
constexpr bool kMemoryIsOurs = true;
#endif
constexpr std::size_t kMostGarbage = 32 << 10;

// Strangers one after the other; each connects, says something, and hangs up. Some say much, some begin as they should.
void throwGarbage(const transport::Address& at, int strangers, std::atomic<int>* thrown) {
  std::mt19937_64 random(1);
  std::string bytes(kMostGarbage, 0);
  for (char& byte : bytes) byte = static_cast<char>(random());
  for (int i = 0; i < strangers; ++i) {
    UniqueFd socket = connectTo(at);
    const std::uint64_t magic = i % 4 == 0 ? 0x314B485343535546 : random();
    std::memcpy(bytes.data(), &magic, sizeof(magic));
    const std::size_t size = i % 8 < 2 ? bytes.size() : random() % 200;
    if (socket && ::send(socket.get(), bytes.data(), size, MSG_NOSIGNAL) >= 0) ++*thrown;
  }
}

TEST(Meeting, TenThousandPiecesOfGarbageAndAHundredSilentHoldNobodyUpAndCostLittle) {
  const UniqueId id = openMeetingPlace();
  ASSERT_TRUE(id.address);
  const MemoryGrowth growth;
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 100; ++i) silent.push_back(connectTo(id.address));
  std::atomic<int> thrown{0};
  std::thread garbage([&] { throwGarbage(id.address, 10000, &thrown); });
  // The meeting place closes after init: most of it has to come before.
  while (thrown.load() < 9500) usleep(1000);
  const std::int64_t begin = nowNs();
  expectComplete(meetAll(id, severalHosts(id, 3)));
  const std::int64_t took = nowNs() - begin;
  garbage.join();
  EXPECT_GE(thrown.load(), 9500);
  EXPECT_LT(took, 5'000'000'000);
  if (kMemoryIsOurs) {
    EXPECT_LT(growth.bytes(), kMostStrangersCost);
  }
  RecordProperty("init_ms", static_cast<int>(took / 1000000));
  RecordProperty("memory_kib", static_cast<int>(growth.bytes() >> 10));
}

// The bound above would be broken by a host that keeps what strangers say.
TEST(Meeting, AHostThatKeepsGarbageWouldCostMore) {
  if (!kMemoryIsOurs) GTEST_SKIP() << "most memory is the sanitizer's";
  transport::Address address = transport::resolve("127.0.0.1:1");
  address.port = 0;
  const UniqueFd listener = transport::listenTcp(&address, 4096);
  const MemoryGrowth growth;
  std::atomic<bool> stop{false};
  std::vector<std::string> kept;
  std::thread host([&] {
    std::string all(kMostGarbage, 0);
    while (!stop.load()) {
      pollfd polled{listener.get(), POLLIN, 0};
      poll(&polled, 1, 20);
      bool exhausted = false;
      const UniqueFd socket = transport::acceptOne(listener.get(), &exhausted);
      if (!socket) continue;
      std::size_t got = 0;
      for (;;) {
        pollfd readable{socket.get(), POLLIN, 0};
        poll(&readable, 1, 1000);
        const ssize_t more = ::recv(socket.get(), all.data() + got, all.size() - got, MSG_DONTWAIT);
        if (more <= 0) break;
        got += static_cast<std::size_t>(more);
      }
      kept.emplace_back(all.data(), got);
    }
  });
  std::atomic<int> thrown{0};
  throwGarbage(address, 10000, &thrown);
  stop.store(true);
  host.join();
  EXPECT_GE(thrown.load(), 9500);
  EXPECT_GT(growth.bytes(), kMostStrangersCost);
}

// Who answers says how much it will say; that is compared before any of it is taken.
TEST(Meeting, AnAnswerThatNoneCanHaveIsRefusedBeforeItIsTaken) {
  const Record record = recordOf(0, 2, 0);
  for (const AnswerHead head :
       {AnswerHead{Hello::kMagic, 0, 0, std::uint64_t{1} << 40}, AnswerHead{Hello::kMagic, 0, 0, sizeof(Record)},
        AnswerHead{Hello::kMagic, 6, 0, std::uint64_t{1} << 40}}) {
    UniqueId id{};
    const std::string name = transport::randomName("fusco-test-");
    std::memcpy(id.socketName, name.c_str(), name.size() + 1);
    const UniqueFd listener = transport::listenAbstract(name, 4);
    std::thread host([&] {
      pollfd polled{listener.get(), POLLIN, 0};
      poll(&polled, 1, 5000);
      bool exhausted = false;
      const UniqueFd caller = transport::acceptOne(listener.get(), &exhausted);
      if (!caller) return;
      transport::sendMessage(caller.get(), &head, sizeof(head));
      // It never says the rest; the caller does not wait for it.
      char byte;
      polled = {caller.get(), POLLIN, 0};
      while (poll(&polled, 1, 5000) > 0 && ::recv(caller.get(), &byte, 1, MSG_DONTWAIT) > 0) {
      }
    });
    const std::int64_t begin = nowNs();
    try {
      meet(id, record, Deadline::afterMs(20000));
      ADD_FAILURE() << "taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::internalError);
      EXPECT_NE(std::string(error.what()).find(std::to_string(head.bytes)), std::string::npos) << error.what();
    }
    EXPECT_LT(nowNs() - begin, 5'000'000'000);
    host.join();
  }
}

TEST(Meeting, TheSilentAreSentAwayAndTheirDescriptorsComeBack) {
  Lobby::Patience patience;
  patience.silentCallerMs = 1000;
  const UniqueId id = openMeetingPlace(patience);
  UniqueFd silent = connectTo(id.address);
  pollfd polled{silent.get(), POLLIN, 0};
  ASSERT_EQ(poll(&polled, 1, 9000), 1);
  char byte;
  EXPECT_EQ(::recv(silent.get(), &byte, 1, MSG_DONTWAIT), 0);
  expectComplete(meetAll(id, {recordOf(0, 2, id.domain), recordOf(1, 2, 9)}));
}

// ---- an agreed address

std::string freeAddress() {
  transport::Address address = transport::resolve("127.0.0.1:1");
  address.port = 0;
  // Listening tells a port that is free, and closing frees it again.
  transport::listenTcp(&address, 1);
  return transport::textOf(address);
}

TEST(Meeting, AnAgreedAddressServesOneInitAfterTheOther) {
  const std::string address = freeAddress();
  for (int round = 0; round < 3; ++round) {
    const UniqueId id = agreeOnMeetingPlace(address, "a secret", "job 7");
    // The others come first.
    std::thread late([&] {
      usleep(150000);
      openAgreedPlace(id);
    });
    expectComplete(meetAll(id, {recordOf(0, 3, 5), recordOf(1, 3, 5), recordOf(2, 3, 6)}));
    late.join();
  }
}

TEST(Meeting, AnAgreedAddressNeedsTheSameSecret) {
  const std::string address = freeAddress();
  const UniqueId id = agreeOnMeetingPlace(address, "a secret", "");
  const UniqueId other = agreeOnMeetingPlace(address, "another", "");
  openAgreedPlace(id);
  std::vector<Met> stranger;
  std::thread knocking([&] { stranger = meetAll(other, {recordOf(1, 2, 6, 300)}); });
  expectComplete(meetAll(id, {recordOf(0, 2, 5), recordOf(1, 2, 6)}));
  knocking.join();
  expectErrors(stranger, "code 6", {"did not answer within the time-out"});
}

TEST(Meeting, AnAddressOfAnotherHostIsRefusedWhereItWouldBeOpened) {
  const UniqueId id = agreeOnMeetingPlace("192.0.2.1:4711", "", "");
  try {
    openAgreedPlace(id);
    FAIL() << "it was opened";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("rank 0"), std::string::npos) << error.what();
  }
  EXPECT_THROW(agreeOnMeetingPlace("nowhere", "", ""), Error);
  EXPECT_THROW(agreeOnMeetingPlace("127.0.0.1:70000", "", ""), Error);
}

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

TEST(Interfaces, AddressesAreReadAndWritten) {
  EXPECT_EQ(transport::textOf(transport::resolve("127.0.0.1:80")), "127.0.0.1:80");
  EXPECT_EQ(transport::textOf(transport::resolve("[::1]:81")), "[::1]:81");
  EXPECT_EQ(transport::textOf({}), "no address");
}

}  // namespace
}  // namespace fusco::comm::testing
