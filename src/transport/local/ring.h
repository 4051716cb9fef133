// A posted link within one machine: a ring of slots in memory that sender and receiver map, one per direction and
// channel. The sender makes it when it first has something to send. Two counters that only grow; what is not yet taken
// up by the difference is credit.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "transport/local/memory.h"
#include "transport/transport.h"

namespace fusco::transport {

struct RingCounters {
  alignas(64) std::atomic<std::uint64_t> posted;    // by the sender
  alignas(64) std::atomic<std::uint64_t> released;  // by the receiver
};
static_assert(sizeof(RingCounters) == 128);

class RingMemory {
 public:
  static std::size_t bytesFor(int slots, std::size_t slotBytes) {
    return sizeof(RingCounters) + static_cast<std::size_t>(slots) * slotBytes;
  }
  RingMemory(SharedMemory memory, int slots, std::size_t slotBytes)
      : memory_(std::move(memory)), slots_(slots), slotBytes_(slotBytes) {}

  RingCounters& counters() const { return *reinterpret_cast<RingCounters*>(memory_.data()); }
  std::byte* slot(std::uint64_t sequence) const {
    return memory_.data() + sizeof(RingCounters) + sequence % static_cast<std::uint64_t>(slots_) * slotBytes_;
  }
  int slots() const { return slots_; }
  std::size_t bytes() const { return memory_.bytes(); }
  Segment memory() const { return {memory_.data(), memory_.bytes()}; }

 private:
  SharedMemory memory_;
  int slots_;
  std::size_t slotBytes_;
};

class RingLink : public PostedLink {
 public:
  struct Ways {
    std::function<std::shared_ptr<RingMemory>()> open;     // makes the ring to the peer and tells the peer of it
    std::function<std::shared_ptr<RingMemory>()> arrived;  // the ring from the peer, or null as long as there is none
    std::function<void()> ringPeer;
  };
  RingLink(std::size_t slotBytes, Ways ways) : slotBytes_(slotBytes), ways_(std::move(ways)) {}

  std::size_t slotBytes() const override { return slotBytes_; }
  std::byte* acquire() override;
  void post(std::size_t bytes) override;
  const std::byte* peek() override;
  void release() override;
  // Shared memory outlives the sender, but a slice counts as gone only when the receiver has given its slot back.
  bool drained() override;
  std::vector<Segment> slotMemory() const override;
  // Of the ring that this rank has made.
  std::size_t bytesMade() const { return madeBytes_.load(std::memory_order_relaxed); }

 private:
  const std::size_t slotBytes_;
  const Ways ways_;
  std::shared_ptr<RingMemory> out_, in_;
  std::uint64_t posted_ = 0;
  std::uint64_t released_ = 0;
  bool acquired_ = false;
  std::atomic<std::size_t> madeBytes_ = 0;
};

}  // namespace fusco::transport
