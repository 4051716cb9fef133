// Sleeping on a 32-bit word that threads and processes share.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

#include "base/clock.h"

namespace fusco {

static_assert(sizeof(std::atomic<std::uint32_t>) == 4 && std::atomic<std::uint32_t>::is_always_lock_free);

// Sleeps while the word still holds `expected`. True: it holds something else, or somebody woke us (look again); false:
// the deadline has passed. The word may lie in memory shared between processes. Spurious returns are possible.
bool waitOnWord(const std::atomic<std::uint32_t>* word, std::uint32_t expected, Deadline deadline) noexcept;

// Wakes up to `count` sleepers, in any process. Returns how many.
int wakeWord(const std::atomic<std::uint32_t>* word, int count = std::numeric_limits<int>::max()) noexcept;

}  // namespace fusco
