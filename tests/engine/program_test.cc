// Programs follow from the topology alone, and the streams of all ranks fit together.
#include "engine/program.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <tuple>

#include "plan/balance.h"
#include "plan/world.h"

namespace fusco::engine::testing {
namespace {

plan::Topology randomTopology(unsigned seed) {
  std::mt19937 random(seed);
  plan::Topology topology = plan::testing::randomWorld(random).topology;
  if (seed % 3 == 0) {
    std::vector<std::int32_t> loads(static_cast<std::size_t>(topology.ranks()) *
                                    static_cast<std::size_t>(topology.nodes()));
    for (std::int32_t& load : loads)
      load = static_cast<std::int32_t>(random() % 5 == 0 ? random() % 3000 : random() % 40);
    plan::balanceFlows(topology, loads, seed % 2 == 0 ? plan::Balance::full : plan::Balance::paper);
  }
  return topology;
}

TEST(Streams, WhatOneRankSendsAnotherExpects) {
  std::ptrdiff_t shared = 0;
  for (unsigned seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    const plan::Topology topology = randomTopology(seed);
    std::multiset<std::tuple<int, int, int>> out, in;
    for (int rank = 0; rank < topology.ranks(); ++rank) {
      const Streams streams = streamsOf(topology, rank);
      std::set<std::int32_t> flows{streams.ownFlow};
      int node = -1;
      for (const Stream& stream : streams.out) {
        shared += std::count_if(out.begin(), out.end(), [&](const auto& other) {
          return std::get<0>(other) == rank && std::get<1>(other) == stream.peer;
        });
        out.insert({rank, stream.peer, stream.path});
        ASSERT_NE(topology.nodeOf(stream.peer), topology.nodeOf(rank));
        ASSERT_LE(node, topology.nodeOf(stream.peer)) << "streams out lie by node";
        node = topology.nodeOf(stream.peer);
        ASSERT_FALSE(stream.flows.empty());
        ASSERT_TRUE(std::is_sorted(stream.flows.begin(), stream.flows.end()));
        for (const std::int32_t flow : stream.flows) ASSERT_TRUE(flows.insert(flow).second) << "a flow in two streams";
      }
      // Every flow of the plan belongs to a stream, or is the own one.
      ASSERT_EQ(static_cast<int>(flows.size()), topology.flowCount(rank));
      ASSERT_EQ(*flows.rbegin(), topology.flowCount(rank) - 1);
      int source = -1;
      for (const Stream& stream : streams.in) {
        in.insert({stream.peer, rank, stream.path});
        ASSERT_LE(source, stream.peer) << "streams in lie by source";
        source = stream.peer;
      }
    }
    ASSERT_EQ(out, in);
    ASSERT_EQ(std::set(out.begin(), out.end()).size(), out.size()) << "two streams on one path";
  }
  EXPECT_GT(shared, 0) << "no pair had two paths: the test saw nothing";
}

TEST(Program, EveryStreamHasItsSteps) {
  for (unsigned seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    const plan::Topology topology = randomTopology(seed);
    for (int rank = 0; rank < topology.ranks(); ++rank) {
      const Streams streams = streamsOf(topology, rank);
      for (const OperationKind kind :
           {OperationKind::dispatch, OperationKind::combine, OperationKind::combineBackward}) {
        const Program program = lower(kind, streams);
        std::map<StepKind, std::set<int>> steps;
        for (const Step& step : program) {
          ASSERT_LT(step.stage, kStages);
          ASSERT_LE(step.needs, step.stage) << "a step that waits for its own stage or a later one never runs";
          ASSERT_TRUE(steps[step.kind].insert(step.index).second) << "the same step twice";
        }
        for (const StepKind once : {StepKind::ready, StepKind::waitReady, StepKind::put, StepKind::done,
                                    StepKind::waitDone, StepKind::finish}) {
          ASSERT_EQ(steps[once].size(), 1u);
        }
        const bool backward = kind == OperationKind::combineBackward;
        const bool sends = kind != OperationKind::combine;
        ASSERT_EQ(steps[StepKind::extract].size(), sends ? streams.out.size() : 0);
        ASSERT_EQ(steps[StepKind::place].size(), sends ? streams.in.size() : 0);
        ASSERT_EQ(steps[StepKind::sendBack].size(), sends && !backward ? 0 : streams.in.size());
        ASSERT_EQ(steps[StepKind::receiveBack].size(), backward ? streams.out.size() : 0);
        // Nobody waits for its node before it has said what the node waits for.
        const auto stageOf = [&](StepKind wanted) {
          return std::find_if(program.begin(), program.end(), [&](const Step& s) { return s.kind == wanted; })->stage;
        };
        ASSERT_LT(stageOf(StepKind::ready), stageOf(StepKind::waitReady));
        ASSERT_LT(stageOf(StepKind::put), stageOf(StepKind::done));
        ASSERT_LT(stageOf(StepKind::done), stageOf(StepKind::waitDone));
      }
    }
  }
}

}  // namespace
}  // namespace fusco::engine::testing
