// Planning in three steps (docs/design.md): analyse (pure), exchange (the engine's, not here), plan (pure).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "plan/layout.h"
#include "plan/topology.h"

namespace fusco::plan {

// A routing map in memory: ids [tokens, topk], -1 for none, row-major; int32 or int64. weights [tokens, topk] or null
// (all 1). Nothing is owned.
struct RoutingMap {
  const void* ids = nullptr;
  int idBytes = 8;  // 4 or 8
  const float* weights = nullptr;
  std::int64_t tokens = 0;
  int topk = 0;
  int experts = 0;
};

struct Options {
  Layout layout = Layout::expertOrder;
  Dedup dedup = Dedup::node;
  int alignment = 1;
  std::int64_t maxTokens = 0;     // slotted only
  std::int64_t capacityRows = 0;  // 0: exact
};

// Pure counts of one rank's routing map. `rowsOfKey` is what the exchange scans over source ranks: rows for each
// expert, or in rankOrder for each rank (a token counts once a rank).
struct Analysis {
  std::vector<std::int32_t> rowsOfKey;      // [keys]
  std::vector<std::int32_t> copiesOfNode;   // [nodes]
  std::vector<std::int32_t> entriesOfNode;  // [nodes]
};

// Number of keys that the exchange scans: experts, in rankOrder ranks.
int keyCount(const RoutingMap& map, const Topology& topology, const Options& options);

// What the exchange brought. before[key]: rows of all lower source ranks; total[key]: rows of all ranks. In the slotted
// layout both may be empty (there is no count round).
struct Exchanged {
  std::vector<std::int32_t> before;
  std::vector<std::int32_t> total;
};

// Throws Error(invalidArgument) that names token, slot and id when an id is below -1 or >= experts, or when an option
// does not fit. The result may be kept and used again as scratch (`reuse`) to save allocations.
Analysis analyse(const RoutingMap& map, const Topology& topology, int rank, const Options& options);
void analyse(const RoutingMap& map, const Topology& topology, int rank, const Options& options, Analysis& reuse);

// Bytes that an arena needs for this shape.
std::uint64_t arenaBytes(const RoutingMap& map, const Topology& topology, int rank, const Options& options);

// Fills the arena (64-byte aligned, arenaBytes() bytes). Deterministic: same input, same bytes (padding zeroed).
// Rows at or beyond capacityRows are left out and counted in `dropped`.
void makePlan(const RoutingMap& map, const Topology& topology, int rank, const Options& options,
              const Analysis& analysis, const Exchanged& exchanged, void* arena);

// Read access to an arena.
struct View {
  const ArenaHeader* header;
  const std::int32_t* rowsOfExpert;
  const std::int32_t* rowBase;
  const std::int32_t* localExpertRows;
  const std::int32_t* localExpertStart;
  const Flow* flows;
  const Copy* copies;
  const Entry* entries;
  const float* weights;
};
View view(const void* arena);

}  // namespace fusco::plan
