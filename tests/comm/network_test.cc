// The fabric of ranks that share no memory, as the engine uses it. Hosts are made up by host ids, so that all of it
// goes over this machine's own network: tree, links, gathers, deaths.
#include "comm/network.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/status.h"
#include "comm/fabric.h"
#include "comm/handshake.h"
#include "comm/switchboard.h"
#include "comm/tree.h"
#include "comm/world.h"
#include "plan/topology.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm::testing {
namespace {

// How the ranks of a test lie.
struct Lay {
  const char* name;
  int hosts, nodes, ranks;  // nodes: of each host; ranks: of each node
  Net net;
};

int ranksOf(const Lay& lay) { return lay.hosts * lay.nodes * lay.ranks; }

std::vector<FabricConfig> configsOf(const Lay& lay) {
  std::vector<FabricConfig> configs;
  for (int rank = 0; rank < ranksOf(lay); ++rank) {
    FabricConfig config;
    config.rank = rank;
    config.ranks = ranksOf(lay);
    config.controlBytes = 4096;
    config.slotBytes = 1024;
    config.slots = 3;
    config.initTimeoutMs = 20000;
    config.net = lay.net;
    const int host = rank / (lay.nodes * lay.ranks);
    if (lay.hosts > 1) config.hostId = "host" + std::to_string(host);
    if (lay.nodes > 1) config.nodeId = rank / lay.ranks;
    configs.push_back(config);
  }
  return configs;
}

class NetworkTest : public ::testing::TestWithParam<std::tuple<Kind, Lay>> {
 protected:
  Kind kind() const { return std::get<0>(GetParam()); }
  const Lay& lay() const { return std::get<1>(GetParam()); }
  void expect(const Body& body) const {
    const auto texts = runConfigs(kind(), configsOf(lay()), body);
    for (std::size_t rank = 0; rank < texts.size(); ++rank) EXPECT_EQ(texts[rank], "") << "rank " << rank;
  }
};

template <typename Condition>
void await(Fabric& fabric, Condition condition) {
  const Deadline deadline = Deadline::afterMs(20000);
  for (;;) {
    const std::uint32_t seen = fabric.bell();
    if (condition()) return;
    fabric.check();
    require(!deadline.passed(), "waited too long");
    fabric.sleep(seen, 20000);
  }
}

TEST_P(NetworkTest, NodesAreAsLaid) {
  expect([this](Fabric& fabric) {
    require(fabric.topology().nodes() == lay().hosts * lay().nodes, "nodes");
    for (int rank = 0; rank < fabric.ranks(); ++rank) {
      require(fabric.topology().nodeOf(rank) == rank / lay().ranks, "node of " + fabric.describeRank(rank));
    }
  });
}

// Every rank sends to every rank of another node on two channels, all at once; both ends may be first.
TEST_P(NetworkTest, PostedLinksKeepOrderAndCredits) {
  expect([](Fabric& fabric) {
    constexpr std::uint64_t kSlices = 60;
    struct Line {
      transport::PostedLink* link;
      int peer;
      std::uint64_t sent = 0, received = 0;
    };
    std::vector<Line> lines;
    for (int peer = 0; peer < fabric.ranks(); ++peer) {
      if (fabric.topology().nodeOf(peer) == fabric.topology().nodeOf(fabric.rank())) continue;
      for (int channel : {0, 2}) lines.push_back({&fabric.link(peer, channel), peer});
    }
    await(fabric, [&] {
      bool all = true;
      for (Line& line : lines) {
        for (std::byte* slot; line.sent < kSlices && (slot = line.link->acquire()) != nullptr; ++line.sent) {
          std::memcpy(slot, &line.sent, sizeof(line.sent));
          std::memset(slot + 8, static_cast<int>(line.sent) + fabric.rank(), 1016);
          line.link->post(1024);
        }
        while (const std::byte* slot = line.link->peek()) {
          std::uint64_t sequence;
          std::memcpy(&sequence, slot, sizeof(sequence));
          require(sequence == line.received, "out of order");
          require(slot[1023] == static_cast<std::byte>(line.received + static_cast<std::uint64_t>(line.peer)),
                  "payload");
          line.link->release();
          ++line.received;
        }
        all = all && line.sent == kSlices && line.received == kSlices && line.link->drained();
      }
      return all;
    });
  });
}

TEST_P(NetworkTest, GathersOfAnySizeInTurn) {
  expect([](Fabric& fabric) {
    for (std::size_t bytes : {0, 1, 8193, 300000}) {
      std::vector<unsigned char> mine(bytes + 1, static_cast<unsigned char>(fabric.rank() + bytes));
      std::vector<unsigned char> all(static_cast<std::size_t>(fabric.ranks()) * bytes + 1);
      fabric.allGather(mine.data(), bytes, all.data(), 20000);
      for (std::size_t rank = 0; rank < static_cast<std::size_t>(fabric.ranks()); ++rank) {
        const unsigned char* part = all.data() + rank * bytes;
        const auto is = [&](unsigned char one) { return one == static_cast<unsigned char>(rank + bytes); };
        require(std::all_of(part, part + bytes, is), "gathered something else");
      }
    }
  });
}

TEST_P(NetworkTest, GatherOfDifferentSizesNamesBoth) {
  for (int odd : {0, ranksOf(lay()) - 1}) {
    const auto texts = runConfigs(kind(), configsOf(lay()), [odd](Fabric& fabric) {
      std::vector<char> buffer(20 + 20 * static_cast<std::size_t>(fabric.ranks()));
      fabric.allGather(buffer.data(), fabric.rank() == odd ? 10 : 20, buffer.data() + 20, 20000);
    });
    for (const std::string& text : texts) {
      EXPECT_TRUE(text.starts_with("code 5")) << text;
      EXPECT_NE(text.find(" 10"), std::string::npos) << text;
      EXPECT_NE(text.find(" 20"), std::string::npos) << text;
    }
  }
}

TEST_P(NetworkTest, AnAbortWakesEveryone) {
  const auto texts = runConfigs(kind(), configsOf(lay()), [](Fabric& fabric) {
    if (fabric.rank() == 1) {
      usleep(30000);
      fabric.abort("rank 1 found a malformed routing map");
    }
    const std::int64_t begin = nowNs();
    for (;;) {
      // Long before the sleep would end.
      require(nowNs() - begin < 10'000'000'000, "woken late");
      const std::uint32_t seen = fabric.bell();
      fabric.check();
      fabric.sleep(seen, 15000000);
    }
  });
  for (const std::string& text : texts) EXPECT_EQ(text, "code 6: rank 1 found a malformed routing map");
}

INSTANTIATE_TEST_SUITE_P(Lays, NetworkTest,
                         ::testing::Combine(::testing::Values(Kind::threads, Kind::processes),
                                            ::testing::Values(Lay{"TwoNodesByTcp", 1, 2, 2, Net::tcp},
                                                              Lay{"TwoHosts", 2, 1, 2, Net::automatic},
                                                              Lay{"TwoHostsOfTwoNodes", 2, 2, 1, Net::automatic},
                                                              Lay{"FourNodesByTcp", 1, 4, 2, Net::tcp},
                                                              Lay{"TwelveHosts", 12, 1, 1, Net::automatic})),
                         [](const auto& one) {
                           return std::string(nameOf(std::get<0>(one.param))) + std::get<1>(one.param).name;
                         });

TEST(Network, SharedMemoryOnlyIsRefusedAcrossHosts) {
  auto configs = configsOf({"", 2, 1, 1, Net::automatic});
  // Near the meeting place, which is on a host of its own here.
  for (FabricConfig& config : configs) config.net = Net::sharedMemory;
  for (const std::string& text : runConfigs(Kind::threads, configs, [](Fabric&) {})) {
    EXPECT_TRUE(text.starts_with("code 5")) << text;
    EXPECT_NE(text.find("FUSCO_NET"), std::string::npos) << text;
  }
}

// ---- deaths

// Rank 2 of 4 does something; the others' waits end in time with a text that names it.
struct Ending {
  const char* name;
  void (*misbehave)(Fabric& fabric);
  const char* words;
  std::int64_t withinNs = 2'000'000'000;
};

class EndingTest : public ::testing::TestWithParam<std::tuple<Ending, Lay>> {};

TEST_P(EndingTest, IsNoticedByAll) {
  const auto& [ending, lay] = GetParam();
  const auto configs = configsOf(lay);
  const int doomed = ranksOf(lay) - 2;
  SharedPage<std::atomic<int>> connected;
  const auto body = [&](Fabric& fabric) {
    ++*connected;
    while (connected->load() < fabric.ranks()) usleep(1000);
    if (fabric.rank() == doomed) {
      usleep(50000);
      ending.misbehave(fabric);
      throw std::runtime_error("over");
    }
    const std::int64_t begin = nowNs();
    try {
      while (nowNs() - begin < 8'000'000'000) {
        const std::uint32_t seen = fabric.bell();
        fabric.check();
        fabric.sleep(seen, 100000);
      }
    } catch (const Error& error) {
      require(nowNs() - begin < ending.withinNs, std::string("late: ") + error.what());
      throw;
    }
  };
  const auto texts = runConfigs(Kind::processes, configs, body);
  for (int rank = 0; rank < ranksOf(lay); ++rank) {
    if (rank == doomed) continue;
    const std::string& text = texts[static_cast<std::size_t>(rank)];
    EXPECT_TRUE(text.starts_with("code 6: rank " + std::to_string(doomed) + " (")) << rank << ": " << text;
    EXPECT_NE(text.find(ending.words), std::string::npos) << rank << ": " << text;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, EndingTest,
    ::testing::Combine(::testing::Values(Ending{"Kill", [](Fabric&) { raise(SIGKILL); }, "died"},
                                         Ending{"Exit", [](Fabric&) { exit(0); }, "left: its process exited"},
                                         // Who may still need it waits for a second.
                                         Ending{"Destroy", [](Fabric&) {}, "left: it destroyed", 5'000'000'000}),
                       ::testing::Values(Lay{"TwoHosts", 2, 1, 2, Net::automatic},
                                         Lay{"FourHosts", 4, 1, 1, Net::automatic},
                                         Lay{"TwoNodesByTcp", 1, 2, 2, Net::tcp})),
    [](const auto& one) { return std::string(std::get<0>(one.param).name) + std::get<1>(one.param).name; });

// Such as a loader of data, which nobody tells that its parent has died: its copies of the connections keep them up.
TEST(Network, ARankThatDiesIsMissedThoughAChildOfItsLivesOn) {
  SharedPage<std::atomic<bool>> over;
  const auto texts = runConfigs(Kind::processes, configsOf({"", 2, 1, 1, Net::automatic}), [&](Fabric& fabric) {
    transport::PostedLink& link = fabric.link(1 - fabric.rank(), 0);
    await(fabric, [&] { return link.acquire() != nullptr; });
    fabric.allGather(nullptr, 0, nullptr, 20000);
    if (fabric.rank() == 1) {
      if (fork() == 0) {
        for (const Deadline patience = Deadline::afterMs(20000); !over->load() && !patience.passed();) usleep(1000);
        _exit(0);
      }
      raise(SIGKILL);
    }
    std::string told;
    try {
      const std::int64_t begin = nowNs();
      await(fabric, [&] { return nowNs() - begin > 5'000'000'000; });
    } catch (const Error& error) {
      told = error.what();
    }
    over->store(true);
    throw std::runtime_error(told);
  });
  EXPECT_TRUE(texts[0].starts_with("rank 1 (")) << texts[0];
  EXPECT_NE(texts[0].find("died"), std::string::npos) << texts[0];
}

TEST(Network, AStoppedRankIsNoErrorWhenItGoesOn) {
  const auto configs = configsOf({"", 3, 1, 1, Net::automatic});
  struct Board {
    std::atomic<int> ready{0}, go{0};
    char id[128];
  };
  SharedPage<Board> board;
  Children children(3, [&](int rank) -> std::string {
    while (board->ready.load() == 0) usleep(500);
    auto fabric = Fabric::connect(configs[static_cast<std::size_t>(rank)], board->id);
    ++board->ready;
    while (rank == 0 && board->go.load() == 0) usleep(500);
    int mine = rank, all[3];
    fabric->allGather(&mine, sizeof(mine), all, 30000);
    fabric->allGather(&mine, sizeof(mine), all, 30000);
    return all[2] == 2 ? "" : "wrong";
  });
  makeUniqueId(board->id);
  board->ready.store(1);
  while (board->ready.load() < 4) usleep(1000);
  kill(children.pid(0), SIGSTOP);
  board->go.store(1);
  usleep(5000000);
  kill(children.pid(0), SIGCONT);
  for (const std::string& text : children.join()) EXPECT_EQ(text, "");
}

TEST(Network, GatherNamesWhoIsLate) {
  SharedPage<std::atomic<int>> failed;
  const auto texts = runConfigs(Kind::processes, configsOf({"", 3, 1, 1, Net::automatic}), [&](Fabric& fabric) {
    if (fabric.rank() == 2) {
      for (const Deadline patience = Deadline::afterMs(20000); failed->load() < 2 && !patience.passed();) usleep(1000);
      return;
    }
    int mine = 0, all[3];
    try {
      fabric.allGather(&mine, sizeof(mine), all, 1000);
    } catch (const Error&) {
      ++*failed;
      throw;
    }
  });
  EXPECT_TRUE(texts[0].starts_with("code 6: rank 0 (")) << texts[0];
  EXPECT_NE(texts[0].find("for rank 2 ("), std::string::npos) << texts[0];
  EXPECT_TRUE(texts[1].starts_with("code 6: rank ")) << texts[1];
}

TEST(Network, NothingIsLeftBehindAndANewOneWorks) {
  Children alone(1, [&](int) -> std::string {
    std::string errors;
    const auto round = [&](bool fails) {
      const auto texts = runConfigs(Kind::threads, configsOf({"", 2, 1, 2, Net::automatic}), [&](Fabric& fabric) {
        const int peer = 3 - fabric.rank();
        transport::PostedLink& link = fabric.link(peer, 0);
        await(fabric, [&] { return link.acquire() != nullptr; });
        link.post(64);
        await(fabric, [&] { return link.peek() != nullptr; });
        link.release();
        fabric.allGather(nullptr, 0, nullptr, 20000);
        if (fails && fabric.rank() == 3) fabric.abort("on purpose");
        if (fails) await(fabric, [] { return false; });
      });
      for (const std::string& text : texts) {
        if (text != (fails ? "code 6: on purpose" : "")) errors += text + "; ";
      }
    };
    round(false);
    // A thread that was joined may still be seen for a moment.
    usleep(50000);
    const Footprint before = footprint();
    for (int i = 0; i < 20; ++i) round(i % 3 == 1);
    errors += leftBehind(before);
    return errors;
  });
  EXPECT_EQ(alone.join()[0], "");
}

// ---- processes that are stopped

UniqueFd acceptFrom(const UniqueFd& listener) {
  pollfd waiting{listener.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&waiting, 1, 5000), 1);
  bool exhausted = false;
  return transport::acceptOne(listener.get(), &exhausted);
}

transport::Address loopback() {
  transport::Address address;
  address.family = 4;
  address.bytes[0] = 127;
  address.bytes[3] = 1;
  return address;
}

// As where memory is short: the others are still looked after.
TEST(Network, ALinkThatCannotBeMadeIsNoLink) {
  std::vector<Record> records(2);
  for (int rank = 0; rank < 2; ++rank) {
    records[static_cast<std::size_t>(rank)].rank = rank;
    records[static_cast<std::size_t>(rank)].domain = static_cast<std::uint64_t>(rank);
    records[static_cast<std::size_t>(rank)].addressCount = 1;
    records[static_cast<std::size_t>(rank)].addresses[0] = loopback();
  }
  const plan::Topology topology({0, 1}, 1);
  const std::uint8_t key[32] = {};
  const Network::LinkShape noSlots{1024, 0, 4};
  Network network(records, 0, topology, key, {}, noSlots, {[](const News&) {}, [] {}});
  EXPECT_THROW(network.link(1, 0), Error);
  std::string how;
  bool orderly = false;
  EXPECT_EQ(network.brokenLink([](int) { return false; }, &how, &orderly), -1);
  EXPECT_EQ(network.memoryBytes(), 0u);
}

// The kernel of the machine answers for its process.
TEST(Switchboard, ACallWaitsForAProcessThatIsStopped) {
  const std::uint8_t key[32] = {1, 2, 3};
  transport::Address address = loopback();
  const UniqueFd listener = transport::listenTcp(&address, 16);
  transport::Reactor reactor;
  std::atomic<int> ended{0};
  UniqueFd connected;
  std::string failure;
  Switchboard switchboard(
      reactor, key, {}, [](const Purpose&) { return false; }, [](const Purpose&, UniqueFd) {}, [] {});
  switchboard.call(address, {}, {Purpose::link, 1, 0, 0}, Deadline::afterMs(500),
                   [&](UniqueFd socket, bool, const std::string& why) {
                     connected = std::move(socket);
                     failure = why;
                     ++ended;
                   });
  usleep(1500000);
  EXPECT_EQ(ended.load(), 0) << failure;
  const UniqueFd called = acceptFrom(listener);
  Handshake host(Handshake::Side::host, key);
  auto result = Handshake::Result::again;
  for (int i = 0; i < 2000 && result == Handshake::Result::again; ++i, usleep(1000)) result = host.step(called.get());
  ASSERT_EQ(result, Handshake::Result::proved);
  Handshake::answer(called.get(), true);
  for (int i = 0; i < 2000 && ended.load() == 0; ++i) usleep(1000);
  EXPECT_EQ(ended.load(), 1);
  EXPECT_TRUE(connected) << failure;
}

// It takes no more than fits into its socket.
TEST(Tree, MuchToSayWaitsForAProcessThatIsStopped) {
  transport::Address address = loopback();
  const UniqueFd listener = transport::listenTcp(&address, 16);
  UniqueFd ours = transport::beginConnect(address);
  const UniqueFd theirs = acceptFrom(listener);
  std::mutex mutex;
  std::string news;
  transport::Reactor reactor;
  Tree tree(reactor, 1, 2, TreeShape{0, {}},
            Tree::Ways{[&](const News& one) {
                         std::lock_guard lock(mutex);
                         news += one.text;
                       },
                       [] {}, [](int rank) { return "rank " + std::to_string(rank); }},
            Tree::Patience{.beatMs = 100, .stallMs = 100000, .silentKernelMs = 2500});
  tree.attach(0, std::move(ours));
  const std::string chunk(7 << 20, 'x');
  tree.contribute(chunk, chunk.size());
  usleep(6000000);
  std::size_t got = 0;
  std::vector<char> buffer(1 << 20);
  pollfd readable{theirs.get(), POLLIN, 0};
  while (got < chunk.size() && ::poll(&readable, 1, 5000) == 1) {
    const ssize_t part = ::recv(theirs.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (part <= 0) break;
    got += static_cast<std::size_t>(part);
  }
  std::lock_guard lock(mutex);
  EXPECT_EQ(news, "");
  EXPECT_GE(got, chunk.size());
}

// ---- the tree's shape

TEST(Tree, HasOneParentForAllAndFewEdges) {
  for (const int hosts : {1, 2, 9, 10, 64, 256}) {
    for (const int ranks : {1, 8}) {
      std::vector<std::uint64_t> domains;
      for (int rank = 0; rank < hosts * ranks; ++rank) domains.push_back(static_cast<std::uint64_t>(rank / ranks) * 17);
      const int all = static_cast<int>(domains.size());
      std::vector<int> parent(domains.size(), -2);
      std::size_t most = 0;
      for (int rank = 0; rank < all; ++rank) {
        const TreeShape shape = treeShape(rank, domains);
        parent[static_cast<std::size_t>(rank)] = shape.parent;
        most = std::max(most, shape.children.size());
        for (const int child : shape.children) EXPECT_EQ(treeShape(child, domains).parent, rank);
      }
      EXPECT_LE(most, static_cast<std::size_t>(TreeShape::kBranches + ranks - 1));
      for (int rank = 0; rank < all; ++rank) {
        int at = rank, steps = 0;
        while (at != 0 && steps++ <= all) at = parent[static_cast<std::size_t>(at)];
        EXPECT_LE(steps, 4) << hosts << " hosts";
      }
    }
  }
}

// A neighbour whose memory is damaged, or of another version: what it says makes no rank out of range, no memory that
// grows with what it says, and no rows that are not there.
class DamagedParent {
 public:
  DamagedParent() {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends), 0);
    theirs_ = UniqueFd(ends[1]);
    tree_.attach(0, UniqueFd(ends[0]));
  }
  Tree& tree() { return tree_; }
  // As the tree has it: of a whole gather, or of two ranks that differ.
  void sayDown(std::uint64_t round, std::int32_t rank, std::int32_t other, std::string_view all) {
    const struct {
      std::uint32_t kind, bytes;
      std::uint64_t round;
      std::int32_t rank, other;
      std::uint64_t whole, otherWhole;
    } head{4, static_cast<std::uint32_t>(32 + all.size()), round, rank, other, 4, 4};
    std::string wire(reinterpret_cast<const char*>(&head), sizeof(head));
    wire += all;
    ASSERT_EQ(::send(theirs_.get(), wire.data(), wire.size(), MSG_NOSIGNAL), static_cast<ssize_t>(wire.size()));
  }
  // News of rank 2 come behind all that was said before.
  void awaitHeard() {
    const std::uint32_t news[4] = {2, 8, News::left, 2};
    const int before = heard_;
    ASSERT_EQ(::send(theirs_.get(), news, sizeof(news), MSG_NOSIGNAL), static_cast<ssize_t>(sizeof(news)));
    for (int i = 0; i < 5000 && heard_ == before; ++i) usleep(1000);
    ASSERT_EQ(heard_, before + 1);
  }

 private:
  std::atomic<int> heard_{0};
  UniqueFd theirs_;
  transport::Reactor reactor_;
  Tree tree_{
      reactor_, 1, 4, TreeShape{0, {}},
      Tree::Ways{[this](const News&) { ++heard_; }, [] {}, [](int rank) { return "rank " + std::to_string(rank); }}};
};

TEST(Tree, RanksThatDoNotExistAndRoundsThatAreFarAreNotHeardOf) {
  DamagedParent parent;
  std::string all;
  parent.tree().contribute("own.", 4);
  parent.sayDown(1, 99, 2, "");
  parent.sayDown(1, 2, -7, "");
  parent.sayDown(1ull << 40, -1, -1, std::string(16, 'x'));
  parent.awaitHeard();
  EXPECT_FALSE(parent.tree().gathered(&all));
  parent.sayDown(1, -1, -1, "onetwoown.four??");
  parent.awaitHeard();
  EXPECT_TRUE(parent.tree().gathered(&all));
  EXPECT_EQ(all, "onetwoown.four??");
}

TEST(Tree, AGatherOfAnotherSizeIsAnError) {
  for (const char* wrong : {"", "only this", "more than four times four bytes"}) {
    DamagedParent parent;
    parent.tree().contribute("own.", 4);
    parent.sayDown(1, -1, -1, wrong);
    parent.awaitHeard();
    std::string all;
    try {
      parent.tree().gathered(&all);
      ADD_FAILURE() << wrong;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::internalError);
    }
  }
}

}  // namespace
}  // namespace fusco::comm::testing
