#include "engine/plan_state.h"

#include <algorithm>
#include <cstring>

#include "engine/device/plan_memory.h"
#include "engine/engine.h"

namespace fusco::engine {

PlanState::PlanState(Engine& e, const PlanRequest& r)
    : engine(e),
      request(r),
      routes(e.balancer().plain()),
      ids(e.buffer()),
      weights(e.buffer()),
      arena(e.buffer()),
      tickets(&e.ledger()),
      landing(&e.ledger()),
      counters(&e.ledger()),
      extra(&e.ledger()),
      extraRows(e.buffer()),
      rankOrderIds(e.buffer()),
      rankOrderWeights(e.buffer()),
      castRows(e.buffer()),
      castScales(e.buffer()) {
  if (e.device() != nullptr) {
    device = std::make_shared<DevicePlan>(e, r);
    setRowCapacity();
    if (rowCapacity > 0 || device->countsStayOnDevice()) device->holdBeside(r, rowCapacity);
    if (e.deviceExecutor() == nullptr) return;
  }
  const auto slots = static_cast<std::size_t>(r.map.tokens) * static_cast<std::size_t>(r.map.topk);
  ids.need(slots * static_cast<std::size_t>(r.map.idBytes) + 1);
  if (r.map.weights != nullptr) weights.need(slots * 4 + 1);
  arena.need(plan::arenaBytes(kept(), topology(), e.fabric().rank(), r.options));
  setRowCapacity();
  if (rowCapacity > 0) holdRows(rowCapacity);
}

void PlanState::setRowCapacity() {
  const int mine = engine.topology().expertsOf(engine.fabric().rank(), request.map.experts);
  rowCapacity = static_cast<std::size_t>(request.options.capacityRows);
  if (request.options.layout == plan::Layout::slotted) {
    const std::size_t places = static_cast<std::size_t>(mine) * static_cast<std::size_t>(engine.fabric().ranks()) *
                               static_cast<std::size_t>(request.options.maxTokens);
    rowCapacity = rowCapacity == 0 ? places : std::min(places, rowCapacity);
  }
  localExpertRows.assign(static_cast<std::size_t>(mine), 0);
}

// Library memory that follows the number of received rows.
void PlanState::holdRows(std::size_t rows) {
  const bool slotted = request.options.layout == plan::Layout::slotted;
  const bool rankOrder = request.options.layout == plan::Layout::rankOrder;
  const auto slots = rows * static_cast<std::size_t>(request.map.topk);
  if (request.tickets || slotted || rankOrder) tickets.need(rows * sizeof(Ticket) + 64);
  if ((request.counters || slotted) && !rankOrder)
    counters.need(CounterBoard::bytes(static_cast<int>(localExpertRows.size())));
  if (!rankOrder) return;
  extra.need(slots * 8 + 64);
  rankOrderIds.need(slots * 4 + 4);
  rankOrderWeights.need(slots * 4 + 4);
}

void PlanState::clearCounts() {
  std::fill(localExpertRows.begin(), localExpertRows.end(), 0);
  if (view.header == nullptr) return;
  auto* header = const_cast<plan::ArenaHeader*>(view.header);
  header->copies = header->entries = header->dropped = header->receiveRows = 0;
  std::fill_n(const_cast<std::int32_t*>(view.localExpertRows), header->localExperts, 0);
  std::fill_n(const_cast<std::int32_t*>(view.localExpertStart), header->localExperts + 1, 0);
}

plan::RoutingMap PlanState::kept() const {
  plan::RoutingMap map = request.map;
  map.ids = ids.data();
  map.weights = request.map.weights == nullptr ? nullptr : weights.as<float>();
  return map;
}

void PlanState::packRankOrder() {
  const auto tokens = static_cast<std::size_t>(request.map.tokens);
  const auto topk = static_cast<std::size_t>(request.map.topk);
  std::byte* rows = extraRows.need(tokens * topk * 8 + 1);
  const auto idBytes = static_cast<std::size_t>(request.map.idBytes);
  for (std::size_t t = 0; t < tokens; ++t) {
    std::byte* row = rows + t * topk * 8;
    for (std::size_t k = 0; k < topk; ++k) {
      std::int64_t id = 0;
      std::memcpy(&id, ids.data() + (t * topk + k) * idBytes, idBytes);
      const std::int32_t global =
          idBytes == 4 ? static_cast<std::int32_t>(id & 0xffffffff) : static_cast<std::int32_t>(id);
      const float weight = request.map.weights == nullptr ? 1.0f : weights.as<float>()[t * topk + k];
      std::memcpy(row + k * 4, &global, 4);
      std::memcpy(row + (topk + k) * 4, &weight, 4);
    }
  }
}

void PlanState::prepareWindows() {
  const std::size_t rows = rowsToHold();
  const int localExperts = view.header->localExperts;
  holdRows(rows);
  if (tickets.data() != nullptr) {
    std::fill_n(tickets.as<Ticket>(), rows, Ticket{-1, -1, -1, 0.0f, plan::kNoRow});
  }
  if (counters.data() != nullptr) {
    auto* board = counters.as<CounterBoard>();
    board->localExperts = static_cast<std::uint64_t>(localExperts);
    std::fill_n(board->counters(), localExperts, 0);
    std::copy_n(view.localExpertStart, localExperts + 1, board->starts());
  }
  localExpertRows.assign(view.localExpertRows, view.localExpertRows + localExperts);
}

}  // namespace fusco::engine
