#include "plan/topology.h"

#include <gtest/gtest.h>

#include <set>

#include "base/status.h"

namespace fusco::plan {
namespace {

TEST(Topology, NodesAreNumberedByFirstAppearance) {
  const Topology topology({9, 4, 9, 4, 4, 0}, 2);
  EXPECT_EQ(topology.ranks(), 6);
  EXPECT_EQ(topology.nodes(), 3);
  EXPECT_EQ(topology.nodeOf(0), 0);
  EXPECT_EQ(topology.nodeOf(4), 1);
  EXPECT_EQ(topology.nodeOf(5), 2);
  EXPECT_EQ(topology.localIndex(4), 2);
  EXPECT_EQ(std::vector<int>(topology.ranksOf(1).begin(), topology.ranksOf(1).end()), (std::vector<int>{1, 3, 4}));
}

TEST(Topology, ExpertsAreDealtOutInBlocks) {
  for (int ranks = 1; ranks <= 9; ++ranks) {
    const Topology topology(std::vector<int>(ranks, 0));
    for (int experts = 1; experts <= 40; ++experts) {
      int expert = 0, most = 0, least = experts;
      for (int rank = 0; rank < ranks; ++rank) {
        ASSERT_EQ(topology.firstExpert(rank, experts), expert);
        const int count = topology.expertsOf(rank, experts);
        for (int i = 0; i < count; ++i) {
          ASSERT_EQ(topology.rankOfExpert(expert++, experts), rank);
        }
        ASSERT_TRUE(rank == 0 || count <= least);  // the first ranks hold the larger blocks
        most = std::max(most, count);
        least = std::min(least, count);
      }
      ASSERT_EQ(expert, experts);
      ASSERT_LE(most - least, 1);
    }
  }
}

TEST(Topology, DefaultFlows) {
  const Topology topology({0, 0, 0, 1, 1, 2}, 2);
  EXPECT_TRUE(topology.flowsTo(0, 0).empty());
  ASSERT_EQ(topology.flowsTo(2, 1).size(), 1u);
  EXPECT_EQ(topology.flowsTo(2, 1)[0].forwarder, 3);  // local index 2 modulo 2 ranks
  EXPECT_EQ(topology.flowsTo(2, 1)[0].lane, 0);       // local index 2 modulo 2 lanes
  EXPECT_EQ(topology.flowsTo(1, 2)[0].lane, 1);
  EXPECT_EQ(topology.flowsTo(1, 2)[0].share, 65536u);
  EXPECT_EQ(topology.flowCount(0), 3);
}

TEST(Topology, FlowsIntoIsTheReverseOfFlowsTo) {
  Topology topology({0, 1, 0, 1, 2, 2, 1}, 3);
  topology.setFlows(0, 1, {{3, 0, 30000}, {1, 2, 30000}, {3, 1, 5536}});
  topology.setFlows(4, 0, {{2, 0, 65536}});
  topology.setFlows(0, 2, {{4, 0, 1}, {5, 0, 65535}});
  EXPECT_EQ(topology.flowCount(0), 1 + 3 + 2);
  EXPECT_TRUE(topology.hasOwnFlows(4, 0));
  EXPECT_FALSE(topology.hasOwnFlows(4, 1));
  std::multiset<std::tuple<int, int, int>> forward, backward;  // source, flow, forwarder
  for (int source = 0; source < topology.ranks(); ++source) {
    int flow = 0;
    for (int node = 0; node < topology.nodes(); ++node) {
      if (node == topology.nodeOf(source)) ++flow;
      for (const FlowShare& share : topology.flowsTo(source, node)) forward.insert({source, flow++, share.forwarder});
    }
    EXPECT_EQ(flow, topology.flowCount(source));
  }
  for (int forwarder = 0; forwarder < topology.ranks(); ++forwarder) {
    int last = -1;
    for (const auto& inflow : topology.flowsInto(forwarder)) {
      EXPECT_GE(inflow.source, last);
      last = inflow.source;
      backward.insert({inflow.source, inflow.flow, forwarder});
    }
  }
  EXPECT_EQ(forward, backward);
}

TEST(Topology, FlowsCanBeReplacedAgainAndAgain) {
  Topology topology({0, 1, 1, 1}, 4);
  for (int round = 0; round < 50; ++round) {
    const int count = 1 + round % 3;
    std::vector<FlowShare> flows;
    for (int i = 0; i < count; ++i)
      flows.push_back({1 + i, (round + i) % 4, i == 0 ? 65536u - 100 * (count - 1) : 100});
    topology.setFlows(0, 1, flows);
    ASSERT_EQ(topology.flowsTo(0, 1).size(), static_cast<std::size_t>(count));
    EXPECT_EQ(topology.flowsTo(0, 1)[count - 1].lane, (round + count - 1) % 4);
    EXPECT_EQ(topology.flowsTo(1, 0)[0].forwarder, 0);
  }
}

// Both ends name a path alike, and it takes the lanes that the flow and the forwarder stand for.
TEST(Topology, PathsLeadByTheirLanes) {
  const Topology topology({0, 0, 0, 1, 1, 1}, 2);
  EXPECT_EQ(topology.paths(), 4);
  std::set<std::pair<int, int>> seen;
  for (int source : {1, 4}) {
    const int forwarder = source == 1 ? 5 : 0;
    for (int lane = 0; lane < 2; ++lane) {
      const int path = topology.pathOf(source, forwarder, lane);
      ASSERT_LT(path, topology.paths());
      EXPECT_EQ(topology.laneOf(source, forwarder, path), lane);
      EXPECT_EQ(topology.laneOf(forwarder, source, path), 0) << "local indices 0 and 2 take in by lane 0";
    }
  }
  EXPECT_NE(topology.pathOf(1, 5, 0), topology.pathOf(5, 1, 0)) << "one lane of the source, another of the forwarder";
  EXPECT_EQ(topology.homePath(1, 5), topology.homePath(5, 1));
  const Topology single({0, 1});
  EXPECT_EQ(single.paths(), 1);
  EXPECT_EQ(single.pathOf(1, 0, 0), 0);
  EXPECT_EQ(single.laneOf(0, 1, 0), 0);
}

TEST(Topology, RefusesWhatMakesNoSense) {
  EXPECT_THROW(Topology({}), Error);
  EXPECT_THROW(Topology({0, -1}), Error);
  EXPECT_THROW(Topology({0, 0}, 0), Error);
  Topology topology({0, 0, 1}, 2);
  EXPECT_THROW(topology.setFlows(0, 0, {{1, 0, 65536}}), Error);
  EXPECT_THROW(topology.setFlows(0, 1, {}), Error);
  EXPECT_THROW(topology.setFlows(0, 1, {{1, 0, 65536}}), Error);
  EXPECT_THROW(topology.setFlows(0, 1, {{2, 2, 65536}}), Error);
  EXPECT_THROW(topology.setFlows(0, 1, {{2, 0, 65535}}), Error);
  EXPECT_THROW(topology.setFlows(3, 1, {{2, 0, 65536}}), Error);
  EXPECT_THROW(topology.setFlows(0, 2, {{2, 0, 65536}}), Error);
}

}  // namespace
}  // namespace fusco::plan
