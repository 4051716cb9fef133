// The plan as bytes: one pointer-free arena that the host planner and the CUDA planner fill alike, byte for byte, and
// that host code, kernels and links read. Plain C++ without library types, so that kernels may include it.
//
// A plan is one rank's part of a shuffle (the paper's two levels of segment descriptors, arXiv 2512.22036):
//   destination node -> flows (one forwarder each) -> copies (one token's row, sent once) -> entries (its final rows).
// Level 1 is the list of copies of a flow; level 2 is the list of entries of a copy. The own node is one of the nodes:
// its copies are not sent, only placed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusco::plan {

inline constexpr std::uint32_t kArenaMagic = 0x46504c4eu;  // "FPLN"
inline constexpr std::uint32_t kArenaVersion = 1;
inline constexpr std::uint32_t kNoRow = 0xffffffffu;

// Set in Entry::slot when an earlier entry of the same copy goes to the same rank: a placer may write only the entries
// without it and leave the duplicates to the receiver ("expanded where they land").
inline constexpr std::uint16_t kDuplicate = 0x8000;
inline constexpr std::uint16_t kSlotMask = 0x7fff;

enum class Layout : std::uint32_t {
  expertOrder = 0,  // by local expert, then source rank, then token, then slot
  rankOrder = 1,    // one row per token and rank, by source rank, then token
  slotted = 2,  // row = (local expert * ranks + source rank) * maxTokens + n, no count round. n reaches maxTokens only
                // where tokens name an expert twice: what does not fit its block is over capacity (dropped, counted)
};

enum class Dedup : std::uint32_t {
  none = 0,  // a copy for each routed slot
  node = 1,  // a copy for each destination node, all its entries written by whoever places it
  full = 2,  // as node, and duplicates on one rank are expanded there
};

// One place of a row: local index of the rank in its node, slot of the token's top-k, row in that rank's output.
struct Entry {
  std::uint16_t rank;
  std::uint16_t slot;  // may carry kDuplicate
  std::uint32_t row;
};
static_assert(sizeof(Entry) == 8);

// One row on its way to one node. Its entries are [firstEntry, next copy's firstEntry).
struct Copy {
  std::uint32_t token;
  std::uint32_t firstEntry;
};
static_assert(sizeof(Copy) == 8);

// The copies [copyBegin, copyEnd) go to `node` by way of `forwarder` (a global rank; for the own node the rank itself)
// and leave by lane `lane` of the source's node.
struct Flow {
  std::int32_t node;
  std::int32_t forwarder;
  std::int32_t lane;
  std::uint32_t copyBegin;
  std::uint32_t copyEnd;
};
static_assert(sizeof(Flow) == 20);

// Fixed head of the arena. Everything that shapes it (capacities) comes first; counts that depend on the routing
// follow.
struct ArenaHeader {
  std::uint32_t magic;
  std::uint32_t version;
  std::uint64_t bytes;  // of the whole arena
  // shape
  std::int64_t tokens;  // capacity in rows of the routing map (in exact mode the number of tokens)
  std::int32_t topk;
  std::int32_t experts;
  std::int32_t ranks;
  std::int32_t nodes;
  std::int32_t rank;
  std::int32_t node;
  std::int32_t localExperts;  // experts of this rank
  std::int32_t flows;         // number of flows, known from the topology alone
  Layout layout;
  Dedup dedup;
  std::int32_t alignment;  // each expert's rows start at a multiple of it (>= 1)
  std::int32_t reserved;
  std::int64_t maxTokens;     // slotted: most tokens of any rank; else 0
  std::int64_t capacityRows;  // rows that this rank's output can hold; 0: exact, no limit. The same on all ranks.
  // counts
  std::int64_t tokensUsed;  // T of this step (<= tokens)
  std::int64_t copies;
  std::int64_t entries;
  std::int64_t dropped;      // entries beyond capacity, by policy
  std::int64_t receiveRows;  // rows of this rank's output, alignment gaps included
};
static_assert(sizeof(ArenaHeader) % 8 == 0);

// Where each section begins, in bytes from the arena's start. The one place where offsets are computed.
struct ArenaOffsets {
  std::uint64_t rowsOfExpert;  // int32 [experts]: this rank's rows to each expert (rankOrder: rows to each rank, in the
                               // first `ranks`); before any drop
  std::uint64_t rowBase;  // int32 [max(experts, ranks)]: final row of this rank's first row for each expert (rankOrder:
                          // each rank)
  std::uint64_t localExpertRows;  // int32 [localExperts]: rows that this rank receives for each of its experts (0 in
                                  // rankOrder; slotted: the size of its blocks); what capacity cuts off is not counted
  std::uint64_t localExpertStart;  // int32 [localExperts + 1]: first row of each, aligned, at most capacityRows; the
                                   // last is receiveRows
  std::uint64_t flows;    // Flow [flows]
  std::uint64_t copies;   // Copy [maxCopies + 1], sorted by flow, then token
  std::uint64_t entries;  // Entry [tokens * topk], in the order of copies, then slot
  std::uint64_t weights;  // float [tokens * topk], beside entries (1 where no weights were given)
  std::uint64_t end;
};

constexpr std::uint64_t arenaAlign(std::uint64_t n) { return (n + 63) & ~std::uint64_t{63}; }

// Copies that a rank can have at most.
constexpr std::uint64_t maxCopies(std::int64_t tokens, int topk, int nodes, Dedup dedup) {
  const std::uint64_t perToken = dedup == Dedup::none || topk < nodes ? topk : nodes;
  return static_cast<std::uint64_t>(tokens) * perToken;
}

constexpr ArenaOffsets arenaOffsets(std::int64_t tokens, int topk, int experts, int ranks, int nodes, int localExperts,
                                    int flows, Dedup dedup) {
  ArenaOffsets o{};
  const std::uint64_t keys = experts > ranks ? experts : ranks;
  const std::uint64_t slots = static_cast<std::uint64_t>(tokens) * topk;
  o.rowsOfExpert = arenaAlign(sizeof(ArenaHeader));
  o.rowBase = o.rowsOfExpert + arenaAlign(4 * keys);
  o.localExpertRows = o.rowBase + arenaAlign(4 * keys);
  o.localExpertStart = o.localExpertRows + arenaAlign(4ull * localExperts);
  o.flows = o.localExpertStart + arenaAlign(4ull * (localExperts + 1));
  o.copies = o.flows + arenaAlign(sizeof(Flow) * static_cast<std::uint64_t>(flows));
  o.entries = o.copies + arenaAlign(sizeof(Copy) * (maxCopies(tokens, topk, nodes, dedup) + 1));
  o.weights = o.entries + arenaAlign(sizeof(Entry) * slots);
  o.end = o.weights + arenaAlign(4 * slots);
  return o;
}

constexpr ArenaOffsets arenaOffsets(const ArenaHeader& h) {
  return arenaOffsets(h.tokens, h.topk, h.experts, h.ranks, h.nodes, h.localExperts, h.flows, h.dedup);
}

}  // namespace fusco::plan
