#include "engine/device/beside.h"

#include "engine/engine.h"

namespace fusco::engine {

static_assert(sizeof(Ticket) == sizeof(kernels::TicketRow) &&
              offsetof(Ticket, primary) == offsetof(kernels::TicketRow, primary));

namespace {
std::size_t rounded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
}  // namespace

BesideShape BesideShape::of(Engine& engine, const PlanRequest& request, int rank, std::size_t rows) {
  BesideShape shape;
  shape.localExperts = engine.topology().expertsOf(rank, request.map.experts);
  shape.firstExpert = engine.topology().firstExpert(rank, request.map.experts);
  shape.rows = rows;
  shape.topk = static_cast<std::size_t>(request.map.topk);
  shape.rankOrder = request.options.layout == plan::Layout::rankOrder;
  return shape;
}

std::size_t BesideShape::idsAt() const {
  const auto experts = static_cast<std::size_t>(localExperts);
  return rounded(experts * 8 + (experts + 1) * 4);
}
std::size_t BesideShape::weightsAt() const { return idsAt() + (rankOrder ? rounded(rows * topk * 4) : 0); }
std::size_t BesideShape::ticketsAt() const { return weightsAt() + (rankOrder ? rounded(rows * topk * 4) : 0); }
std::size_t BesideShape::bytes() const { return ticketsAt() + rounded(rows * sizeof(Ticket)); }

kernels::BesideRows BesideShape::at(std::byte* memory) const {
  kernels::BesideRows r{};
  r.board = {reinterpret_cast<std::uint64_t*>(memory), localExperts, firstExpert};
  r.tickets = reinterpret_cast<kernels::TicketRow*>(memory + ticketsAt());
  if (!rankOrder) return r;
  r.localIds = reinterpret_cast<std::int32_t*>(memory + idsAt());
  r.weights = reinterpret_cast<float*>(memory + weightsAt());
  return r;
}

bool DeviceBeside::wantsTickets(const PlanRequest& request) {
  return request.tickets || request.options.layout != plan::Layout::expertOrder;
}

bool DeviceBeside::wantsCounters(const PlanRequest& request) {
  const plan::Layout layout = request.options.layout;
  return layout == plan::Layout::slotted || (request.counters && layout != plan::Layout::rankOrder);
}

DeviceBeside::DeviceBeside(Engine& engine, const PlanRequest& request, std::size_t rows)
    : shape_(BesideShape::of(engine, request, engine.fabric().rank(), rows)) {
  const exec::cuda::OnDevice on(engine.device()->device());
  block_ = engine.device()->pool().take(shape_.bytes(), 1);
  exec::cuda::fillNow(block_.device, 0, shape_.idsAt());
}

}  // namespace fusco::engine
