// Faults under shuffles by queue pairs in the soft-RoCE machine: what is lost names device, port, peer and cause, in
// time; what need not be lost is not.
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <functional>

#include "base/clock.h"
#include "rdma/sabotage.h"
#include "shuffle/case.h"
#include "shuffle/ranks.h"

namespace fusco::test {
namespace {

// Two ranks on two nodes with one NIC each, or with two each.
struct Setting {
  bool twoNics = false;
  const char* timeout =
      "14";  // FUSCO_IB_TIMEOUT: a packet is sent again after 67 ms; after 4 s with NCCL's default, 20
  const char* retries = "7";
};

void take(const Setting& setting, int node) {
  setenv("FUSCO_NET", "verbs", 1);
  setenv("FUSCO_LANES", setting.twoNics ? "2" : "1", 1);
  setenv("FUSCO_IB_TIMEOUT", setting.timeout, 1);
  setenv("FUSCO_IB_RETRY_CNT", setting.retries, 1);
  if (setting.twoNics) {
    setenv("FUSCO_IB_HCA", node == 0 ? "=rxe0,rxe1" : "=rxe2,rxe3", 1);
  } else {
    setenv("FUSCO_IB_HCA", node == 0 ? "=rxe0" : "=rxe2", 1);
  }
}

World twoNodes(const char* name, int ranksPerNode = 1) {
  World world{name, 2 * ranksPerNode, 1, {}, true, 16384};
  for (int rank = 0; rank < world.ranks; ++rank) world.nodes.push_back(rank / ranksPerNode);
  return world;
}

// Shuffles, all checked, until something fails or has not failed for as long as the fault lasts and `patienceMs` more.
// Rank 0 lets the fault begin after two shuffles. Returns what failed.
std::string shuffleThrough(Rank& self, fuscoComm_t comm, Sabotage& sabotage, std::int64_t patienceMs) {
  const std::uint64_t seed = 31000;
  for (std::uint64_t i = 0;; ++i) {
    if (i == 2 && self.rank() == 0) sabotage.go();
    // All ranks stop after the same one.
    if (self.rank() == 0 && sabotage.msSinceEnd() > patienceMs) self.word(1) = 1;
    self.barrier();
    if (self.word(1) == 1) return {};
    const std::string text = runRank(randomCase(seed + i % 8, self.ranks()), comm, self.rank());
    if (!text.empty()) return text;
    self.word(2)++;
  }
}

struct Wanted {
  std::vector<std::string> words;  // of the error on rank 0; empty: there must be none
  // Since the fault was there. On a busy host the emulated machine takes seconds for what it does at once on a quiet
  // one; what this excludes is that only the time-out of operations, 30 s, has ended the wait. Who saw the fault is in
  // the words.
  std::int64_t withinMs = 0;
};

// A world with a fault took 40 s on a busy machine.
constexpr int kRanksSeconds = 180;

void expectFault(const World& world, const Setting& setting, const std::string& fault, const std::string& after,
                 const Wanted& wanted, int lastsMs = 0) {
  Sabotage sabotage(fault, lastsMs, after);
  const std::vector<std::string> wrong = runRanks(
      world,
      [&](Rank& self) {
        take(setting, self.world().nodeOf(self.rank()));
        fuscoComm_t comm = self.connect();
        std::string text;
        try {
          // A slow machine takes its time until the fault is there.
          text = shuffleThrough(self, comm, sabotage, wanted.words.empty() ? 500 : wanted.withinMs);
        } catch (const std::exception& error) {
          text = error.what();
        }
        const std::int64_t took = sabotage.msSinceBegin();
        if (wanted.words.empty()) {
          if (!text.empty()) throw std::runtime_error(text);
          FUSCO_OK(fuscoCommFinalize(comm));
          FUSCO_OK(fuscoCommDestroy(comm));
          return;
        }
        if (text.empty()) throw std::runtime_error("nothing failed");
        std::fprintf(stderr, "rank %d, %lld ms after the fault: %s\n", self.rank(), static_cast<long long>(took),
                     text.c_str());
        // The library says it again, and the communicator can be left.
        fuscoResult_t state = fuscoSuccess;
        FUSCO_OK(fuscoCommGetAsyncError(comm, &state));
        REQUIRE(state == fuscoRemoteError || state == fuscoSystemError);
        fuscoCommAbort(comm);
        require(took <= wanted.withinMs + wanted.withinMs / 10, "it took " + std::to_string(took) + " ms");
        for (const std::string& word : wanted.words) requireContains(text, word);
      },
      kRanksSeconds);
  EXPECT_TRUE(sabotage.end()) << fault << "; " << after;
  for (int rank = 0; rank < world.ranks; ++rank) {
    EXPECT_EQ(wrong[static_cast<std::size_t>(rank)], "") << "rank " << rank;
  }
}

// What takes its time, since the library does: ports that may come back, a peer that may still answer. RdmaFault has
// what is told at once.
TEST(RdmaPatience, LinkDownForGood) {
  expectFault(twoNodes("link down"), {false, "20"}, "/sbin/ip link set s0 down", "/sbin/ip link set s0 up",
              {{"rxe0 port 1", "down for 8 s", "rank "}, 16000});
}

TEST(RdmaPatience, LinkDownAndUp) {
  expectFault(twoNodes("link down and up"), {false, "18"},
              "/sbin/ip link set s0 down; (sleep 2; /sbin/ip link set s0 up) &", "", {}, 2500);
}

TEST(RdmaPatience, LinkCutWithoutAWord) {
  expectFault(twoNodes("link cut"), {false, "20"}, "/sbin/tc qdisc add dev d0 root netem loss 100%",
              "/sbin/tc qdisc del dev d0 root",
              {{"acknowledged nothing for nine seconds", "rxe0 port 1", "rxe2 port 1", "10.77.0.3", "rank "}, 16000});
}

TEST(RdmaFault, LinkCutSeenByTheQueuePair) {
  // Soft-RoCE takes 7 for "for ever".
  expectFault(
      twoNodes("link cut"), {false, "14", "3"}, "/sbin/tc qdisc add dev d0 root netem loss 100%",
      "/sbin/tc qdisc del dev d0 root",
      {{"transport retry counter exceeded", "work completion 12", "rxe0 port 1", "rxe2 port 1", "rank "}, 10000});
}

TEST(RdmaPatience, LossOfOnePercent) {
  const std::string on = "for d in d0 d2; do /sbin/tc qdisc add dev $d root netem loss 1% || exit 1; done";
  expectFault(twoNodes("loss"), {}, on, "for d in d0 d2; do /sbin/tc qdisc del dev $d root; done", {}, 2000);
}

// The kernel lets go of a soft-RoCE device when the last process has closed it; from then on it can be made anew.
std::string removal(const std::string& device) { return "/sbin/rdma link delete " + device + " &"; }
std::string remake(const std::string& device, const std::string& interface) {
  return "i=0; while /sbin/rdma link | grep -q " + device + "/ && [ $i -lt 50 ]; do sleep 0.1; i=$((i + 1)); done; " +
         "/sbin/rdma link add " + device + " type rxe netdev " + interface;
}

TEST(RdmaFault, DeviceRemoved) {
  expectFault(twoNodes("device removed"), {}, removal("rxe0"), remake("rxe0", "d0"),
              {{"device rxe0", "has failed or was removed", "rank "}, 12000});
}

TEST(RdmaPatience, DeviceOfALaneRemovedAndItsFlowsGoOn) {
  expectFault(twoNodes("lane removed", 2), {true}, removal("rxe1"), remake("rxe1", "d1"), {}, 1500);
}

// A rank that is killed is told of as such, not as the queue pair that it took along.
TEST(RdmaFault, KilledPeer) {
  const World world = twoNodes("killed peer");
  const std::vector<std::string> wrong = runRanks(world, [&](Rank& self) {
    take({}, self.world().nodeOf(self.rank()));
    fuscoComm_t comm = self.connect();
    for (std::uint64_t i = 0;; ++i) {
      if (i == 2 && self.rank() == 1) {
        self.word(3) = static_cast<std::uint64_t>(nowNs());
        raise(SIGKILL);
      }
      std::string text;
      try {
        text = runRank(randomCase(32000 + i, 2), comm, self.rank());
      } catch (const std::exception& error) {
        text = error.what();
      }
      if (text.empty()) continue;
      const std::int64_t took = (nowNs() - static_cast<std::int64_t>(self.word(3).load())) / 1'000'000;
      requireContains(text, "rank 1 (");
      requireContains(text, "died");
      // Not by the time-out of operations, which is 30 s.
      require(took < 10000, "it took " + std::to_string(took) + " ms");
      fuscoCommAbort(comm);
      return;
    }
  });
  EXPECT_EQ(wrong[0], "");
  EXPECT_EQ(wrong[1], "killed by signal 9");
}

// What init says on all ranks; each takes its settings by itself. Nothing is left that would keep a good one from
// coming about in the same process.
void expectInit(const std::function<void(const Rank&)>& settings, fuscoResult_t code,
                const std::vector<std::string>& words) {
  const std::vector<std::string> wrong = runRanks(twoNodes("init"), [&](Rank& self) {
    take({}, self.world().nodeOf(self.rank()));
    settings(self);
    fuscoConfig_t config = self.config();
    fuscoComm_t comm = nullptr;
    const fuscoResult_t got = fuscoCommInitRankConfig(&comm, self.ranks(), self.id(), self.rank(), &config);
    const std::string text = fuscoGetLastError(nullptr);
    if (self.rank() != 0) {
      require(got != fuscoSuccess, "an error on the other rank, too");
      return;
    }
    require(got == code, "code " + std::to_string(got) + ": " + text);
    for (const std::string& word : words) requireContains(text, word);
  });
  for (const std::string& text : wrong) EXPECT_EQ(text, "");
}

TEST(RdmaFault, WrongGidIndex) {
  expectInit([](const Rank&) { setenv("FUSCO_IB_GID_INDEX", "7", 1); }, fuscoSystemError,
             {"FUSCO_IB_GID_INDEX=7 names no GID that is set", "rxe0 port 1", "1: 10.77.0.1 RoCE v2 on d0"});
}

TEST(RdmaFault, WrongDevice) {
  expectInit([](const Rank&) { setenv("FUSCO_IB_HCA", "=mlx5_0", 1); }, fuscoSystemError,
             {"no RDMA port can be used", "rxe0 port 1 is not in FUSCO_IB_HCA"});
}

// Root may lock what it likes, but for its capability.
TEST(RdmaFault, TooLittleLockedMemory) {
  const auto lockLittle = [](const Rank&) {
    const rlimit limit{64 << 10, 64 << 10};
    setrlimit(RLIMIT_MEMLOCK, &limit);
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    syscall(SYS_capget, &header, data);
    data[0].effective &= ~(1u << CAP_IPC_LOCK);
    data[0].permitted &= ~(1u << CAP_IPC_LOCK);
    if (syscall(SYS_capset, &header, data) != 0) throw std::runtime_error("capset");
  };
  expectInit(lockLittle, fuscoSystemError,
             {"cannot register", "rxe0 port 1", "locked memory is limited to 64 KiB", "ulimit -l"});
}

TEST(RdmaPatience, ALaneDiesAndItsFlowsGoOn) {
  expectFault(twoNodes("lane down", 2), {true}, "/sbin/ip link set s1 down", "/sbin/ip link set s1 up", {}, 2500);
}

}  // namespace
}  // namespace fusco::test
