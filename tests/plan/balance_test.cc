#include "plan/balance.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "../../bench/plan/lanes.h"
#include "base/status.h"

namespace fusco::plan {
namespace {

// What each lane and forwarder would carry if the loads came again, to the copy.
struct Carried {
  LaneLoads lanes;
  std::vector<std::int64_t> forwarders;
};

Carried carry(const Topology& topology, const std::vector<std::int32_t>& loads) {
  Carried carried{LaneLoads(topology), std::vector<std::int64_t>(topology.ranks(), 0)};
  for (int source = 0; source < topology.ranks(); ++source) {
    for (int node = 0; node < topology.nodes(); ++node) {
      const std::int64_t load = loads[source * topology.nodes() + node];
      std::int64_t cumulated = 0, begin = 0;
      for (const FlowShare& flow : topology.flowsTo(source, node)) {
        cumulated += flow.share;
        const std::int64_t end = load * cumulated / 65536;
        carried.lanes.out[topology.nodeOf(source) * topology.lanesPerNode() + flow.lane] += end - begin;
        carried.lanes.in[node * topology.lanesPerNode() + laneInto(topology, flow.forwarder)] += end - begin;
        carried.forwarders[flow.forwarder] += end - begin;
        begin = end;
      }
    }
  }
  return carried;
}

class BusiestLane : public ::testing::TestWithParam<const char*> {};

TEST_P(BusiestLane, FullStaysWithinFivePercentOfTheMean) {
  bench::LaneQuestion question;
  question.routing = GetParam();
  const Spread full = bench::measureLanes(question, Balance::full).spread;
  EXPECT_LE(full.out, 1.05);
  EXPECT_LE(full.in, 1.05);
  for (const int lanes : {1, 3, 4, 10, 16}) {  // other ratios of lanes to ranks
    question.lanes = lanes;
    const Spread spread = bench::measureLanes(question, Balance::full).spread;
    EXPECT_LE(spread.out, 1.05) << lanes << " lanes";
    EXPECT_LE(spread.in, 1.05) << lanes << " lanes";
  }
}

INSTANTIATE_TEST_SUITE_P(Routing, BusiestLane, ::testing::Values("imbalanced", "zipf:1.2"),
                         [](const auto& param) { return std::string(param.param).substr(0, 4); });

TEST(Balance, ThePaperBalancesTheReceivingSideOnly) {
  bench::LaneQuestion question;
  question.routing = "imbalanced";
  const Spread none = bench::measureLanes(question, Balance::none).spread;
  EXPECT_NEAR(none.out, 1.75, 0.02);
  EXPECT_NEAR(none.in, 1.75, 0.02);
  const Spread paper = bench::measureLanes(question, Balance::paper).spread;
  EXPECT_NEAR(paper.out, 1.75, 0.02);
  EXPECT_LT(paper.in, 1.25);
}

TEST(Balance, FullIsEvenOnAnyTopology) {
  for (unsigned seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    std::vector<int> nodeOf(2 + random() % 20);
    const int labels = 2 + static_cast<int>(random() % 4);
    for (int& node : nodeOf) node = static_cast<int>(random() % labels);
    Topology topology(nodeOf, 1 + static_cast<int>(random() % 6));
    const int nodes = topology.nodes(), lanes = topology.lanesPerNode();
    std::vector<std::int32_t> loads(topology.ranks() * nodes);
    for (std::int32_t& load : loads) load = random() % 4 == 0 ? 0 : static_cast<std::int32_t>(random() % 60000);
    for (int rank = 0; rank < topology.ranks(); ++rank)
      loads[rank * nodes + topology.nodeOf(rank)] = 12345678;  // own: no matter
    balanceFlows(topology, loads, Balance::full);
    EXPECT_EQ(topology.version(), 1u);
    const Carried carried = carry(topology, loads);
    // A share is 1/65536 of less than 60000 copies: each end of a flow is off by less than 2 copies.
    const std::int64_t slack = 4 * topology.ranks() + 4;
    for (int node = 0; node < nodes; ++node) {
      const auto check = [&](const std::vector<std::int64_t>& load, int reachable) -> std::int64_t {
        const std::int64_t* mine = &load[node * lanes];
        const std::int64_t sum = std::accumulate(mine, mine + lanes, std::int64_t{0});
        // What is at home may stay there up to 1/64 above the mean.
        for (int lane = 0; lane < reachable; ++lane) {
          EXPECT_LE(static_cast<double>(mine[lane]),
                    static_cast<double>(sum) / reachable * (1 + 1.0 / 64) + static_cast<double>(slack) * nodes);
        }
        return sum;
      };
      check(carried.lanes.out, lanes);
      const int reachable = std::min<int>(lanes, static_cast<int>(topology.ranksOf(node).size()));
      const std::int64_t in = check(carried.lanes.in, reachable);
      // Forwarders of one lane share alike.
      const auto members = topology.ranksOf(node);
      for (std::size_t i = 0; i < members.size(); ++i) {
        const std::size_t lane = i % static_cast<std::size_t>(reachable);
        const std::size_t ofLane = (members.size() - lane + reachable - 1) / reachable;
        ASSERT_LE(static_cast<double>(carried.forwarders[members[i]]),
                  static_cast<double>(in) / reachable / static_cast<double>(ofLane) * (1 + 1.0 / 64) +
                      static_cast<double>(slack));
      }
    }
    // Cutting costs few flows: those that there must be, and one more for each cut.
    std::size_t flows = 0, pairs = 0;
    for (int source = 0; source < topology.ranks(); ++source) {
      flows += topology.flowCount(source) - 1;
      pairs += nodes - 1;
    }
    EXPECT_LE(flows, pairs + 2 * static_cast<std::size_t>(nodes) * lanes + 2 * topology.ranks());
  }
}

TEST(Balance, EvenLoadsAreLeftAlone) {
  Topology topology({0, 0, 1, 1, 2, 2}, 2);
  const Topology fresh = topology;
  balanceFlows(topology, std::vector<std::int32_t>(18, 100), Balance::full);
  for (int source = 0; source < 6; ++source) {
    for (int node = 0; node < 3; ++node) {
      const auto flows = topology.flowsTo(source, node), plain = fresh.flowsTo(source, node);
      ASSERT_EQ(flows.size(), plain.size());
      if (flows.empty()) continue;
      EXPECT_EQ(flows[0].forwarder, plain[0].forwarder);
      EXPECT_EQ(flows[0].lane, plain[0].lane);
    }
  }
}

TEST(Balance, GroupsMeetBusyAndIdleSenders) {
  // 2 nodes x 3 ranks; ranks 0 and 3 are the busiest of their nodes, then 1 and 4.
  Topology topology({0, 0, 0, 1, 1, 1}, 3);
  const std::vector<std::int32_t> loads = {0, 30, 0, 20, 0, 10, 30, 0, 20, 0, 10, 0};
  balanceFlows(topology, loads, Balance::paper);
  EXPECT_EQ(topology.flowsTo(0, 1)[0].forwarder, 4);  // the busiest of node 0 meets the second of node 1
  EXPECT_EQ(topology.flowsTo(2, 1)[0].forwarder, 3);
  EXPECT_EQ(topology.flowsTo(3, 0)[0].forwarder, 2);
  EXPECT_EQ(topology.flowsTo(3, 0)[0].lane, 0);
}

TEST(Balance, NoneGoesBackToTheDefault) {
  Topology topology({0, 0, 1, 1}, 2);
  const std::vector<std::int32_t> loads = {0, 90, 0, 10, 50, 0, 50, 0};
  balanceFlows(topology, loads, Balance::full);
  EXPECT_EQ(topology.flowsTo(0, 1).size(), 2u);  // 90 and 10 become 50 and 50
  balanceFlows(topology, loads, Balance::none);
  EXPECT_EQ(topology.flowsTo(0, 1).size(), 1u);
  EXPECT_EQ(topology.version(), 2u);
  EXPECT_FALSE(topology.hasOwnFlows(0, 1));
}

TEST(Balance, RefusesWhatDoesNotFit) {
  Topology topology({0, 1});
  EXPECT_THROW(balanceFlows(topology, std::vector<std::int32_t>(3, 0), Balance::full), Error);
  EXPECT_THROW(balanceFlows(topology, std::vector<std::int32_t>{0, 1, -1, 0}, Balance::full), Error);
  EXPECT_EQ(topology.version(), 0u);
  EXPECT_EQ(parseBalance("paper"), Balance::paper);
  EXPECT_THROW(parseBalance("best"), Error);
}

}  // namespace
}  // namespace fusco::plan
