// docs/concepts.md, "memory": the formula. A test compares it with what a communicator says that it holds.
#include <fmt/format.h>

#include <algorithm>

#include "base/status.h"
#include "engine/control.h"
#include "engine/device/beside.h"
#include "engine/device/domain.h"
#include "engine/engine.h"
#include "engine/plan_state.h"
#include "transport/local/rank_memory.h"

namespace fusco::engine {

namespace {

// Sums of a few such products still fit.
std::size_t product(const char* what, std::size_t count, std::size_t bytes) {
  if (count > 0 && bytes > (std::size_t{1} << 60) / count)
    fail(Code::invalidArgument, fmt::format("{}: {} x {} overflow", what, count, bytes));
  return count * bytes;
}

int expertsHere(const WorkspaceShape& s) {
  return static_cast<int>((static_cast<std::int64_t>(s.request.map.experts) + s.ranks - 1) / s.ranks);
}

// Rows that arrive, where their number is known beforehand; else 0.
std::size_t rowsBeside(const WorkspaceShape& s) {
  const plan::Options& options = s.request.options;
  const auto capacity = static_cast<std::size_t>(options.capacityRows);
  if (options.layout != plan::Layout::slotted) return capacity;
  const std::size_t blocks = static_cast<std::size_t>(expertsHere(s)) * static_cast<std::size_t>(s.ranks);
  const std::size_t places = product("slotted rows", blocks, static_cast<std::size_t>(options.maxTokens));
  if (places > INT32_MAX) {
    fail(Code::invalidArgument, fmt::format("slotted output of {} x {} rows is more than 2^31 - 1; lower maxTokens",
                                            blocks, options.maxTokens));
  }
  return capacity == 0 ? places : std::min(capacity, places);
}

// Ranks of one node on GPUs: in GPU memory and pinned, what DevicePlan, DeviceBeside and DeviceDomain take.
std::size_t bytesOnGpu(const WorkspaceShape& s) {
  const auto rounded = [](std::size_t n) { return (n + 255) / 256 * 256; };
  const plan::Options& options = s.request.options;
  const plan::RoutingMap& map = s.request.map;
  const bool rankOrder = options.layout == plan::Layout::rankOrder;
  const int localExperts = expertsHere(s);
  const auto experts = static_cast<std::size_t>(map.experts);
  const std::size_t slots = static_cast<std::size_t>(map.tokens) * static_cast<std::size_t>(map.topk);
  const plan::ArenaOffsets arena =
      plan::arenaOffsets(map.tokens, map.topk, map.experts, s.ranks, 1, localExperts, 1, options.dedup);
  // What is brought once: the frame, the experts' homes, the flow.
  const std::size_t frame =
      rounded(sizeof(plan::ArenaHeader)) + rounded(experts * sizeof(std::uint32_t)) + rounded(sizeof(plan::Flow));
  std::size_t plan = rounded(arena.end) + frame + rounded(exec::cuda::planScratchBytes(map.experts, s.ranks, 1)) +
                     rounded(2 * sizeof(std::int32_t) * (rankOrder ? static_cast<std::size_t>(s.ranks) : experts));
  if (rankOrder) plan += rounded(slots * static_cast<std::size_t>(map.idBytes));
  if (rankOrder && map.weights != nullptr) plan += rounded(slots * sizeof(float));
  const std::size_t pinned = rounded(arena.copies) + rounded(sizeof(kernels::PlanStatus)) + frame;
  std::size_t beside = 0;
  if (DeviceBeside::wanted(s.request)) {
    BesideShape shape;
    shape.localExperts = localExperts;
    shape.rows = rowsBeside(s);
    shape.topk = static_cast<std::size_t>(map.topk);
    shape.rankOrder = rankOrder;
    beside = rounded(shape.bytes()) + rounded(1);
  }
  return plan + pinned + beside + DeviceDomain::bytesOf(s.ranks) + transport::kRankHeaderBytes +
         (controlBytes(s.ranks) + 4095) / 4096 * 4096;
}

}  // namespace

std::size_t workspaceBytes(const WorkspaceShape& s) {
  if (s.onGpu) return bytesOnGpu(s);
  const auto page = [](std::size_t n) { return (n + 4095) & ~std::size_t{4095}; };
  const auto line = [](std::size_t n) { return (n + 63) & ~std::size_t{63}; };
  const plan::Options& options = s.request.options;
  const plan::RoutingMap& map = s.request.map;
  const bool slotted = options.layout == plan::Layout::slotted;
  const bool rankOrder = options.layout == plan::Layout::rankOrder;
  const auto keys = static_cast<std::size_t>(std::max(map.experts, s.ranks));
  const auto topk = static_cast<std::size_t>(map.topk);
  const std::size_t slots = static_cast<std::size_t>(map.tokens) * topk;
  const int localExperts = expertsHere(s);

  // The plan.
  const std::size_t arena =
      plan::arenaOffsets(map.tokens, map.topk, map.experts, s.ranks, s.nodes, localExperts, s.nodes, options.dedup).end;
  const std::size_t routing =
      line(slots * static_cast<std::size_t>(map.idBytes) + 1) + (map.weights == nullptr ? 0 : line(slots * 4 + 1));
  // Beside each row, where the number of rows is known beforehand.
  const std::size_t rows = rowsBeside(s);
  std::size_t beside = 0;
  if (rows > 0 && (s.request.tickets || slotted || rankOrder)) beside += page(rows * sizeof(Ticket) + 64);
  if ((s.request.counters || slotted) && !rankOrder) beside += page(CounterBoard::bytes(localExperts));
  if (rankOrder) beside += line(slots * 8 + 1);
  if (rankOrder && rows > 0) beside += page(rows * topk * 8 + 64) + 2 * line(rows * topk * 4 + 4);

  // The communicator.
  const std::size_t counts = kOperationSlots * page(std::max<std::size_t>(4096, keys * 12));
  const std::size_t control = transport::kRankHeaderBytes + page(controlBytes(s.ranks));
  // One ring out for each other node and operation slot: to the forwarder there, and back to who sent to this rank.
  const std::size_t ring = page(static_cast<std::size_t>(s.sliceBytes) * static_cast<std::size_t>(s.slices) + 4096);
  const std::size_t links =
      product("links to other nodes", static_cast<std::size_t>(s.nodes - 1) * kOperationSlots, ring);
  // Private rows pass through a window in each direction, for each operation slot.
  const auto held = static_cast<std::size_t>(s.privateRows);
  const std::size_t staging =
      held == 0 ? 0 : 2 * kOperationSlots * page(product("private rows", held, s.rowBytes) + 64) + page(held * 4 + 4);
  return arena + routing + beside + counts + control + links + staging;
}

}  // namespace fusco::engine
