#include "comm/switchboard.h"

#include <poll.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "base/status.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm {

Switchboard::Switchboard(transport::Reactor& reactor, const std::uint8_t key[32], std::vector<UniqueFd> listeners,
                         Judge judge, Take take, Starve starve)
    : reactor_(reactor),
      listeners_(std::move(listeners)),
      judge_(std::move(judge)),
      take_(std::move(take)),
      starve_(std::move(starve)) {
  std::memcpy(key_, key, sizeof(key_));
  for (const UniqueFd& listener : listeners_) {
    const int descriptor = listener.get();
    reactor_.add(descriptor, [this, descriptor](std::uint32_t) { acceptSome(descriptor); });
    reactor_.arm(descriptor, EPOLLIN);
  }
  timer_ = reactor_.every(500, [this] { dropLate(); });
}

Switchboard::~Switchboard() {
  reactor_.cancel(timer_);
  for (const UniqueFd& listener : listeners_) reactor_.remove(listener.get());
  std::map<int, std::unique_ptr<Pending>> ending;
  for (bool settled = false;;) {
    {
      std::lock_guard lock(mutex_);
      ending.swap(pending_);
    }
    if (ending.empty()) {
      if (settled) return;
      // A call that has taken its connection out of the list may be about to hand it over, or to begin another one.
      reactor_.settle();
      settled = true;
      continue;
    }
    settled = false;
    for (auto& [descriptor, pending] : ending) reactor_.remove(descriptor);
    ending.clear();
  }
}

void Switchboard::call(const transport::Address& to, const transport::Address& from, const Purpose& purpose,
                       Deadline deadline, Done done) {
  transport::Address own = from;
  own.port = 0;
  UniqueFd socket = transport::beginConnect(to, own);
  if (!socket) {
    const std::string why = std::strerror(errno);
    if (errno == EMFILE || errno == ENFILE) starve_();
    return done(UniqueFd(), false, why);
  }
  watch(std::make_unique<Pending>(std::move(socket), key_, purpose, deadline, std::move(done)));
}

void Switchboard::watch(std::unique_ptr<Pending> pending) {
  const int descriptor = pending->socket.get();
  const std::uint32_t events = pending->done ? EPOLLOUT : EPOLLIN;
  std::lock_guard lock(mutex_);
  pending_[descriptor] = std::move(pending);
  reactor_.add(descriptor, [this, descriptor](std::uint32_t) { proceed(descriptor); });
  reactor_.arm(descriptor, events);
}

std::unique_ptr<Switchboard::Pending> Switchboard::extract(int descriptor) {
  std::unique_ptr<Pending> pending;
  {
    std::lock_guard lock(mutex_);
    const auto found = pending_.find(descriptor);
    if (found == pending_.end()) return nullptr;
    pending = std::move(found->second);
    pending_.erase(found);
    std::erase(strangers_, descriptor);
  }
  reactor_.remove(descriptor);
  return pending;
}

void Switchboard::acceptSome(int listener) {
  for (int turn = 0; turn < 64; ++turn) {
    bool exhausted = false;
    UniqueFd socket = transport::acceptOne(listener, &exhausted);
    if (!socket && !exhausted) {
      noteStarving(false);
      break;
    }
    int oldest = -1;
    bool starving = false;
    {
      std::lock_guard lock(mutex_);
      // Few of them are no crowd that could be asked to make room: they may all be ranks.
      starving = exhausted && strangers_.size() < kFewStrangers;
      if ((exhausted && !starving) || strangers_.size() >= kMostStrangers) oldest = strangers_.front();
    }
    noteStarving(starving);
    // The longest silent makes room.
    if (oldest >= 0) extract(oldest);
    if (!socket) {
      if (oldest < 0) ::poll(nullptr, 0, 10);
      break;
    }
    {
      std::lock_guard lock(mutex_);
      strangers_.push_back(socket.get());
    }
    watch(std::make_unique<Pending>(std::move(socket), key_));
  }
  reactor_.arm(listener, EPOLLIN);
}

void Switchboard::noteStarving(bool starving) {
  if (starving_.note(starving) > transport::kStarvingNs) starve_();
}

void Switchboard::proceed(int descriptor) {
  Handshake::Result result = Handshake::Result::again;
  std::string why;
  {
    std::lock_guard lock(mutex_);
    const auto found = pending_.find(descriptor);
    if (found == pending_.end()) return;
    Pending& pending = *found->second;
    if (pending.connecting) {
      pending.connecting = false;
      if (const int error = transport::connectResult(descriptor); error != 0) {
        result = Handshake::Result::failed;
        why = std::strerror(error);
      }
      transport::watchConnection(descriptor, kSilenceMs);
      pending.deadline = Deadline::never();
    }
    if (why.empty()) result = pending.handshake.step(descriptor);
    if (result == Handshake::Result::again) {
      reactor_.arm(descriptor, pending.handshake.waitsFor() == POLLOUT ? EPOLLOUT : EPOLLIN);
      return;
    }
  }
  if (why.empty()) why = "it hung up, or does not hold the communicator's key";
  if (std::unique_ptr<Pending> pending = extract(descriptor)) finish(std::move(pending), result, why);
}

void Switchboard::finish(std::unique_ptr<Pending> pending, Handshake::Result result, const std::string& why) {
  if (pending->done) {
    if (result == Handshake::Result::taken) {
      transport::unwatchConnection(pending->socket.get());
      return pending->done(std::move(pending->socket), false, "");
    }
    return pending->done(UniqueFd(), result == Handshake::Result::refused, why);
  }
  if (result != Handshake::Result::proved) return;
  const Purpose purpose = pending->handshake.purpose();
  const bool wanted = judge_(purpose);
  Handshake::answer(pending->socket.get(), wanted);
  if (wanted) take_(purpose, std::move(pending->socket));
}

void Switchboard::dropLate() {
  std::vector<int> late;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [descriptor, pending] : pending_) {
      if (pending->deadline.passed()) late.push_back(descriptor);
    }
  }
  for (const int descriptor : late) {
    std::unique_ptr<Pending> pending = extract(descriptor);
    if (pending && pending->done) pending->done(UniqueFd(), false, "no answer in time");
  }
}

}  // namespace fusco::comm
