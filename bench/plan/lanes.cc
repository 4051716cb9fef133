#include "lanes.h"

#include <cstdlib>
#include <memory>
#include <numeric>

#include "plan/planner.h"

namespace fusco::bench {

namespace {

struct Step {
  std::vector<std::vector<std::int64_t>> ids;  // of each rank
  plan::RoutingMap map(const LaneQuestion& question, int rank) const {
    return {ids[rank].data(), 8, nullptr, static_cast<std::int64_t>(ids[rank].size()) / question.topk, question.topk,
            question.experts};
  }
};

Step drawStep(const LaneQuestion& question, const plan::Topology& topology, std::uint64_t seed) {
  const RoutingKind kind = parseRouting(question.routing);
  const RoutingSource source(kind, question.topk, question.experts);
  Step step;
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    const std::int64_t tokens = tokensOf(kind, question.tokens, topology.localIndex(rank), question.nodeSize);
    step.ids.push_back(source.draw(tokens, seed * 1000003 + rank));
  }
  return step;
}

}  // namespace

LaneAnswer measureLanes(const LaneQuestion& question, plan::Balance balance) {
  std::vector<int> nodeOf(static_cast<std::size_t>(question.nodes) * question.nodeSize);
  for (std::size_t rank = 0; rank < nodeOf.size(); ++rank) nodeOf[rank] = static_cast<int>(rank) / question.nodeSize;
  plan::Topology topology(nodeOf, question.lanes);
  const plan::Options options;

  const Step before = drawStep(question, topology, 1);
  std::vector<std::int32_t> loads;
  plan::Analysis analysis;
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    plan::analyse(before.map(question, rank), topology, rank, options, analysis);
    loads.insert(loads.end(), analysis.copiesOfNode.begin(), analysis.copiesOfNode.end());
  }
  plan::balanceFlows(topology, loads, balance);

  const Step now = drawStep(question, topology, 2);
  std::vector<plan::Exchanged> exchanged(topology.ranks());
  std::vector<std::int32_t> sum(question.experts, 0);
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    plan::analyse(now.map(question, rank), topology, rank, options, analysis);
    exchanged[rank].before = sum;
    for (int expert = 0; expert < question.experts; ++expert) sum[expert] += analysis.rowsOfKey[expert];
  }
  LaneAnswer answer;
  plan::LaneLoads lanes(topology);
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    const plan::RoutingMap map = now.map(question, rank);
    exchanged[rank].total = sum;
    plan::Planner planner(topology, rank);
    planner.analyse(map, options, analysis);
    const std::unique_ptr<void, decltype(&std::free)> arena(std::aligned_alloc(64, planner.arenaBytes(map, options)),
                                                            &std::free);
    if (!arena) throw std::bad_alloc();
    planner.makePlan(map, options, analysis, exchanged[rank], arena.get());
    lanes.add(topology, plan::view(arena.get()));
    answer.flows += topology.flowCount(rank) - 1;
  }
  answer.spread = plan::spreadOf(topology, lanes);
  answer.copies = std::accumulate(lanes.out.begin(), lanes.out.end(), std::int64_t{0});
  return answer;
}

}  // namespace fusco::bench
