// Planning on the GPU, as the host calls it: from routing maps in GPU memory to plan arenas, byte for byte what
// plan::makePlan writes. Plain C++; streams are cudaStream_t as void*, results cudaError_t as int.
//
//   launchPlanCount   each rank's rows of each key, published where the other ranks can read them
//   (a meeting)       where ranks on other GPUs or in other processes have to count first: the caller's
//   launchPlanLay     row bases from everybody's counts, then the arenas
//   launchPlan        both, without a meeting; in one kernel where there is little to plan
//
// No kernel waits for another rank, and none reads a count from its arguments: launch shapes depend on capacities, so
// that a captured launch can be replayed with new routing maps and new numbers of tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/layout.h"

namespace fusco::kernels {

inline constexpr int kMaxPlanRanks = 16;  // of one launch, with those that it only counts
inline constexpr int kMaxPlanTopk = 32;

// What went wrong in the last planning of a rank; written each time. The arena is valid in any case: an id out of range
// counts as -1; with tooManyTokens the rank sends nothing, with tooManyRows no rank sends or receives anything.
struct PlanStatus {
  enum Code : std::uint32_t {
    ok = 0,
    badId = 1,           // token, slot and id are the first of this rank that are out of range
    badIdElsewhere = 2,  // the same on `rank`, the lowest one, if counts of all ranks are read here
    tooManyRows = 3,     // some rank would receive more than 2^31 - 1
    tooManyTokens = 4,   // the number of tokens in device memory is negative or beyond the arena's
  };
  std::uint32_t code;
  std::int32_t rank;
  std::int64_t token;
  std::int32_t slot;
  std::int32_t reserved;
  std::int64_t id;
  std::int64_t wantedRows;  // rows that would arrive here if there were no capacity
};

// Head of the memory in which a rank publishes its counts; int32 [room][2] follow. Zeroed once by its owner, who then
// leaves it alone: launches alternate between the two numbers of a key, all ranks in step, and each clears those of the
// next.
struct PlanCounts {
  std::uint64_t begun;    // number of the launch whose counts are complete after launchPlanCount
  std::uint64_t ended;    // number of the next launch
  std::uint32_t bad[2];   // 0, or ~(token * topk + slot) of the first id out of range
  std::uint32_t limited;  // in a launch that may drop rows: whether this rank's entries do not all fit
  std::uint32_t reserved[9];
};
static_assert(sizeof(PlanCounts) == 64);

// What ranks of one launch have in common, and the ranks.
struct PlanArgs {
  struct Rank {
    const void* ids;                 // [tokens, topk]
    const float* weights;            // the same, or null
    std::int64_t tokens;             // that the arena was shaped for
    const std::int64_t* tokensUsed;  // in device memory, at most `tokens`; null: all
    void* arena;                     // 64-byte aligned
    // From plan::makeFrame, in device memory.
    const plan::ArenaHeader* frame;
    const std::uint32_t* homes;
    const plan::Flow* flows;
    int rank, node, localExperts, flowCount;  // as in the frame's header
    PlanCounts* counts;                       // planCountsBytes(), this rank's own
    void* scratch;                            // planScratchBytes(), 16-byte aligned, used within one planning only
    PlanStatus* status;
    std::int32_t* exchanged;  // int32 [2][keys]: gets rows of each key of lower ranks, and of all; or null
    // Rows of each key that lower ranks send, and all: brought by somebody else (several nodes), or null.
    const std::int32_t* before;
    const std::int32_t* total;
  };
  int idBytes, topk, experts, ranks, nodes;
  plan::Layout layout;
  plan::Dedup dedup;
  int alignment;
  std::int64_t maxTokens;     // slotted: most tokens of any rank
  std::int64_t capacityRows;  // 0: exact
  int countsRoom;             // keys that everybody's counts have room for
  // [ranks], in device memory: counts of all ranks, in their order. Null where `before` and `total` are given, and in
  // the slotted layout.
  const PlanCounts* const* allCounts;
  int blocks;  // blocks of 512 threads that a launch may have at a time over all its ranks; 0: two for each SM
  int rankCount;
  Rank rank[kMaxPlanRanks];
  // launchPlan of a small routing map: the ranks that this GPU plans; the others' maps are counted only. 0: all.
  int firstHere, ranksHere;
  // Others' maps that a meeting has brought (kernels/meet.h): all of their tokens count, and where this number, in
  // device memory, is odd, they lie so many bytes further. Null: they lie where `ids` says.
  const std::uint32_t* turn;
  std::size_t turnBytes;
};

// Keys that counts have room for: experts, and ranks in rank order.
std::size_t planCountsBytes(int room);
std::size_t planScratchBytes(int experts, int ranks, int nodes);
// Whether the current device can plan this shape; else the host does.
bool planFits(const PlanArgs& args);

// Blocks that each rank of a launch with these arguments may have; 0 if there is no GPU to ask. Ranks that are counted
// in one launch and laid in launches of their own get as many in those (PlanArgs::blocks): both cut routing maps alike.
int planBlocksOfRank(const PlanArgs& args);
int launchPlanCount(const PlanArgs& args, void* stream);
int launchPlanLay(const PlanArgs& args, void* stream);
// Whether launchPlan is one kernel of a block for each rank: then GPUs need not meet in it.
bool planIsSmall(const PlanArgs& args);
// All ranks of the communicator are in this launch, in their order, or the layout is slotted.
int launchPlan(const PlanArgs& args, void* stream);

}  // namespace fusco::kernels
