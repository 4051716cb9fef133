// Whole shuffles in the soft-RoCE machine: two nodes of two ranks, each node with two NICs of its own, two lanes. The
// results are held against the naive oracle bit by bit, as over every other medium.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <fstream>
#include <numeric>
#include <random>

#include "plan/file.h"
#include "rdma/routed.h"
#include "shuffle/case.h"
#include "shuffle/ranks.h"

namespace fusco::test {
namespace {

// Before the first call of the library in this process.
void takeNics(const Rank& self) {
  setenv("FUSCO_NET", "verbs", 0);  // or what is asked for, to compare
  setenv("FUSCO_LANES", "2", 1);
  setenv("FUSCO_IB_HCA", self.world().nodeOf(self.rank()) == 0 ? "=rxe0,rxe1" : "=rxe2,rxe3", 1);
}

World nodes(const char* name, std::vector<int> nodeOf, std::int64_t sliceBytes = 16384) {
  World world{name, static_cast<int>(nodeOf.size()), 1, {}, true, sliceBytes};
  world.nodes = std::move(nodeOf);
  return world;
}

void runWorld(const World& world, std::int64_t cases, bool two) {
  const Cases some(two ? 2 * cases : cases, 900 + world.ranks);
  const std::vector<std::string> wrong = runRanks(
      world,
      [&](Rank& self) {
        takeNics(self);
        fuscoComm_t comm = self.connect();
        for (std::int64_t i = 0; i < some.count; i += two ? 2 : 1) {
          const auto caseOf = [&](std::int64_t k) { return randomCase(some.seed(k), world.ranks); };
          const std::string text =
              two ? runTwo(caseOf(i), caseOf(i + 1), comm, self.rank()) : runRank(caseOf(i), comm, self.rank());
          if (!text.empty()) {
            fuscoCommAbort(comm);
            throw std::runtime_error(text);
          }
        }
        FUSCO_OK(fuscoCommFinalize(comm));
        FUSCO_OK(fuscoCommDestroy(comm));
      },
      static_cast<int>(60 + 2 * some.count));
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

// ---- what crosses, and what arrives

constexpr int kRanks = 4, kExperts = 16, kTopk = 4;
constexpr std::size_t kRow = 2048;
constexpr int kSteps = 2;

Routed routedOf(int rank, int tokens) { return {static_cast<unsigned>(1000 + rank), tokens, kTopk, kExperts}; }

// Tokens that have an expert on the other node: one copy of each crosses.
std::uint64_t copiesAcross(int rank, int tokens) {
  const Routed routed = routedOf(rank, tokens);
  std::uint64_t copies = 0;
  for (int t = 0; t < tokens; ++t) copies += routed.wants(t, 1 - rank / (kRanks / 2)) ? 1 : 0;
  return copies;
}

// What is left of a run, in memory that the ranks share with the test.
struct Kept {
  std::uint64_t rows[kRanks];                   // of dispatch, hashed
  std::uint64_t sums[kRanks];                   // of combine
  std::uint64_t wireBytes[kRanks];              // of one dispatch, slice heads included
  std::uint64_t rowsByLane[kRanks][kSteps][2];  // that the plans of the steps send to the other node
};

// Bytes that have left by the interface below a port.
std::uint64_t leftBy(int port) {
  std::ifstream file("/sys/class/net/d" + std::to_string(port) + "/statistics/tx_bytes");
  std::uint64_t bytes = 0;
  file >> bytes;
  return bytes;
}

// Rows that a plan sends to the other node, by lane.
void countLanes(fuscoPlan_t plan, int rank, std::uint64_t* rows) {
  const std::string path = "/tmp/plan" + std::to_string(rank);
  FUSCO_OK(fuscoPlanSave(plan, path.c_str()));
  std::ifstream stream(path, std::ios::binary);
  const plan::OwnedArena arena = plan::replay(plan::load(stream));
  const plan::View view = plan::view(arena.get());
  for (int i = 0; i < view.header->flows; ++i) {
    const plan::Flow& flow = view.flows[i];
    if (flow.node != view.header->node) rows[flow.lane] += flow.copyEnd - flow.copyBegin;
  }
}

Kept runFixed(const char* net, const std::vector<int>& tokens, const char* balance = "none") {
  void* const memory = mmap(nullptr, sizeof(Kept), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("mmap");
  auto* const kept = new (memory) Kept{};
  const World world = nodes(net, {0, 0, 1, 1});
  const std::vector<std::string> wrong = runRanks(world, [&](Rank& self) {
    setenv("FUSCO_NET", net, 1);
    setenv("FUSCO_BALANCE", balance, 1);
    takeNics(self);
    const int rank = self.rank(), count = tokens[static_cast<std::size_t>(rank)];
    fuscoComm_t comm = self.connect();
    const Routed routed = routedOf(rank, count);
    std::vector<std::uint16_t> input(static_cast<std::size_t>(count) * kRow / 2);
    fillNumbers(input.data(), input.size() * 2, static_cast<unsigned>(rank + 1));
    // Twice, so that a balancer knows the loads of the step before.
    for (int step = 0; step < kSteps; ++step) {
      const fuscoPlan_t plan = routed.plan(comm);
      countLanes(plan, rank, kept->rowsByLane[rank][step]);
      fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
      FUSCO_OK(fuscoPlanGetInfo(plan, &info));
      std::vector<std::uint8_t> rows(static_cast<std::size_t>(info.receiveRows) * kRow), sums(input.size() * 2);
      fuscoStatistics_t before = FUSCO_STATISTICS_INIT, after = FUSCO_STATISTICS_INIT;
      FUSCO_OK(fuscoCommGetStatistics(comm, &before));
      FUSCO_OK(fuscoDispatch(plan, input.data(), rows.data(), kRow, nullptr));
      FUSCO_OK(fuscoCommGetStatistics(comm, &after));
      FUSCO_OK(fuscoCombine(plan, rows.data(), sums.data(), kRow / 2, fuscoBfloat16, nullptr));
      kept->rows[rank] = hashOf(rows.data(), rows.size());
      kept->sums[rank] = hashOf(sums.data(), sums.size());
      kept->wireBytes[rank] = after.wireBytes - before.wireBytes;
      FUSCO_OK(fuscoPlanDestroy(plan));
    }
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << net;
  const Kept result = *kept;
  munmap(memory, sizeof(Kept));
  return result;
}

TEST(RdmaShuffle, SameBitsAsOverSharedMemory) {
  const std::vector<int> tokens{50, 33, 0, 43};
  const Kept verbs = runFixed("verbs", tokens), shared = runFixed("shm", tokens);
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(verbs.rows[rank], shared.rows[rank]) << rank;
    EXPECT_EQ(verbs.sums[rank], shared.sums[rank]) << rank;
    EXPECT_EQ(verbs.wireBytes[rank], shared.wireBytes[rank]) << rank;
  }
}

// A port's bytes against what the plans send by it, over which there are the heads of packets and acknowledgements:
// true if they are no more than `most` times as much. Soft-RoCE loses a packet now and then, and then sends again what
// came after it, too: tests of the upper bound have kTries, one of which must keep to it at all ports. Less than was
// planned is wrong each time.
constexpr int kTries = 3;
bool keepsTo(int port, double planned, std::uint64_t left, double most) {
  const auto out = static_cast<double>(left);
  EXPECT_GE(out, planned) << "port " << port;
  std::printf("port %d: %.0f bytes planned, %.0f left, at most %.2f times as much\n", port, planned, out, most);
  return out <= most * planned;
}

// Each token crosses once, by the lane that the plan says; packets add their heads, combine as much again.
TEST(RdmaShuffle, BytesOnTheWireAreThePlans) {
  constexpr int kTokens = 80;
  const std::vector<int> tokens{kTokens, kTokens, kTokens, kTokens};
  bool kept = false;
  for (int i = 0; i < kTries && !kept && !HasFailure(); ++i) {
    std::uint64_t before[4], left[4];
    for (int port = 0; port < 4; ++port) before[port] = leftBy(port);
    const Kept verbs = runFixed("verbs", tokens);
    for (int port = 0; port < 4; ++port) left[port] = leftBy(port) - before[port];
    kept = true;
    for (int rank = 0; rank < kRanks; ++rank) {
      const double planned = static_cast<double>(copiesAcross(rank, kTokens) * kRow);
      EXPECT_GE(static_cast<double>(verbs.wireBytes[rank]), planned);
      EXPECT_LE(static_cast<double>(verbs.wireBytes[rank]), 1.06 * planned) << "with heads, entries and weights";
      // Rank r of a node has lane r. Both steps' dispatches go out by it, and the sums of the ranks that it forwards
      // for.
      const double own = 2 * planned, back = 2 * static_cast<double>(copiesAcross((rank + 2) % 4, kTokens) * kRow);
      kept = keepsTo(rank, own + back, left[rank], 1.12) && kept;
    }
  }
  EXPECT_TRUE(kept) << "more left than was planned, " << kTries << " times";
}

// One rank alone has rows for the other node: the balancer's second plan sends them by both lanes, and so they go.
TEST(RdmaShuffle, TwoLanesShareABusyFlow) {
  const std::vector<int> tokens{160, 0, 0, 0};
  const std::uint64_t copies = copiesAcross(0, tokens[0]);
  bool within = false;
  for (int i = 0; i < kTries && !within && !HasFailure(); ++i) {
    const std::uint64_t before[2] = {leftBy(0), leftBy(1)};
    const Kept kept = runFixed("verbs", tokens, "full");
    const auto& rows = kept.rowsByLane[0];
    EXPECT_EQ(rows[0][0], copies);
    EXPECT_EQ(rows[0][1], 0u);
    EXPECT_EQ(rows[1][0] + rows[1][1], copies);
    EXPECT_GT(rows[1][0], copies / 3);
    EXPECT_GT(rows[1][1], copies / 3);
    within = true;
    for (int lane = 0; lane < 2; ++lane) {
      const double planned = static_cast<double>((rows[0][lane] + rows[1][lane]) * kRow);
      // What comes back is acknowledged by the same port.
      within = keepsTo(lane, planned, leftBy(lane) - before[lane], 1.15) && within;
    }
  }
  EXPECT_TRUE(within) << "more left than was planned, " << kTries << " times";
}

TEST(RdmaShuffle, TwoNodesOfTwo) { runWorld(nodes("two nodes of two", {0, 0, 1, 1}), 4, false); }
TEST(RdmaShuffle, SmallSlices) { runWorld(nodes("small slices", {0, 1, 1}, 4096), 3, false); }
TEST(RdmaShuffle, TwoBatchesAtOnce) { runWorld(nodes("two batches", {0, 0, 1, 1}), 1, true); }

}  // namespace
}  // namespace fusco::test
