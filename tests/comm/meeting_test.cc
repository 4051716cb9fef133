// How ranks of several machines meet, whatever strangers do meanwhile; also by an agreed address.
#include "comm/meeting.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>

#include "comm/relay.h"
#include "comm/rendezvous.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm::testing {
namespace {

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

// As rank 0 finds it beside its host's name on Debian, where the other hosts find an address that they reach.
TEST(Meeting, AnAgreedNameThatMeansItselfToRankZeroIsReachedByOthers) {
  const std::string address = freeAddress();
  UniqueId id = agreeOnMeetingPlace("127.0.1.1" + address.substr(address.rfind(':')), "a secret", "");
  EXPECT_EQ(id.flags, UniqueId::kByAddress);
  UniqueId other = id;
  id.flags |= UniqueId::kEverywhere;
  other.address = transport::resolve(address);
  openAgreedPlace(id);
  std::vector<Met> far;
  std::thread elsewhere([&] { far = meetAll(other, {recordOf(1, 2, 6, 2000)}); });
  const std::vector<Met> near = meetAll(id, {recordOf(0, 2, 5, 2000)});
  elsewhere.join();
  EXPECT_EQ(near.front().error, "");
  EXPECT_EQ(far.front().error, "");
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

}  // namespace
}  // namespace fusco::comm::testing
