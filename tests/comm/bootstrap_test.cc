// How ranks meet, and what happens when they cannot.
#include "comm/bootstrap.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <thread>

#include "base/status.h"
#include "comm/fabric.h"
#include "comm/world.h"
#include "transport/local/socket.h"

namespace fusco::comm::testing {
namespace {

FabricConfig configOf(int rank, int ranks, std::int64_t timeoutMs = 20000) {
  FabricConfig config;
  config.rank = rank;
  config.ranks = ranks;
  config.controlBytes = 64;
  config.initTimeoutMs = timeoutMs;
  return config;
}

std::vector<FabricConfig> configsOf(int ranks) {
  std::vector<FabricConfig> configs;
  for (int rank = 0; rank < ranks; ++rank) configs.push_back(configOf(rank, ranks));
  return configs;
}

void expectAll(const std::vector<std::string>& texts, const std::string& code, const std::vector<std::string>& words) {
  for (const std::string& text : texts) {
    EXPECT_TRUE(text.starts_with(code)) << text;
    for (const std::string& word : words)
      EXPECT_NE(text.find(word), std::string::npos) << "no '" << word << "' in: " << text;
  }
}

TEST(Bootstrap, ManyRanksMeet) {
  char id[128];
  makeUniqueId(id);
  for (const std::string& text : connectOnly(Kind::threads, configsOf(64), id)) EXPECT_EQ(text, "");
  makeUniqueId(id);
  for (const std::string& text : connectOnly(Kind::processes, configsOf(16), id)) EXPECT_EQ(text, "");
}

TEST(Bootstrap, AnIdServesOneInitOnly) {
  char id[128];
  makeUniqueId(id);
  for (const std::string& text : connectOnly(Kind::threads, configsOf(2), id)) EXPECT_EQ(text, "");
  expectAll(connectOnly(Kind::threads, configsOf(2), id), "code 6", {"one init only"});
}

TEST(Bootstrap, WhatIsNoIdIsRefused) {
  char id[128] = {};
  EXPECT_THROW(Fabric::connect(configOf(0, 1), id), Error);
  std::memset(id, 255, sizeof(id));
  EXPECT_THROW(Fabric::connect(configOf(0, 1), id), Error);
  makeUniqueId(id);
  EXPECT_THROW(Fabric::connect(configOf(1, 1), id), Error);
  EXPECT_THROW(Fabric::connect(configOf(0, 0), id), Error);
}

TEST(Bootstrap, MissingRanksAreNamedAtTheTimeOut) {
  for (Kind kind : {Kind::threads, Kind::processes}) {
    char id[128];
    makeUniqueId(id);
    std::vector<FabricConfig> configs{configOf(0, 4, 500), configOf(2, 4, 500)};
    const std::int64_t begin = nowNs();
    const auto texts = connectOnly(kind, configs, id);
    const std::int64_t took = (nowNs() - begin) / 1000000;
    EXPECT_GE(took, 450);
    EXPECT_LE(took, 5000) << "neither half a second nor a time-out of its own";
    expectAll(texts, "code 6", {"missing: rank 1, rank 3", "2 of 4 came"});
  }
}

TEST(Bootstrap, DuplicateRanksAreNamedToAll) {
  for (Kind kind : {Kind::threads, Kind::processes}) {
    char id[128];
    makeUniqueId(id);
    auto configs = configsOf(3);
    configs[2].rank = 1;
    const std::int64_t begin = nowNs();
    expectAll(connectOnly(kind, configs, id), "code 5", {"two ranks call themselves rank 1", ":"});
    EXPECT_LT(nowNs() - begin, 5'000'000'000);
  }
}

TEST(Bootstrap, DifferentNumbersOfRanksAreNamedToAll) {
  for (Kind kind : {Kind::threads, Kind::processes}) {
    char id[128];
    makeUniqueId(id);
    auto configs = configsOf(3);
    configs[1].ranks = 4;
    expectAll(connectOnly(kind, configs, id), "code 5", {"number of ranks", "has 3", "has 4", "rank 1 ("});
  }
}

TEST(Bootstrap, DifferentSettingsAreNamedToAll) {
  char id[128];
  makeUniqueId(id);
  auto configs = configsOf(2);
  configs[0].settings = "balance full";
  configs[1].settings = "balance none";
  // What may follow from them is not what is told.
  configs[1].slotBytes = 65536;
  expectAll(connectOnly(Kind::threads, configs, id), "code 5", {"settings", "has balance full", "has balance none"});
  makeUniqueId(id);
  configs = configsOf(2);
  configs[0].slotBytes = 65536;
  expectAll(connectOnly(Kind::threads, configs, id), "code 5", {"size of a slot", "has 65536", "has 262144"});
}

TEST(Bootstrap, ARankWithoutMemoryTellsTheOthers) {
  char id[128];
  makeUniqueId(id);
  auto configs = configsOf(2);
  configs[1].controlBytes = std::size_t{1} << 39;
  const std::int64_t begin = nowNs();
  const auto texts = connectOnly(Kind::processes, configs, id);
  EXPECT_LT(nowNs() - begin, 5'000'000'000);
  EXPECT_TRUE(texts[0].starts_with("code 6: rank 1 (")) << texts[0];
  EXPECT_TRUE(texts[1].starts_with("code 2")) << texts[1];
  expectAll(texts, "code ", {"are available"});
}

Hello helloOf(const UniqueId& id, int rank, int ranks) {
  const FabricConfig config = configOf(rank, ranks);
  Hello hello;
  std::memcpy(hello.key, id.key, sizeof(hello.key));
  hello.record.rank = rank;
  hello.record.ranks = ranks;
  hello.record.nodeId = config.nodeId;
  hello.record.lanesPerNode = config.lanesPerNode;
  hello.record.domain = domainIdentity("");
  hello.record.initTimeoutMs = config.initTimeoutMs;
  hello.record.controlBytes = config.controlBytes;
  hello.record.slotBytes = config.slotBytes;
  hello.record.slots = config.slots;
  std::strcpy(hello.record.hostName, "somewhere");
  return hello;
}

TEST(Bootstrap, ARankThatDiesWhileOthersAreAwaitedIsNoticed) {
  const UniqueId id = openMeetingPlace();
  {
    // A rank that comes and goes.
    UniqueFd socket = transport::connectAbstract(id.socketName, Deadline::afterMs(1000));
    const Hello hello = helloOf(id, 1, 3);
    ASSERT_EQ(transport::sendMessage(socket.get(), &hello, sizeof(hello)), transport::Io::done);
  }
  const std::int64_t begin = nowNs();
  expectAll(connectOnly(Kind::threads, {configOf(0, 3)}, reinterpret_cast<const char*>(&id)), "code 6",
            {"rank 1 (somewhere:0)", "died or gave up"});
  EXPECT_LT(nowNs() - begin, 5'000'000'000);
}

// It has met the others, then dies before it connects to them.
TEST(Bootstrap, ARankThatDiesBetweenMeetingAndConnectingIsNoticed) {
  for (int doomed : {0, 1}) {
    const UniqueId id = openMeetingPlace();
    Children children(1, [&](int) -> std::string {
      Hello hello = helloOf(id, doomed, 2);
      hello.record.pid = getpid();
      hello.record.pidNamespace = pidNamespace();
      processIdentity(hello.record.process);
      // Its listener never answers.
      const std::string name = transport::randomName("fusco-test-");
      std::strcpy(hello.record.socketName, name.c_str());
      UniqueFd listener = transport::listenAbstract(name, 16);
      meet(id, hello.record, Deadline::afterMs(5000));
      usleep(100000);
      return {};
    });
    const std::int64_t begin = nowNs();
    expectAll(connectOnly(Kind::threads, {configOf(1 - doomed, 2)}, reinterpret_cast<const char*>(&id)), "code 6",
              {"rank " + std::to_string(doomed) + " (somewhere:" + std::to_string(children.pid(0)), "init"});
    EXPECT_LT(nowNs() - begin, 5'000'000'000);
    EXPECT_EQ(children.join()[0], "");
  }
}

// With no descriptor left the kernel refuses to accept whether or not anybody waits.
TEST(Bootstrap, DescriptorsAreShortOnlyForWhoWaits) {
  Children children(1, [&](int) -> std::string {
    const std::string name = transport::randomName("fusco-test-");
    UniqueFd listener = transport::listenAbstract(name, 4);
    UniqueFd caller = transport::connectAbstract(name, Deadline::afterMs(1000));
    bool exhausted = false;
    UniqueFd first = transport::acceptOne(listener.get(), &exhausted);
    if (!first || exhausted) return "the first was not accepted";
    UniqueFd second = transport::connectAbstract(name, Deadline::afterMs(1000));
    const rlimit limit{static_cast<rlim_t>(second.get() + 1), static_cast<rlim_t>(second.get() + 1)};
    setrlimit(RLIMIT_NOFILE, &limit);
    if (transport::acceptOne(listener.get(), &exhausted) || !exhausted) return "it waits, and that was not told";
    first.reset();
    if (!transport::acceptOne(listener.get(), &exhausted)) return "there is room again";
    first = UniqueFd(::dup(0));
    if (transport::acceptOne(listener.get(), &exhausted) || exhausted) return "nobody waits";
    return {};
  });
  EXPECT_EQ(children.join()[0], "");
}

TEST(Bootstrap, ARankShortOfDescriptorsTellsTheOthers) {
  char id[128];
  makeUniqueId(id);
  const std::int64_t begin = nowNs();
  Children children(4, [&](int rank) -> std::string {
    if (rank == 1) {
      UniqueFd next(::dup(0));
      rlimit limit{static_cast<rlim_t>(next.get() + 5), static_cast<rlim_t>(next.get() + 5)};
      setrlimit(RLIMIT_NOFILE, &limit);
    }
    try {
      Fabric::connect(configOf(rank, 4), id);
    } catch (const Error& error) {
      return "code " + std::to_string(static_cast<int>(error.code())) + ": " + error.what();
    }
    return {};
  });
  const auto texts = children.join();
  EXPECT_LT(nowNs() - begin, 5'000'000'000);
  for (int rank = 0; rank < 4; ++rank) {
    const std::string& text = texts[static_cast<std::size_t>(rank)];
    EXPECT_TRUE(text.starts_with(rank == 1 ? "code 2" : "code 6")) << text;
    EXPECT_TRUE(rank != 1 || text.find("ulimit -n") != std::string::npos) << text;
  }
}

// Strangers at the meeting place: silent, talking rubbish, truncated, oversized, with a wrong key.
TEST(Bootstrap, GarbageAndSilenceHoldNobodyUp) {
  const UniqueId id = openMeetingPlace();
  std::vector<UniqueFd> strangers;
  for (int i = 0; i < 100; ++i) {
    strangers.push_back(transport::connectAbstract(id.socketName, Deadline::afterMs(1000)));
    ASSERT_TRUE(strangers.back());
  }
  std::string rubbish(100000, 'x');
  for (std::size_t size :
       {std::size_t{1}, std::size_t{64}, sizeof(Hello) - 1, sizeof(Hello), sizeof(Hello) + 1, rubbish.size()}) {
    UniqueFd stranger = transport::connectAbstract(id.socketName, Deadline::afterMs(1000));
    ASSERT_EQ(transport::sendMessage(stranger.get(), rubbish.data(), size), transport::Io::done);
    strangers.push_back(std::move(stranger));
  }
  Hello hello;
  hello.record.ranks = 2;
  for (int which = 0; which < 3; ++which) {
    // A wrong key; the right key with a rank out of range; the right key with a text that does not end.
    if (which > 0) std::memcpy(hello.key, id.key, sizeof(hello.key));
    if (which == 1) hello.record.rank = 5;
    if (which == 2) hello.record.rank = 0;
    if (which == 2) std::memset(hello.record.hostName, 'x', sizeof(hello.record.hostName));
    UniqueFd stranger = transport::connectAbstract(id.socketName, Deadline::afterMs(1000));
    ASSERT_EQ(transport::sendMessage(stranger.get(), &hello, sizeof(hello)), transport::Io::done);
    strangers.push_back(std::move(stranger));
  }
  const std::int64_t begin = nowNs();
  for (const std::string& text : connectOnly(Kind::threads, configsOf(2), reinterpret_cast<const char*>(&id))) {
    EXPECT_EQ(text, "");
  }
  EXPECT_LT(nowNs() - begin, 5'000'000'000);
}

// Names of all abstract sockets are there for everyone to read: another user of the machine calls them all the time.
void callWithoutEnd(const char* prefix) {
  if (::setuid(65534) != 0) throw std::runtime_error("cannot become another user");
  for (;;) {
    std::ifstream sockets("/proc/net/unix");
    std::string name;
    for (std::string line; std::getline(sockets, line);) {
      if (const std::size_t at = line.find(prefix); at != std::string::npos) name = line.substr(at + 1);
      if (name.empty()) continue;
      for (int i = 0; i < 2000; ++i) transport::connectAbstract(name, Deadline::afterMs(1));
    }
  }
}

class AnotherUser : public ::testing::TestWithParam<const char*> {};

TEST_P(AnotherUser, HoldsNobodyUp) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can become another user";
  struct Board {
    std::atomic<bool> ready{false};
    char id[128];
  };
  SharedPage<Board> board;
  Children flood(16, [&](int) -> std::string {
    while (!board->ready.load()) usleep(1000);
    callWithoutEnd(GetParam());
    return {};
  });
  Children ranks(2, [&](int rank) -> std::string {
    while (!board->ready.load()) usleep(1000);
    // The first one's socket is called long before it looks.
    if (rank == 1) usleep(1000000);
    FabricConfig config;
    config.rank = rank;
    config.ranks = 2;
    config.controlBytes = 4096;
    config.initTimeoutMs = 5000;
    Fabric::connect(config, board->id);
    return {};
  });
  makeUniqueId(board->id);
  board->ready.store(true);
  for (const std::string& text : ranks.join()) EXPECT_EQ(text, "");
  for (int i = 0; i < 16; ++i) ::kill(flood.pid(i), SIGKILL);
  for (const std::string& text : flood.join()) {
    if (text != "killed") GTEST_SKIP() << text;
  }
}

INSTANTIATE_TEST_SUITE_P(WhoCalls, AnotherUser, ::testing::Values("@fusco-meet-", "@fusco-rank-"),
                         [](const auto& one) { return std::string(one.param).substr(7, 4); });

TEST(Bootstrap, TheSilentAreSentAwayAndProgressIsReported) {
  Lobby::Patience patience;
  patience.silentCallerMs = 50;
  patience.firstProgressMs = 100;
  const UniqueId id = openMeetingPlace(patience);
  UniqueFd silent = transport::connectAbstract(id.socketName, Deadline::afterMs(1000));
  ::testing::internal::CaptureStderr();
  std::vector<std::string> texts =
      connectOnly(Kind::threads, {configOf(1, 2, 400)}, reinterpret_cast<const char*>(&id));
  const std::string output = ::testing::internal::GetCapturedStderr();
  expectAll(texts, "code 6", {"missing: rank 0"});
  EXPECT_NE(output.find("1 of 2 ranks have come; missing: rank 0"), std::string::npos) << output;
  char byte;
  EXPECT_EQ(::recv(silent.get(), &byte, 1, MSG_DONTWAIT), 0) << "still connected";
}

// Or by GPUs without a path: ranks 0 and 2 are on one, or say that they are.
TEST(Bootstrap, NodesAreByIdOrByHostOrByGpu) {
  for (int labelled : {0, 1, 2}) {
    std::vector<FabricConfig> configs = configsOf(3);
    if (labelled == 2) configs[0].gpu = configs[2].gpu = GpuPlace{7, {15}};
    if (labelled == 2) configs[1].gpu = GpuPlace{15, {}};
    if (labelled == 1) configs[0].nodeId = 7;
    if (labelled == 1) configs[1].nodeId = 3;
    if (labelled == 1) configs[2].nodeId = 7;
    char id[128];
    makeUniqueId(id);
    std::vector<std::thread> threads;
    int nodes[3], ofTwo[3];
    for (int rank = 0; rank < 3; ++rank) {
      threads.emplace_back([&, rank] {
        auto fabric = Fabric::connect(configs[static_cast<std::size_t>(rank)], id);
        nodes[rank] = fabric->topology().nodes();
        ofTwo[rank] = fabric->topology().nodeOf(2);
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_EQ(nodes[rank], labelled ? 2 : 1);
      EXPECT_EQ(ofTwo[rank], 0);
    }
  }
}

}  // namespace
}  // namespace fusco::comm::testing
