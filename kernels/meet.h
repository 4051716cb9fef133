// How GPUs of a node whose ranks are in several processes wait for each other: as part of their streams, without the
// host. What a GPU has launched before a meeting has ended, and can be seen, on all of them before anything starts
// that is launched behind it. Conventions as in kernels/launch.h.
//
// Every GPU has a word of every other one in its memory, and a count of its own. Meetings of the same words come one
// after the other, and on every GPU equally many of them; so a captured meeting can be replayed.
#pragma once

#include <cstdint>

#include "kernels/launch.h"

namespace fusco::kernels {

struct MeetArgs {
  std::uint32_t* count;                  // meetings of this GPU so far
  const std::uint32_t* mine;             // [kMaxNodeRanks] what the others say, in this GPU's memory
  std::uint32_t* theirs[kMaxNodeRanks];  // where this GPU says it to each of them; null: nobody
  ArrivalWait wait;
};
int launchMeet(const MeetArgs& args, void* stream);

}  // namespace fusco::kernels
