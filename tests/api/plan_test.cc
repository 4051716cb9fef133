// Plans as values: printed, saved, and replayed without any peer.
#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "api/worlds.h"
#include "plan/compare.h"
#include "plan/file.h"
#include "plan/print.h"

namespace fusco::test {
namespace {

std::string printed(fuscoPlan_t plan, int json) {
  std::size_t needed = 0;
  FUSCO_OK(fuscoPlanPrint(plan, json, nullptr, 0, &needed));
  std::string text(needed, 'x');
  FUSCO_OK(fuscoPlanPrint(plan, json, text.data(), text.size(), nullptr));
  REQUIRE(text.back() == '\0');
  text.pop_back();
  REQUIRE(text.find('\0') == std::string::npos);
  char few[9] = "XXXXXXXX";
  FUSCO_OK(fuscoPlanPrint(plan, json, few, 8, &needed));
  REQUIRE(std::string(few) == text.substr(0, 7) && few[8] == 0 && needed == text.size() + 1);
  return text;
}

TEST(Plan, isReplayedFromItsFile) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    for (std::uint64_t seed = 1; seed <= 40; ++seed) {
      const Case c = randomCase(seed, self.ranks());
      const auto at = static_cast<std::size_t>(self.rank());
      fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
      config.expertIds = c.ids[at].data();
      config.weights = seed % 2 == 0 ? c.weights[at].data() : nullptr;
      config.tokens = c.tokens[at];
      config.topk = c.topk;
      config.experts = c.experts;
      config.layout = c.layout;
      config.alignment = c.alignment;
      config.maxTokens = c.maxTokens;
      config.capacityRows = c.capacityRows;
      config.capacityPolicy = fuscoCapacityDrop;
      config.dedup = c.dedup;
      fuscoPlan_t plan = nullptr;
      FUSCO_OK(fuscoPlanCreate(&plan, &config, comm, nullptr));
      const std::string path =
          testing::TempDir() + "fusco_plan_" + std::to_string(getpid()) + "_" + std::to_string(self.rank());
      FUSCO_OK(fuscoPlanSave(plan, path.c_str()));
      std::ifstream stream(path, std::ios::binary);
      const plan::PlanFile file = plan::load(stream);
      std::remove(path.c_str());
      const plan::OwnedArena again = plan::replay(file);
      // What the library prints of its plan is what is printed of the replayed one, to the last row.
      REQUIRE(printed(plan, 1) == plan::printJson(again.get()));
      REQUIRE(printed(plan, 0) == plan::printText(again.get()));
      REQUIRE(plan::planEqual(again.get(), plan::replay(plan::decode(plan::encode(file))).get()));
      REQUIRE(printed(plan, 1).starts_with("{\"version\":"));
      fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
      FUSCO_OK(fuscoPlanGetInfo(plan, &info));
      REQUIRE(plan::view(again.get()).header->receiveRows == info.receiveRows);
      FUSCO_OK(fuscoPlanDestroy(plan));
    }
    leave(comm);
  });
}

TEST(Plan, aFileThatCannotBeWrittenIsNamed) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    const Routing routing(4, 2, 8);
    fuscoPlan_t plan = routing.make(comm);
    requireContains(EXPECT_CODE(fuscoPlanSave(plan, "/no/such/folder/plan"), fuscoSystemError), "/no/such/folder/plan");
    EXPECT_CODE(fuscoPlanSave(plan, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoPlanPrint(plan, 0, nullptr, 8, nullptr), fuscoInvalidArgument);
    FUSCO_OK(fuscoPlanDestroy(plan));
    leave(comm);
  });
}

// What a plan did not ask for is not there, and says so.
TEST(Plan, whatWasNotAskedForIsRefused) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(4, 2, 8);
    fuscoPlan_t plan = routing.make(comm);
    const fuscoTicket_t* tickets = nullptr;
    const volatile std::uint64_t* counters = nullptr;
    const std::int32_t* ids = nullptr;
    const float* weights = nullptr;
    EXPECT_CODE(fuscoPlanTickets(plan, &tickets), fuscoInvalidUsage);
    EXPECT_CODE(fuscoPlanExpertCounters(plan, &counters), fuscoInvalidUsage);
    EXPECT_CODE(fuscoPlanRankOrder(plan, &ids, &weights), fuscoInvalidUsage);
    EXPECT_CODE(fuscoFinish(plan), fuscoInvalidUsage);
    FUSCO_OK(fuscoPlanDestroy(plan));
    routing.config.tickets = 1;
    plan = routing.make(comm);
    requireContains(EXPECT_CODE(fuscoPlanTickets(plan, &tickets), fuscoInvalidUsage), "dispatch");
    FUSCO_OK(fuscoPlanDestroy(plan));
    leave(comm);
  });
}

// At most two operations are under way; a third is refused and disturbs nothing.
TEST(Plan, aThirdStartIsRefused) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    const Routing routing(64, 2, 8);
    fuscoPlan_t plan = routing.make(comm);
    const auto rows = static_cast<std::size_t>(receiveRows(plan));
    std::vector<float> in(64 * 16, 2.0f), out[3];
    for (auto& o : out) o.resize(rows * 16);
    fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
    args.input = in.data();
    args.rowBytes = 64;
    for (auto* o : {&out[0], &out[1]}) {
      args.output = o->data();
      FUSCO_OK(fuscoDispatchStart(plan, &args, nullptr));
    }
    args.output = out[2].data();
    requireContains(EXPECT_CODE(fuscoDispatchStart(plan, &args, nullptr), fuscoInvalidUsage), "fuscoFinish");
    FUSCO_OK(fuscoFinish(plan));
    FUSCO_OK(fuscoFinish(plan));
    EXPECT_CODE(fuscoFinish(plan), fuscoInvalidUsage);
    REQUIRE(out[0] == std::vector<float>(rows * 16, 2.0f) && out[1] == out[0] &&
            out[2] == std::vector<float>(rows * 16, 0.0f));
    FUSCO_OK(fuscoPlanDestroy(plan));
    shuffleWorks(self, comm);
    leave(comm);
  });
}

}  // namespace
}  // namespace fusco::test
