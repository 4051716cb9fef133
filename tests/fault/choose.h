// Which cases a run of the suite has: a moment and a victim in each phase, chosen by the run's seed.
#pragma once

#include <string>
#include <vector>

#include "fault/world.h"

namespace fusco::fault {

inline constexpr Layout kNode{"1 node x 4 ranks", 1, 4}, kTwo{"2 nodes x 2 ranks", 2, 2},
    kFour{"4 nodes x 2 ranks", 4, 2};
// Processes that run side by side, most of them asleep.
inline constexpr int kRanksAtOnce = 32;

extern const std::vector<std::string> kPhases;

// FUSCO_TEST_SEED, else 1.
std::uint64_t seedOfRun();

std::vector<FaultCase> eachPhase(Fault fault, const Layout& layout, std::int64_t limitMs,
                                 const std::vector<std::string>& phases = kPhases);

// In the phase bootstrap: strikes a rank of another machine than the meeting place's, when it has come and somebody
// else is still awaited.
void atAnotherMachine(FaultCase& one);

}  // namespace fusco::fault
