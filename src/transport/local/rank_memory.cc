#include "transport/local/rank_memory.h"

#include <sched.h>

#include <algorithm>
#include <cstring>

#include "base/clock.h"
#include "base/futex.h"

namespace fusco::transport {

namespace {

// Of a spin, the part that keeps the core; after that every look lets others run first.
constexpr std::int64_t kPauseNs = 2000;

inline void pauseCpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// The ringer changes the bell, then reads the sleepers; the sleeper counts itself, then reads the bell. All four are
// sequentially consistent, so at least one of the two sees the other; the kernel compares the bell once more before it
// lets the sleeper sleep. So no wake-up is lost.
void RankHeader::ring() {
  bell.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) != 0) wakeWord(&bell);
}

void RankHeader::sleep(std::uint32_t seen, std::int64_t microseconds, std::int64_t spinMicroseconds) {
  if (bell.load(std::memory_order_acquire) != seen || microseconds <= 0) return;
  const std::int64_t begin = nowNs();
  const std::int64_t spin = std::min(spinMicroseconds, microseconds) * 1000;
  for (std::int64_t spent = 0; spent <= spin; spent = nowNs() - begin) {
    if (spent < spin && spent < kPauseNs) {
      for (int i = 0; i < 16; ++i) {
        pauseCpu();
        if (bell.load(std::memory_order_acquire) != seen) return;
      }
    } else {
      // The one that we wait for may be waiting for this core.
      ::sched_yield();
      if (bell.load(std::memory_order_acquire) != seen) return;
    }
  }
  microseconds -= std::max<std::int64_t>(0, spinMicroseconds);
  if (microseconds <= 0) return;
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  if (bell.load(std::memory_order_seq_cst) == seen) waitOnWord(&bell, seen, Deadline::afterNs(microseconds * 1000));
  sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void RankHeader::raiseAlarm() {
  alarm.fetch_add(1, std::memory_order_seq_cst);
  ring();
}

void RankHeader::abort(const std::string& why) {
  std::uint32_t none = 0;
  if (aborted.compare_exchange_strong(none, 1, std::memory_order_acq_rel)) {
    const std::size_t length = std::min(why.size(), kReasonBytes - 1);
    std::memcpy(reason, why.data(), length);
    reason[length] = 0;
    aborted.store(2, std::memory_order_release);
  }
  raiseAlarm();
}

RankMemory::RankMemory(std::size_t controlBytes)
    : memory_(SharedMemory::create("fusco-control", kRankHeaderBytes + controlBytes)) {}

RankMemory::RankMemory(int descriptor, std::size_t controlBytes)
    : memory_(SharedMemory::attach(descriptor, kRankHeaderBytes + controlBytes)) {
  memory_.populate();
}

}  // namespace fusco::transport
