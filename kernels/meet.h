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
