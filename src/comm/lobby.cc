#include "comm/lobby.h"

#include "base/status.h"
#include "transport/local/socket.h"

namespace fusco::comm {

using transport::Io;

namespace {

constexpr std::size_t kMostCallers = 8192;

bool endsInTime(const char* text, std::size_t room) { return std::memchr(text, 0, room) != nullptr; }

}  // namespace

bool Lobby::wellFormed(const Record& record) {
  return record.ranks > 0 && record.rank >= 0 && record.rank < record.ranks && record.addressCount >= 0 &&
         record.addressCount <= Record::kMostAddresses && endsInTime(record.hostName, sizeof(record.hostName)) &&
         endsInTime(record.socketName, sizeof(record.socketName)) && endsInTime(record.failure, sizeof(record.failure));
}

void Lobby::serve(const std::atomic<bool>& stop) {
  while (!stop.load()) {
    acceptCallers();
    polled_.assign(1, pollfd{listener_, POLLIN, 0});
    Deadline next = Deadline::never();
    for (const Caller& caller : callers_) {
      const bool sending = caller.sent < caller.answer.size();
      polled_.push_back({caller.socket.get(), static_cast<short>(POLLIN | (sending ? POLLOUT : 0)), 0});
      next = next.earlier(caller.deadline);
    }
    const std::size_t own = polled_.size();
    next = next.earlier(addPolled(&polled_));
    ::poll(polled_.data(), polled_.size(), transport::pollMs(next, 60000));

    for (std::size_t k = 0; k < callers_.size(); ++k) {
      Caller& caller = callers_[k];
      const short events = polled_[k + 1].revents;
      if (events & (POLLIN | POLLHUP | POLLERR)) hear(&caller);
      if (!caller.gone && (events & POLLOUT)) push(&caller);
      if (caller.deadline.passed()) caller.gone = true;
    }
    onPolled(polled_.data() + own, polled_.size() - own);
    std::erase_if(callers_, [](const Caller& caller) { return caller.gone; });
    if (finishTurn()) return;
  }
}

void Lobby::acceptCallers() {
  for (bool exhausted = false;;) {
    UniqueFd socket = transport::acceptOne(listener_, &exhausted);
    if (socket) {
      try {
        if (!transport::sameUser(socket.get())) continue;
      } catch (const Error&) {
        continue;
      }
      callers_.emplace_back();
      callers_.back().socket = std::move(socket);
      callers_.back().deadline = Deadline::afterMs(patience_.silentCallerMs);
      if (callers_.size() <= kMostCallers) continue;
    } else if (!exhausted) {
      return;
    }
    // The longest silent makes room.
    bool freed = false;
    for (auto caller = callers_.begin(); caller != callers_.end() && !freed; ++caller) {
      if (caller->rank >= 0 || caller->answered) continue;
      callers_.erase(caller);
      freed = true;
    }
    if (!freed) {
      ::poll(nullptr, 0, 10);
      return;
    }
  }
}

void Lobby::hear(Caller* caller) {
  Hello hello;
  std::size_t bytes = 0;
  const Io io = transport::receiveMessage(caller->socket.get(), &hello, sizeof(hello), &bytes);
  if (io == Io::again) return;
  if (caller->rank >= 0 || caller->answered) {
    // A rank says one thing only; its end or a second message means that it waits no more.
    caller->gone = true;
    if (!decided_ && caller->rank >= 0) lost(caller->rank);
    return;
  }
  if (io == Io::closed || bytes < kHelloHead || hello.magic != Hello::kMagic ||
      !transport::sameSecret(hello.key, key_, sizeof(key_))) {
    caller->gone = true;
  } else if (hello.format != Hello::kFormat || hello.bytes != sizeof(Record)) {
    caller->deadline = Deadline::never();
    if (!decided_) differs(caller, hello.format);
    answer(caller);
  } else if (bytes != sizeof(hello) || !wellFormed(hello.record)) {
    caller->gone = true;
  } else {
    caller->deadline = Deadline::never();
    came(caller, hello.record);
  }
}

void Lobby::decide(int code, std::string verdict) {
  if (decided_) return;
  decided_ = true;
  code_ = code;
  verdict_ = std::move(verdict);
  for (Caller& caller : callers_) {
    if (caller.rank >= 0 && !caller.gone) answer(&caller);
  }
}

void Lobby::answer(Caller* caller) {
  if (caller->answered) return;
  caller->answered = true;
  ++answeredCallers_;
  const AnswerHead head = answerHead();
  caller->answer.emplace_back(reinterpret_cast<const char*>(&head), sizeof(head));
  for (std::size_t at = 0; at < verdict_.size(); at += kAnswerPart) {
    caller->answer.push_back(verdict_.substr(at, kAnswerPart));
  }
  push(caller);
}

void Lobby::push(Caller* caller) {
  while (caller->sent < caller->answer.size()) {
    const std::string& part = caller->answer[caller->sent];
    const Io io = transport::sendMessage(caller->socket.get(), part.data(), part.size());
    if (io == Io::again) return;
    if (io == Io::closed) {
      caller->sent = caller->answer.size();
      return;
    }
    ++caller->sent;
  }
}

bool Lobby::flushed() const {
  for (const Caller& caller : callers_) {
    if (caller.sent < caller.answer.size()) return false;
  }
  return true;
}

bool Lobby::isHere(int rank) const {
  for (const Caller& caller : callers_) {
    if (caller.rank == rank && !caller.gone) return true;
  }
  return false;
}

}  // namespace fusco::comm
