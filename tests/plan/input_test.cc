// What planning refuses, and how it says so.
#include <gtest/gtest.h>

#include <climits>
#include <functional>
#include <string>

#include "base/status.h"
#include "plan/plan.h"
#include "world.h"

namespace fusco::plan::testing {
namespace {

class PlanInput : public ::testing::Test {
 protected:
  Topology topology{{0, 0, 1, 1}};
  std::vector<std::int64_t> ids = {0, 1, 2, 3, 7, -1};
  RoutingMap map{ids.data(), 8, nullptr, 3, 2, 8};
  Options options;

  static void refused(const std::function<void()>& call, const std::string& words) {
    try {
      call();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::invalidArgument);
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
      return;
    }
    ADD_FAILURE() << "accepted; expected: " << words;
  }
  void analyseRefused(const std::string& words) {
    refused([&] { analyse(map, topology, 1, options); }, words);
  }
};

TEST_F(PlanInput, ExpertIdsAreNamedWithTokenAndSlot) {
  ids[3] = 8;
  analyseRefused("rank 1: token 1, slot 1 names expert 8;");
  ids[3] = -2;
  analyseRefused("token 1, slot 1 names expert -2;");
  ids[3] = (std::int64_t{1} << 32) + 1;  // would be expert 1 if cut to 32 bits
  analyseRefused("token 1, slot 1 names expert 4294967297;");
  const std::int32_t narrow[] = {0, 1, 2, 3, INT_MIN, 0};
  map.ids = narrow;
  map.idBytes = 4;
  analyseRefused("token 2, slot 0 names expert -2147483648;");
  options.layout = Layout::rankOrder;
  analyseRefused("token 2, slot 0 names expert -2147483648;");
}

TEST_F(PlanInput, Shapes) {
  const RoutingMap good = map;
  map.idBytes = 2;
  analyseRefused("ids of 2 bytes");
  map = good;
  map.topk = 0;
  analyseRefused("top-k is 0");
  map.topk = 32768;
  analyseRefused("top-k is 32768");
  map = good;
  map.experts = 0;
  analyseRefused("0 experts");
  map = good;
  map.tokens = -1;
  analyseRefused("-1 tokens");
  map.tokens = INT64_MAX;
  analyseRefused("split the batch");
  map.tokens = (std::int64_t{1} << 30);
  analyseRefused("split the batch");
  map = good;
  map.ids = nullptr;
  analyseRefused("NULL");
  map.tokens = 0;
  analyse(map, topology, 1, options);
  refused([&] { analyse(good, topology, 4, options); }, "rank 4");
  refused([&] { arenaBytes(good, topology, -1, options); }, "rank -1");
}

TEST_F(PlanInput, OptionsThatDoNotFit) {
  options.alignment = 0;
  analyseRefused("alignment 0");
  options = {};
  options.capacityRows = -1;
  analyseRefused("capacity of -1");
  options.capacityRows = std::int64_t{1} << 31;
  analyseRefused("capacity of 2147483648");
  options = {};
  options.layout = static_cast<Layout>(9);
  analyseRefused("layout 9");
  options = {};
  options.dedup = static_cast<Dedup>(9);
  analyseRefused("dedup 9");
  options = {};
  options.layout = Layout::slotted;
  options.maxTokens = 2;
  analyseRefused("3 tokens, but the slotted layout was made for at most 2");
  options.maxTokens = INT64_MAX;
  analyseRefused("more than 2^31 - 1");
  options.maxTokens = 3;
  options.alignment = 8;
  analyseRefused("not a multiple of the alignment");
  options.alignment = 6;
  analyse(map, topology, 1, options);
}

TEST_F(PlanInput, ExchangedCountsThatDoNotFit) {
  const Analysis analysis = analyse(map, topology, 1, options);
  Arena arena(arenaBytes(map, topology, 1, options));
  const Exchanged good{std::vector<std::int32_t>(8, 0), analysis.rowsOfKey};
  const auto plan = [&](const Analysis& a, const Exchanged& e) {
    makePlan(map, topology, 1, options, a, e, arena.get());
  };
  plan(analysis, good);
  Exchanged bad = good;
  bad.before.pop_back();
  refused([&] { plan(analysis, bad); }, "7 and 8 counts for 8 keys");
  bad = good;
  bad.total[3] = 0;
  refused([&] { plan(analysis, bad); }, "key 3 has 1 rows here");
  bad = good;
  bad.before[2] = -1;
  refused([&] { plan(analysis, bad); }, "key 2");
  bad = good;
  bad.before[5] = INT_MAX;
  bad.total[5] = INT_MIN;  // a sum that wrapped around
  refused([&] { plan(analysis, bad); }, "key 5");
  bad = good;
  bad.total[6] = bad.total[7] = INT_MAX;  // both on rank 3
  refused([&] { plan(analysis, bad); }, "rank 3 would receive");
  Analysis other = analysis;
  other.copiesOfNode.pop_back();
  refused([&] { plan(other, good); }, "another shape");
}

TEST_F(PlanInput, ForeignBytesAreNoPlan) {
  alignas(64) std::byte bytes[sizeof(ArenaHeader)] = {};
  refused([&] { view(bytes); }, "no plan");
}

}  // namespace
}  // namespace fusco::plan::testing
