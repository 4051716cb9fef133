#include "transport/local/ring.h"

#include <string>

#include "base/status.h"

namespace fusco::transport {

std::byte* RingLink::acquire() {
  if (!out_) {
    out_ = ways_.open();
    madeBytes_.store(out_->bytes(), std::memory_order_relaxed);
  }
  if (!acquired_) {
    const std::uint64_t released = out_->counters().released.load(std::memory_order_acquire);
    if (posted_ - released >= static_cast<std::uint64_t>(out_->slots())) return nullptr;
    acquired_ = true;
  }
  return out_->slot(posted_);
}

void RingLink::post(std::size_t bytes) {
  if (!acquired_) fail(Code::internalError, "a slice was posted without a slot");
  if (bytes > slotBytes_) {
    fail(Code::internalError,
         "a slice of " + std::to_string(bytes) + " bytes was written to a slot of " + std::to_string(slotBytes_));
  }
  acquired_ = false;
  out_->counters().posted.store(++posted_, std::memory_order_release);
  ways_.ringPeer();
}

const std::byte* RingLink::peek() {
  if (!in_) {
    in_ = ways_.arrived();
    if (!in_) return nullptr;
  }
  if (in_->counters().posted.load(std::memory_order_acquire) == released_) return nullptr;
  return in_->slot(released_);
}

void RingLink::release() {
  if (peek() == nullptr) fail(Code::internalError, "a slice was released that has not arrived");
  in_->counters().released.store(++released_, std::memory_order_release);
  ways_.ringPeer();
}

std::vector<Segment> RingLink::slotMemory() const {
  std::vector<Segment> memory;
  for (const auto& ring : {out_, in_})
    if (ring) memory.push_back(ring->memory());
  return memory;
}

bool RingLink::drained() { return !out_ || out_->counters().released.load(std::memory_order_acquire) == posted_; }

}  // namespace fusco::transport
