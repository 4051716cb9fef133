// Whole shuffles with balanced flows, against the naive oracle: each plan may have other forwarders and lanes than the
// one before, and keeps its own. Ranks are threads, on emulated nodes that reach each other by TCP or shared memory.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "plan/file.h"
#include "plan/print.h"
#include "shuffle/case.h"
#include "shuffle/ranks.h"

namespace fusco::test {
namespace {

struct Setting {
  const char* net;
  std::vector<int> nodes;
  int lanes;
  int balance;
};

World worldOf(const Setting& setting, std::int64_t sliceBytes = 16384) {
  const int ranks = static_cast<int>(setting.nodes.size());
  return {"threads on nodes", ranks, ranks, setting.nodes, true, sliceBytes};
}

fuscoComm_t connect(Rank& self, const Setting& setting) {
  fuscoConfig_t config = self.config();
  config.lanesPerNode = setting.lanes;
  config.balance = setting.balance;
  return self.connect(0, config);
}

void runSetting(const Setting& setting, const std::function<void(Rank&, fuscoComm_t)>& body,
                std::int64_t sliceBytes = 16384) {
  setenv("FUSCO_NET", setting.net, 1);  // for the ranks, which are threads of another process
  const std::vector<std::string> wrong = runRanks(worldOf(setting, sliceBytes), [&](Rank& self) {
    fuscoComm_t comm = connect(self, setting);
    try {
      body(self, comm);
    } catch (...) {
      fuscoCommAbort(comm);
      throw;
    }
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

void runCases(const Setting& setting, int cases, std::int64_t sliceBytes = 16384) {
  const int ranks = static_cast<int>(setting.nodes.size());
  const Cases some(cases, 200 + ranks);
  runSetting(
      setting,
      [&](Rank& self, fuscoComm_t comm) {
        std::string text;
        for (std::int64_t i = 0; i < some.count && text.empty(); ++i) {
          const Case c = randomCase(some.seed(i), ranks);
          if (i % 4 == 0) {
            text = runAround(c, {randomCase(some.seed(i) + 1, ranks), randomCase(some.seed(i) + 2, ranks)}, comm,
                             self.rank());
          } else if (i % 4 == 1) {
            text = runTwo(c, randomCase(some.seed(i) + 1, ranks), comm, self.rank());
          } else {
            text = runRank(c, comm, self.rank());
          }
        }
        if (!text.empty()) throw std::runtime_error(text);
      },
      sliceBytes);
}

TEST(ShuffleBalance, tcpTwoNodesOfTwo) { runCases({"tcp", {0, 0, 1, 1}, 2, fuscoBalanceFull}, 100); }
TEST(ShuffleBalance, tcpPaper) { runCases({"tcp", {0, 0, 1, 1, 2, 2}, 2, fuscoBalancePaper}, 48); }
TEST(ShuffleBalance, tcpUnequalNodes) { runCases({"tcp", {0, 1, 1, 1, 2}, 3, fuscoBalanceFull}, 48); }
TEST(ShuffleBalance, tcpOneRankOfTwoLanes) { runCases({"tcp", {0, 1}, 2, fuscoBalanceFull}, 100); }
TEST(ShuffleBalance, tcpSmallSlices) { runCases({"tcp", {0, 0, 1}, 2, fuscoBalanceFull}, 48, 4096); }
TEST(ShuffleBalance, memoryThreeNodesOfTwo) { runCases({"shm", {0, 0, 1, 1, 2, 2}, 2, fuscoBalanceFull}, 60); }
// Lower nodes do not hold lower ranks: counts go another way.
TEST(ShuffleBalance, memoryRanksDealtOut) { runCases({"shm", {0, 1, 2, 0, 1, 2, 0}, 4, fuscoBalanceFull}, 60); }
TEST(ShuffleBalance, memoryOneLane) { runCases({"shm", {0, 0, 0, 1, 1, 1}, 1, fuscoBalanceFull}, 60); }

// 100 tokens of rank 0 and none of rank 1 go to the other node: the first plan leaves them where they are.
struct Lopsided {
  fuscoPlan_t plan(fuscoComm_t comm, int rank, int layout = fuscoLayoutExpertOrder) {
    ids.assign(rank == 0 ? 100 : 0, 2 + rank);
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = ids.data();
    config.idType = fuscoInt64;
    config.tokens = static_cast<std::int64_t>(ids.size());
    config.topk = 1;
    config.experts = 4;
    config.layout = layout;
    config.maxTokens = 100;
    fuscoPlan_t made = nullptr;
    FUSCO_OK(fuscoPlanCreate(&made, &config, comm, nullptr));
    return made;
  }
  std::vector<std::int64_t> ids;
};

std::string textOf(fuscoPlan_t plan) {
  std::size_t needed = 0;
  FUSCO_OK(fuscoPlanPrint(plan, 1, nullptr, 0, &needed));
  std::string text(needed, '\0');
  FUSCO_OK(fuscoPlanPrint(plan, 1, text.data(), text.size(), nullptr));
  text.pop_back();
  return text;
}

// How many flows of a saved plan leave the node, after it was replayed without any peer.
int flowsOut(fuscoPlan_t plan, int rank) {
  const std::string path =
      testing::TempDir() + "fusco_balance_" + std::to_string(getpid()) + "_" + std::to_string(rank);
  FUSCO_OK(fuscoPlanSave(plan, path.c_str()));
  std::ifstream stream(path, std::ios::binary);
  const plan::PlanFile file = plan::load(stream);
  unlink(path.c_str());
  const plan::OwnedArena arena = plan::replay(file);
  REQUIRE(plan::printJson(arena.get()) == textOf(plan));
  const plan::View view = plan::view(arena.get());
  int flows = 0;
  for (int i = 0; i < view.header->flows; ++i)
    flows += view.flows[i].node != view.header->node && view.flows[i].copyEnd > view.flows[i].copyBegin;
  return flows;
}

TEST(ShuffleBalance, theNextPlanIsBalancedAndReplayed) {
  runSetting({"shm", {0, 0, 1, 1}, 2, fuscoBalanceFull}, [](Rank& self, fuscoComm_t comm) {
    const int rank = self.rank();
    Lopsided shape;
    fuscoPlan_t first = shape.plan(comm, rank);
    fuscoPlan_t second = shape.plan(comm, rank);
    const std::string before = textOf(first);
    REQUIRE(flowsOut(first, rank) == (rank == 0 ? 1 : 0));
    REQUIRE(flowsOut(second, rank) == (rank == 0 ? 2 : 0));
    // Without a count round: by the latest topology, of whose making they are no part.
    fuscoPlan_t slotted = shape.plan(comm, rank, fuscoLayoutSlotted);
    REQUIRE(flowsOut(slotted, rank) == (rank == 0 ? 2 : 0));
    REQUIRE(textOf(first) == before);
    for (fuscoPlan_t plan : {first, second, slotted}) FUSCO_OK(fuscoPlanDestroy(plan));
  });
}

TEST(ShuffleBalance, noneLeavesAllAsItIs) {
  runSetting({"shm", {0, 0, 1, 1}, 2, fuscoBalanceNone}, [](Rank& self, fuscoComm_t comm) {
    Lopsided shape;
    for (int i = 0; i < 3; ++i) {
      fuscoPlan_t plan = shape.plan(comm, self.rank());
      REQUIRE(flowsOut(plan, self.rank()) == (self.rank() == 0 ? 1 : 0));
      FUSCO_OK(fuscoPlanDestroy(plan));
    }
  });
}

// A plan that all ranks see fail leaves topologies agreed.
TEST(ShuffleBalance, aPlanThatFailsForAll) {
  runSetting({"shm", {0, 0, 1, 1}, 2, fuscoBalanceFull}, [](Rank& self, fuscoComm_t comm) {
    const int rank = self.rank();
    Lopsided shape;
    std::vector<std::int64_t> wrong;
    for (int i = 0; i < 4; ++i) {
      fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
      config.expertIds = wrong.data();
      config.idType = fuscoInt64;
      config.tokens = 10;
      config.topk = 1;
      config.experts = 4;
      wrong.assign(10, rank == 3 && i % 2 == 0 ? 4711 : 1);
      if (i % 2 == 1) config.capacityRows = 5;  // too many rows instead
      fuscoPlan_t failed = nullptr;
      EXPECT_CODE(fuscoPlanCreate(&failed, &config, comm, nullptr), fuscoInvalidArgument);
      fuscoPlan_t plan = shape.plan(comm, rank);
      FUSCO_OK(fuscoPlanDestroy(plan));
      const std::string text = runRank(randomCase(9000 + static_cast<std::uint64_t>(i), 4), comm, rank);
      if (!text.empty()) throw std::runtime_error(text);
    }
  });
}

}  // namespace
}  // namespace fusco::test
