// How GPUs of a node whose ranks are in several processes wait for each other: as part of their streams, without the
// host. Conventions as in kernels/launch.h.
#pragma once

#include <cstdint>

#include "kernels/launch.h"

namespace fusco::kernels {

// All of them: what a GPU has launched before a meeting has ended, and can be seen, on all of them before anything
// starts that is launched behind it. Every GPU has a word of every other one in its memory, and a count of its own.
// Meetings of the same words come one after the other, and on every GPU equally many of them; so a captured meeting can
// be replayed.
struct MeetArgs {
  std::uint32_t* count;                  // meetings of this GPU so far
  const std::uint32_t* mine;             // [kMaxNodeRanks] what the others say, in this GPU's memory
  std::uint32_t* theirs[kMaxNodeRanks];  // where this GPU says it to each of them; null: nobody
  ArrivalWait wait;
};
int launchMeet(const MeetArgs& args, void* stream);

// A meeting that brings small routing maps along: every GPU writes the ids of its ranks to memory of the others, -1 for
// tokens that are not used, and behind it reads those of all ranks in its own. There are two places for each, and
// meetings take turns: who reads what one has brought is done before it comes to another one, which all go through before
// the next but one. So nobody has to wait behind the reading.
inline constexpr std::size_t kMapIds = 1024;  // of a rank
inline constexpr std::size_t kMapBytes = kMapIds * sizeof(std::int64_t);
struct BringMapsArgs {
  MeetArgs meet;
  struct Map {
    const void* ids;                 // [tokens, topk], at most kMapIds
    const std::int64_t* tokensUsed;  // in device memory; null: all
    std::int64_t tokens;
    int number;  // of the rank, in `maps`
  };
  Map own[kMaxLocalRanks];
  int ownCount;
  int topk, idBytes;
  int ranks;                        // whose maps lie there
  std::byte* maps[kMaxNodeRanks];   // [2][ranks] maps of kMapBytes on each other GPU, by the meeting's count, odd or even
  int others;
};
int launchBringMaps(const BringMapsArgs& args, void* stream);

// Pair by pair: one GPU tells others how much has come to pass on its stream, others wait for as much. Both ends count
// by themselves, so that this can be captured, too.
struct TellArgs {
  std::uint32_t* told;                   // [kMaxNodeRanks] so far, of this GPU
  std::uint32_t* theirs[kMaxNodeRanks];  // this GPU's word in each other's memory
  std::uint16_t more[kMaxNodeRanks];     // by how much its count rises; 0: it is not told
};
int launchTell(const TellArgs& args, void* stream);
struct AwaitArgs {
  std::uint32_t* awaited;             // [kMaxNodeRanks] so far, of this GPU
  const std::uint32_t* mine;          // [kMaxNodeRanks] the others' words, in this GPU's memory
  std::uint16_t more[kMaxNodeRanks];  // 0: it is not waited for
  ArrivalWait wait;
};
int launchAwait(const AwaitArgs& args, void* stream);

}  // namespace fusco::kernels
