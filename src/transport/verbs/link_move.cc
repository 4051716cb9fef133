// How a link finds out that its queue pair is of no use any more, and goes on over other ports.
#include <algorithm>

#include "base/clock.h"
#include "base/log.h"
#include "transport/verbs/link.h"

namespace fusco::transport {

namespace {

// For the peer's NIC to acknowledge. Queue pairs try for half a minute by themselves (FUSCO_IB_TIMEOUT,
// FUSCO_IB_RETRY_CNT); with the usual time-out this is after the second repetition (8.6 s).
constexpr std::int64_t kSilenceNs = 8'800'000'000;
// For the peer to answer where another queue pair is to take over.
constexpr std::int64_t kMoveNs = 8'000'000'000;
// Ports that fail in turn do not make a link.
constexpr std::uint64_t kMostRounds = 16;

}  // namespace

void QueuePairLink::enterNic(int nic) {
  nicNumber_ = nic;
  nic_ = nics_[static_cast<std::size_t>(nic)];
  nic_->enter(this);
}

int QueuePairLink::livingNic(int first) const {
  const int count = static_cast<int>(nics_.size());
  for (int i = 0; i < count; ++i) {
    const int nic = (first + i) % count;
    if (nics_[static_cast<std::size_t>(nic)]->usable()) return nic;
  }
  return -1;
}

// Under the lock. Something has to be different then: our port, or the other's.
bool QueuePairLink::mayMove() const {
  if (closing_ || socketEnded_ || stage_ == Stage::none || own_.round + 1 >= kMostRounds) return false;
  const int next = livingNic(nicNumber_ + 1);
  return next >= 0 && (next != nicNumber_ || peer_.nics > 1);
}

// Under the lock, on any thread: queue pairs are changed on the reactor's alone, where none of their events is open.
void QueuePairLink::lose(const std::string& why) {
  if (state() != State::open || !lost_.empty()) return;
  if (!mayMove()) return fall(State::failed, why);
  lost_ = lostFirst_ = why;
  if (lostNs_ == 0) lostNs_ = nowNs();
  attached_.store(false, std::memory_order_release);
  moveTimer_ = reactor_.every(1, [this] { move(); });
}

void QueuePairLink::loseBy(const std::string& why) {
  std::lock_guard lock(mutex_);
  lose(why);
}

void QueuePairLink::leaveBy(const std::string& why) {
  std::lock_guard lock(mutex_);
  if (mayMove()) lose(why);
}

void QueuePairLink::move() {
  std::lock_guard lock(mutex_);
  reactor_.cancel(moveTimer_);
  moveTimer_ = 0;
  // The other end may have been faster.
  if (closing_ || state() != State::open || lost_.empty()) return;
  const int next = livingNic(nicNumber_ + 1);
  if (next < 0) return fall(State::failed, lost_);
  // Of a port or device that fails the NIC has told, once for all its links.
  const std::string text =
      "a link " + whereabouts() + " is moved to " + nics_[static_cast<std::size_t>(next)]->describe() + ": it " + lost_;
  if (nic_->usable()) {
    FUSCO_WARN("{}", text);
  } else {
    FUSCO_INFO(kLogNet, "{}", text);
  }
  wish_ = static_cast<std::uint32_t>(next) == static_cast<std::uint32_t>(nicNumber_) ? peer_.nic + 1
                                                                                     : static_cast<std::uint32_t>(next);
  change(next);
}

// Under the lock. What had arrived by the old queue pair counts; what had not is sent once more by the new one.
void QueuePairLink::change(int nic) {
  while (poll() > 0) {
  }
  dropQueuePair();
  retired_ = lastSlice_ = lastSignalled_ = requests_;
  flying_.clear();
  busyNs_ = 0;
  if (nic != nicNumber_) {
    nic_->leave(this);
    enterNic(nic);
  }
  ++own_.round;
  begin();
}

void QueuePairLink::look() {
  std::lock_guard lock(mutex_);
  if (state() != State::open || stage_ == Stage::none || closing_) return;
  const std::int64_t now = nowNs();
  if (lostNs_ != 0 && now - lostNs_ > kMoveNs) {
    return fall(State::failed,
                lostFirst_ + "; other ports did not help within " + std::to_string(kMoveNs / 1'000'000'000) + " s");
  }
  if (!attached() || retired_ >= lastSignalled_) return;
  if (poll() > 0) options_.ringBell();
  if (retired_ != seenRetired_) {
    seenRetired_ = retired_;
    silentNs_ = now;
  } else if (now - silentNs_ > kSilenceNs) {
    lose("has acknowledged nothing for nine seconds " + whereabouts());
  }
}

}  // namespace fusco::transport
