// A plan on a GPU, brought to the host as what it was made of. The routing map is kept in rank order only; else it is
// found from the plan, where each entry's row tells the expert.
#include <fmt/format.h>

#include <algorithm>

#include "engine/device/plan_memory.h"
#include "engine/engine.h"
#include "engine/shuffle.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {

// The expert whose rows on `rank` hold this one.
int expertOf(const plan::View& view, const plan::Topology& topology, int rank, std::uint32_t row) {
  const plan::ArenaHeader& h = *view.header;
  const int first = topology.firstExpert(rank, h.experts);
  if (h.layout == plan::Layout::slotted)
    return first + static_cast<int>(row / static_cast<std::uint32_t>(h.ranks * h.maxTokens));
  for (int e = first; e < first + topology.expertsOf(rank, h.experts); ++e) {
    const auto base = static_cast<std::uint32_t>(view.rowBase[e]);
    if (row >= base && row - base < static_cast<std::uint32_t>(view.rowsOfExpert[e])) return e;
  }
  fail(Code::internalError, fmt::format("no expert of rank {} has row {}", rank, row));
}

void findRoutingMap(const plan::View& view, Engine& engine, BroughtPlan& brought) {
  const plan::ArenaHeader& h = *view.header;
  if (h.dropped > 0) {
    fail(Code::invalidUsage,
         fmt::format(
             "rank {}: a plan on a GPU that has dropped rows ({}) cannot be saved: the routing map is not kept, and "
             "its dropped slots are not in the plan",
             engine.fabric().rank(), h.dropped));
  }
  for (int f = 0; f < h.flows; ++f) {
    for (std::uint32_t c = view.flows[f].copyBegin; c < view.flows[f].copyEnd; ++c) {
      for (std::uint32_t e = view.copies[c].firstEntry; e < view.copies[c + 1].firstEntry; ++e) {
        const plan::Entry& entry = view.entries[e];
        const auto at = static_cast<std::size_t>(view.copies[c].token) * static_cast<std::size_t>(h.topk) +
                        (entry.slot & plan::kSlotMask);
        brought.ids[at] = expertOf(view, engine.topology(), engine.nodeRank(entry.rank), entry.row);
        brought.weights[at] = view.weights[e];
      }
    }
  }
}

}  // namespace

BroughtPlan bringPlan(const PlanState& plan) {
  if (plan.madeOnHost()) return {plan.kept(), plan.exchanged, {}, {}};
  const DevicePlan& device = *plan.device;
  const plan::RoutingMap& given = plan.request.map;
  const std::vector<std::byte> arena = bringArena(plan);
  const plan::View view = plan::view(arena.data());
  BroughtPlan brought;
  brought.map = given;
  brought.map.tokens = view.header->tokensUsed;
  const auto slots = static_cast<std::size_t>(brought.map.tokens) * static_cast<std::size_t>(given.topk);
  brought.ids.assign(slots, -1);
  brought.weights.assign(slots, given.weights == nullptr ? 1.0f : 0.0f);
  const cuda::OnDevice on(plan.engine.device()->device());
  const auto bring = [&](void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) cuda::copyNow(to, from, bytes);
  };
  if (given.idBytes == 8 && plan.request.options.layout == plan::Layout::rankOrder) {
    bring(brought.ids.data(), device.keptIds(), slots * 8);
  } else if (plan.request.options.layout == plan::Layout::rankOrder) {
    std::vector<std::int32_t> narrow(slots);
    bring(narrow.data(), device.keptIds(), slots * 4);
    std::copy(narrow.begin(), narrow.end(), brought.ids.begin());
  }
  if (plan.request.options.layout != plan::Layout::rankOrder) {
    findRoutingMap(view, plan.engine, brought);
  } else if (given.weights != nullptr) {
    bring(brought.weights.data(), device.keptWeights(), slots * sizeof(float));
  }
  brought.map.ids = brought.ids.data();
  brought.map.idBytes = 8;
  brought.map.weights = given.weights == nullptr ? nullptr : brought.weights.data();
  if (plan.request.options.layout != plan::Layout::slotted) {
    std::vector<std::int32_t>* const lists[] = {&brought.exchanged.before, &brought.exchanged.total};
    for (std::size_t i = 0; i < 2; ++i) {
      lists[i]->resize(device.keys());
      bring(lists[i]->data(), device.exchanged() + i * device.keys(), device.keys() * sizeof(std::int32_t));
    }
  }
  return brought;
}

}  // namespace fusco::engine
