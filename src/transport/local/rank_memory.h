// What a rank shows to the other ranks of its host: doorbell, alarm, a mailbox for gathers, and behind it the control
// memory of the engine. The bytes are shared between processes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "transport/local/memory.h"

namespace fusco::transport {

enum class Presence : std::uint32_t { here = 0, left = 1, exited = 2 };

struct RankHeader {
  static constexpr std::size_t kMailboxBytes = 8192;
  static constexpr std::size_t kReasonBytes = 512;

  // Doorbell: changed by everyone, read by the owner while it waits.
  alignas(64) std::atomic<std::uint32_t> bell;
  std::atomic<std::uint32_t> sleepers;

  // Not zero: some rank has left or aborted; look closer.
  alignas(64) std::atomic<std::uint32_t> alarm;
  // Counts the messages that others have sent to this rank's sockets or inbox.
  std::atomic<std::uint32_t> mail;

  alignas(64) std::atomic<std::uint32_t> presence;  // Presence; written by the owner only
  std::atomic<std::uint32_t> aborted;               // 0, 1 while the reason is being written, 2
  char reason[kReasonBytes];

  // Not zero: this rank may be touching memory of others.
  alignas(64) std::atomic<std::uint32_t> moving;

  // Gather: round r lies in mailbox r % 2 once `gathered` is at least r.
  alignas(64) std::atomic<std::uint64_t> gathered;
  std::uint64_t gatherBytes[2];
  alignas(64) std::byte mailbox[2][kMailboxBytes];

  // Changes the doorbell and wakes who sleeps on it.
  void ring();
  // Returns when the bell differs from `seen`, or after `microseconds`; spins for at most `spinMicroseconds` of them.
  void sleep(std::uint32_t seen, std::int64_t microseconds, std::int64_t spinMicroseconds);
  void raiseAlarm();
  // The first reason stays.
  void abort(const std::string& why);
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(sizeof(std::atomic<std::uint32_t>) == 4);

// Whole pages, so that ranks of other nodes map the header alone.
constexpr std::size_t kRankHeaderBytes = (sizeof(RankHeader) + 4095) / 4096 * 4096;

class RankMemory {
 public:
  // Own memory.
  explicit RankMemory(std::size_t controlBytes);
  // A peer's: the whole, or with controlBytes 0 its header.
  RankMemory(int descriptor, std::size_t controlBytes);

  RankHeader& header() const { return *reinterpret_cast<RankHeader*>(memory_.data()); }
  std::byte* control() const { return memory_.data() + kRankHeaderBytes; }
  int descriptor() const { return memory_.descriptor(); }
  std::size_t bytes() const { return memory_.bytes(); }

 private:
  SharedMemory memory_;
};

}  // namespace fusco::transport
