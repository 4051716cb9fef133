// What a communicator moved and where its time went. Read by any thread, written under the engine's lock.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/clock.h"

namespace fusco::engine {

struct Statistics {
  std::atomic<std::uint64_t> operations{0}, rowsPlaced{0}, bytesPlaced{0}, bytesRead{0}, wireBytes{0}, wireSlices{0},
      stagedBytes{0}, processVmBytes{0}, planNs{0}, extractNs{0}, wireNs{0}, placeNs{0}, sumNs{0}, waitNs{0};
};

// Adds the time of a scope to one of the above.
class StageTimer {
 public:
  explicit StageTimer(std::atomic<std::uint64_t>& total) : total_(total), start_(nowNs()) {}
  ~StageTimer() { total_.fetch_add(static_cast<std::uint64_t>(nowNs() - start_), std::memory_order_relaxed); }
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

 private:
  std::atomic<std::uint64_t>& total_;
  std::int64_t start_;
};

}  // namespace fusco::engine
