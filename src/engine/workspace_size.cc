// docs/concepts.md, "memory": the formula. A test compares it with what a communicator says that it holds.
#include "engine/control.h"
#include "engine/engine.h"

namespace fusco::engine {

std::size_t workspaceBytes(std::int64_t sliceBytes, int slices, std::int64_t tokens, int topk, int experts, int idBytes, int ranks, int nodes,
                           std::size_t rowBytes, std::int64_t privateRows) {
  const auto page = [](std::size_t n) { return (n + 4095) & ~std::size_t{4095}; };
  const std::size_t keys = static_cast<std::size_t>(std::max(experts, ranks));
  const int localExperts = (experts + ranks - 1) / ranks;
  const std::size_t arena = plan::arenaOffsets(tokens, topk, experts, ranks, nodes, localExperts, nodes, plan::Dedup::node).end;
  const std::size_t routing = static_cast<std::size_t>(tokens) * static_cast<std::size_t>(topk) * (static_cast<std::size_t>(idBytes) + 4);
  const std::size_t counts = kOperationSlots * page(std::max<std::size_t>(4096, keys * 12));
  const std::size_t control = page(controlBytes(ranks)) + page(4096);
  // Streams out and in: one forwarder in every other node, as many sources on average; planning talks over the same links.
  const std::size_t ring = page(static_cast<std::size_t>(sliceBytes) * static_cast<std::size_t>(slices) + 4096);
  const std::size_t links = static_cast<std::size_t>(nodes - 1) * 2 * kOperationSlots * ring;
  // Private rows pass through a window in each direction, for each operation slot.
  const std::size_t staging = privateRows == 0 ? 0 : 2 * kOperationSlots * page(static_cast<std::size_t>(privateRows) * rowBytes) +
                                                         page(static_cast<std::size_t>(privateRows) * 4);
  return arena + routing + counts + control + links + staging;
}

}  // namespace fusco::engine
