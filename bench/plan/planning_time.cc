#include "planning_time.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "made_up_routing.h"
#include "plan/planner.h"

namespace fusco::bench {

namespace {

double at(std::vector<double> times, double quantile) {
  const auto place = times.begin() + static_cast<std::ptrdiff_t>(quantile * static_cast<double>(times.size() - 1));
  std::nth_element(times.begin(), place, times.end());
  return *place;
}

// Counts the entries that are missing, doubled or in the wrong row, by counting rows in token order.
std::int64_t countWrong(const PlanQuestion& question, const plan::Topology& topology,
                        const std::vector<std::int64_t>& ids, const plan::View& plan) {
  std::vector<std::int64_t> rowOf(ids.size()), next(plan.rowBase, plan.rowBase + question.experts);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0) rowOf[i] = next[ids[i]]++;
  }
  std::vector<int> seen(ids.size(), 0);
  std::int64_t wrong = 0;
  for (int f = 0; f < plan.header->flows; ++f) {
    const plan::Flow flow = plan.flows[f];
    for (std::uint32_t copy = flow.copyBegin; copy < flow.copyEnd; ++copy) {
      for (std::uint32_t e = plan.copies[copy].firstEntry; e < plan.copies[copy + 1].firstEntry; ++e) {
        const plan::Entry entry = plan.entries[e];
        const std::size_t place =
            static_cast<std::size_t>(plan.copies[copy].token) * question.topk + (entry.slot & plan::kSlotMask);
        if (ids[place] < 0) {
          ++wrong;
          continue;
        }
        const int owner = topology.rankOfExpert(static_cast<int>(ids[place]), question.experts);
        const bool right = entry.row == rowOf[place] && topology.nodeOf(owner) == flow.node &&
                           topology.localIndex(owner) == entry.rank && ++seen[place] == 1;
        wrong += !right;
      }
    }
  }
  for (std::size_t i = 0; i < ids.size(); ++i) wrong += ids[i] >= 0 && seen[i] == 0;
  return wrong;
}

}  // namespace

PlanTime timePlanning(const PlanQuestion& question) {
  std::vector<int> nodeOf(question.ranks);
  for (int rank = 0; rank < question.ranks; ++rank) nodeOf[rank] = rank / question.nodeSize;
  const plan::Topology topology(nodeOf, question.nodeSize);
  const int rank = question.ranks / 2;
  std::vector<std::int64_t> ids = RoutingSource({}, question.topk, question.experts).draw(question.tokens, 1);
  std::mt19937 random(2);
  for (std::int64_t& id : ids) {
    if (random() < question.masked * 0x1p32) id = -1;
  }
  const std::vector<std::int32_t> narrow(ids.begin(), ids.end());
  const std::vector<float> weights(ids.size(), 1.0f / static_cast<float>(question.topk));
  plan::RoutingMap map;
  map.ids = question.idBytes == 4 ? static_cast<const void*>(narrow.data()) : ids.data();
  map.idBytes = question.idBytes;
  map.weights = question.weights ? weights.data() : nullptr;
  map.tokens = question.tokens;
  map.topk = question.topk;
  map.experts = question.experts;
  const plan::Options options;

  plan::Planner planner(topology, rank);
  plan::Analysis analysis;
  planner.analyse(map, options, analysis);
  plan::Exchanged exchanged;  // as if all ranks had this rank's map
  for (const std::int32_t rows : analysis.rowsOfKey) {
    exchanged.before.push_back(rows * rank);
    exchanged.total.push_back(rows * question.ranks);
  }
  PlanTime result;
  result.arenaBytes = static_cast<std::int64_t>(planner.arenaBytes(map, options));
  const std::unique_ptr<void, decltype(&std::free)> arena(std::aligned_alloc(64, result.arenaBytes), &std::free);
  if (!arena) throw std::bad_alloc();
  planner.makePlan(map, options, analysis, exchanged, arena.get());
  const plan::View plan = plan::view(arena.get());
  result.copies = plan.header->copies;
  result.entries = plan.header->entries;
  result.wrong = countWrong(question, topology, ids, plan);

  using Clock = std::chrono::steady_clock;
  using Microseconds = std::chrono::duration<double, std::micro>;
  std::vector<double> first, second, both;
  for (int round = -question.warmups; round < question.rounds; ++round) {
    const auto begin = Clock::now();
    planner.analyse(map, options, analysis);
    const auto middle = Clock::now();
    planner.makePlan(map, options, analysis, exchanged, arena.get());
    const auto end = Clock::now();
    if (round < 0) continue;
    first.push_back(Microseconds(middle - begin).count());
    second.push_back(Microseconds(end - middle).count());
    both.push_back(Microseconds(end - begin).count());
  }
  result.analyseP50 = at(first, 0.5);
  result.planP50 = at(second, 0.5);
  result.p50 = at(both, 0.5);
  result.p99 = at(both, 0.99);
  return result;
}

}  // namespace fusco::bench
