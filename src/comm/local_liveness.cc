// Whether the peers of a fabric are there, and what its rank is told when one is not.
#include <unistd.h>

#include <fstream>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "comm/bootstrap.h"
#include "comm/local_fabric.h"

namespace fusco::comm {

using transport::Presence;
using transport::RankHeader;

namespace {

constexpr std::int64_t kLookEveryNs = 50'000'000;
// A rank that has destroyed its communicator may have done its part of the operation that we still wait in: its leaving
// is an error only when the wait goes on and nobody rings.
constexpr std::int64_t kFarewellGraceNs = 1'000'000'000;
// How often waiting ranks look whether peers of their machine are stopped, and after what time they say so.
constexpr std::int64_t kStoppedEveryNs = 1'000'000'000;
constexpr std::int64_t kStoppedWarningNs = 3'000'000'000;
// A step of a peer takes milliseconds; one that is stopped in the middle of it is not waited for forever.
constexpr std::int64_t kMovesMs = 1000;
// A link that breaks is the first that is seen of a death, or of a rank that has left: who died, and that it left, is
// told by the tree a little later.
constexpr std::int64_t kBrokenLinkGraceNs = 500'000'000;
// One that was closed in order is that of a rank that has left or, if it was killed between two slices, of a dead one:
// the tree tells which, as soon as machines that are busy get to it.
constexpr std::int64_t kClosedLinkGraceNs = 10'000'000'000;

bool isStopped(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return false;
  // The name before it may hold anything.
  const std::size_t end = line.rfind(')');
  return end != std::string::npos && end + 2 < line.size() && (line[end + 2] == 'T' || line[end + 2] == 't');
}

}  // namespace

void LocalFabric::check() {
  checkAwaited([](int) { return true; });
}

void LocalFabric::checkAwaited(const std::function<bool(int rank)>& awaited) {
  refuseChild("an operation");
  if (headers_[config_.rank]->alarm.load(std::memory_order_acquire) != 0) alarmed(awaited);
  const std::int64_t now = nowNs();
  std::int64_t last = lastLookNs_.load(std::memory_order_relaxed);
  if (!failed_.load(std::memory_order_acquire)) {
    if (now - last < kLookEveryNs || !lastLookNs_.compare_exchange_strong(last, now, std::memory_order_relaxed)) return;
    // Who holds the lock looks by itself while it waits.
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) look(lock);
    return;
  }
  std::unique_lock lock(mutex_);
  look(lock);
}

// Whoever polls this from beside an operation must not disturb it: that one may hold the lock for as long as it likes.
void LocalFabric::checkPeers() {
  if (forks_ != forkCount()) return;
  if (headers_[config_.rank]->alarm.load(std::memory_order_acquire) != 0) tellOfEnds();
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock) look(lock);
}

bool LocalFabric::settled() {
  if (!mesh_->queued()) return true;
  std::lock_guard lock(mutex_);
  return mesh_->flush();
}

void LocalFabric::look(std::unique_lock<std::mutex>& lock) {
  if (failure_.empty()) {
    mesh_->flush();
    lookForStopped();
    const int dead = mesh_->look();
    if (dead >= 0) {
      failure_ = names_[dead] + " died: its process has ended without destroying the communicator; look at its log";
      failed_.store(true, std::memory_order_release);
    } else if (network_) {
      if (network_->starves()) network_->failStarving();
      lookAtLinks();
    }
  }
  if (failure_.empty()) return;
  const std::string text = failure_;
  lock.unlock();
  fail(Code::remoteError, text);
}

// Under the lock. A stopped process is alive and may go on: whoever waits is told, and waits on.
void LocalFabric::lookForStopped() {
  const std::int64_t now = nowNs();
  if (now - lookedForStoppedNs_ < kStoppedEveryNs) return;
  lookedForStoppedNs_ = now;
  stopped_.resize(static_cast<std::size_t>(config_.ranks));
  for (int rank = 0; rank < config_.ranks; ++rank) {
    if (mesh_->remote(rank) || mesh_->sameProcess(rank) || mesh_->pid(rank) <= 0) continue;
    Stopped& known = stopped_[static_cast<std::size_t>(rank)];
    if (!isStopped(mesh_->pid(rank))) {
      if (known.told) FUSCO_WARN("{} goes on", names_[rank]);
      known = {};
      continue;
    }
    if (known.sinceNs == 0) known.sinceNs = now;
    if (known.told || now - known.sinceNs < kStoppedWarningNs) continue;
    known.told = true;
    FUSCO_WARN(
        "{} is stopped (SIGSTOP, or a debugger holds it) since {} s; waiting goes on, `kill -CONT {}` continues it",
        names_[rank], (now - known.sinceNs) / 1'000'000'000, mesh_->pid(rank));
  }
}

// Under the lock.
void LocalFabric::lookAtLinks() {
  std::string how;
  bool orderly = false;
  const int peer =
      network_->brokenLink([this](int rank) { return presenceOf(rank) != Presence::here; }, &how, &orderly);
  if (peer < 0) {
    brokenLinkNs_.store(0);
    return;
  }
  const std::int64_t grace = orderly ? kClosedLinkGraceNs : kBrokenLinkGraceNs;
  const std::int64_t now = nowNs();
  std::int64_t none = 0;
  if (brokenLinkNs_.compare_exchange_strong(none, now) || now - brokenLinkNs_.load() < grace) return;
  // Other ranks will read it, too.
  const std::string_view self = "this rank";
  for (std::size_t at = 0; (at = how.find(self, at)) != std::string::npos; at += names_[config_.rank].size()) {
    how.replace(at, self.size(), names_[config_.rank]);
  }
  failure_ = names_[peer] + " " + how + "; look at its log and at the network between";
  failed_.store(true, std::memory_order_release);
}

// From the network's thread, which must not wait for locks that are held for long.
void LocalFabric::hear(const News& news) {
  RankHeader& own = *headers_[config_.rank];
  switch (news.kind) {
    case News::aborted:
      return own.abort(news.text);
    case News::left:
    case News::exited:
      remotePresence_[news.rank].store(
          static_cast<std::uint32_t>(news.kind == News::left ? Presence::left : Presence::exited));
      return own.raiseAlarm();
    case News::died: {
      std::lock_guard lock(newsMutex_);
      if (!newsOfDeath_.empty()) break;
      newsOfDeath_ = names_[news.rank] + " " + news.text;
      if (news.rank == config_.rank) newsOfDeath_ = "this rank is taken for dead, another one says: " + newsOfDeath_;
    }
      deathTold_.store(true, std::memory_order_release);
      return own.raiseAlarm();
  }
}

Presence LocalFabric::presenceOf(int rank) const {
  if (headers_[rank] != nullptr) {
    return static_cast<Presence>(headers_[rank]->presence.load(std::memory_order_acquire));
  }
  return static_cast<Presence>(remotePresence_[rank].load(std::memory_order_acquire));
}

// What ends operations whether or not anything is waited for.
void LocalFabric::tellOfEnds() {
  RankHeader& own = *headers_[config_.rank];
  if (own.aborted.load(std::memory_order_acquire) == 2) {
    fail(Code::remoteError, std::string(own.reason, strnlen(own.reason, RankHeader::kReasonBytes)));
  }
  if (deathTold_.load(std::memory_order_acquire)) {
    std::lock_guard lock(newsMutex_);
    fail(Code::remoteError, newsOfDeath_);
  }
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (presenceOf(peer) == Presence::exited) {
      fail(Code::remoteError, names_[peer] +
                                  " left: its process exited without destroying the communicator; look at "
                                  "its log, or destroy communicators before the end");
    }
  }
}

void LocalFabric::alarmed(const std::function<bool(int rank)>& awaited) {
  tellOfEnds();
  RankHeader& own = *headers_[config_.rank];
  int left = -1;
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (presenceOf(peer) == Presence::left && peer != config_.rank && awaited(peer)) left = peer;
  }
  if (left < 0) return;
  int first = -1;
  if (!firstLeft_.compare_exchange_strong(first, left) && awaited(first)) left = first;
  // As long as somebody rings (for another reason than an alarm), the operation still goes on.
  const std::uint32_t rung = own.bell.load(std::memory_order_acquire) - own.alarm.load(std::memory_order_acquire);
  const std::int64_t now = nowNs();
  const std::int64_t since = farewellSeenNs_.load(std::memory_order_acquire);
  if (since == 0 || farewellBell_.exchange(rung, std::memory_order_acq_rel) != rung) {
    farewellBell_.store(rung, std::memory_order_release);
    farewellSeenNs_.store(now, std::memory_order_release);
  } else if (now - since > kFarewellGraceNs) {
    fail(Code::remoteError, names_[left] + " left: it destroyed its communicator while " + names_[config_.rank] +
                                " was still waiting in an operation; destroy only when all ranks have completed");
  }
}

void LocalFabric::abort(const std::string& reason) {
  refuseChild("abort");
  headers_[config_.rank]->abort(reason);
  for (RankHeader* header : headers_) {
    if (header != nullptr) header->abort(reason);
  }
  if (network_) network_->tree().tell({News::aborted, config_.rank, reason});
}

// Who moves says so, then looks whether anybody has aborted; who aborts says so, then looks who moves. Between the two
// lies a fence on both sides, so at least one of them sees the other.
void LocalFabric::moveBegins() {
  RankHeader& own = *headers_[config_.rank];
  own.moving.store(1, std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (own.aborted.load(std::memory_order_seq_cst) == 0) return;
  own.moving.store(0, std::memory_order_release);
  // The reason may be under way.
  for (int turn = 0; turn < 1000 && own.aborted.load(std::memory_order_acquire) != 2; ++turn) ::usleep(10);
  tellOfEnds();
  fail(Code::remoteError, "a rank of this machine has aborted; look at the others' logs");
}

void LocalFabric::awaitMoves() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const Deadline patience = Deadline::afterMs(kMovesMs);
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peer == config_.rank || headers_[peer] == nullptr) continue;
    while (headers_[peer]->moving.load(std::memory_order_seq_cst) != 0 && !patience.passed()) {
      if (!mesh_->sameProcess(peer) && mesh_->ended(peer)) break;
      ::usleep(50);
    }
  }
}

}  // namespace fusco::comm
