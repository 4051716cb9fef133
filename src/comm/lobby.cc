#include "comm/lobby.h"

#include <unistd.h>

#include <algorithm>

#include "base/log.h"
#include "base/status.h"
#include "transport/local/socket.h"

namespace fusco::comm {

using transport::Io;

namespace {

constexpr std::size_t kMostCallers = 8192;
constexpr std::int32_t kMostRanks = 1 << 20;
constexpr std::size_t kFewCallers = 64;
std::atomic<unsigned> starved{0};  // lobbies of this process

bool endsInTime(const char* text, std::size_t room) { return std::memchr(text, 0, room) != nullptr; }

}  // namespace

bool Lobby::wellFormed(const Record& record) {
  return record.ranks > 0 && record.ranks <= kMostRanks && record.rank >= 0 && record.rank < record.ranks &&
         record.addressCount >= 0 && record.addressCount <= Record::kMostAddresses &&
         endsInTime(record.hostName, sizeof(record.hostName)) &&
         endsInTime(record.socketName, sizeof(record.socketName)) &&
         endsInTime(record.settings, sizeof(record.settings)) && endsInTime(record.failure, sizeof(record.failure));
}

Lobby::Greeting Lobby::readHello(const void* message, std::size_t bytes, Hello* hello) {
  if (bytes < kHelloHead) return Greeting::stranger;
  std::memcpy(static_cast<void*>(hello), message, std::min(bytes, sizeof(*hello)));
  if (hello->magic != Hello::kMagic) return Greeting::stranger;
  if (hello->format != Hello::kFormat || hello->bytes != sizeof(Record)) return Greeting::otherFormat;
  return bytes == sizeof(*hello) && wellFormed(hello->record) ? Greeting::rank : Greeting::stranger;
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

bool Lobby::acceptCallers() {
  for (int turn = 0; turn < transport::kAcceptsAtOnce; ++turn) {
    bool exhausted = false;
    UniqueFd socket = transport::acceptOne(listener_, &exhausted);
    if (socket) {
      noteStarving(false);
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
      return true;
    }
    // The longest silent makes room; few callers are no crowd that could be asked to.
    const bool crowded = !exhausted || callers_.size() >= kFewCallers;
    const auto silent = crowded
                            ? std::find_if(callers_.begin(), callers_.end(), [this](Caller& c) { return isSilent(&c); })
                            : callers_.end();
    noteStarving(exhausted && silent == callers_.end());
    if (silent != callers_.end()) {
      callers_.erase(silent);
    } else {
      ::poll(nullptr, 0, 10);
      return true;
    }
  }
  return false;
}

// Whether it still has not said who it is, now that what it may have said is heard.
bool Lobby::isSilent(Caller* caller) {
  if (caller->rank < 0 && !caller->answered && !caller->gone) hear(caller);
  return caller->gone || (caller->rank < 0 && !caller->answered);
}

std::string Lobby::starvingText(const std::string& who) {
  return who + " (" + shortHostName() + ":" + std::to_string(::getpid()) +
         ") has no file descriptors left for the ranks that come; raise `ulimit -n`";
}

void Lobby::noteStarving(bool starving) {
  if (starving_.note(starving) > transport::kStarvingNs && !decided_) starve();
}

unsigned Lobby::timesStarved() { return starved.load(std::memory_order_acquire); }

void Lobby::starve() {
  // Before anyone is told, or sees the door close.
  starved.fetch_add(1, std::memory_order_release);
  starves();
}

void Lobby::hear(Caller* caller) {
  Hello hello;
  std::byte message[sizeof(hello)];
  std::size_t bytes = 0;
  const Io io = transport::receiveMessage(caller->socket.get(), message, sizeof(message), &bytes);
  if (io == Io::again) return;
  if (caller->rank >= 0 || caller->answered) {
    // A rank says one thing only; its end or a second message means that it waits no more.
    caller->gone = true;
    if (!decided_ && caller->rank >= 0) lost(caller->rank);
    return;
  }
  const Greeting greeting = io == Io::closed ? Greeting::stranger : readHello(message, bytes, &hello);
  if (greeting == Greeting::stranger || !transport::sameSecret(hello.key, key_, sizeof(key_))) {
    caller->gone = true;
  } else if (greeting == Greeting::otherFormat) {
    caller->deadline = Deadline::never();
    if (!decided_) differs(caller, hello.format);
    answer(caller);
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

bool Lobby::everyoneHasAnswer() {
  return acceptCallers() && flushed() &&
         std::all_of(callers_.begin(), callers_.end(), [](const Caller& caller) { return caller.answered; });
}

bool Lobby::isHere(int rank) const {
  for (const Caller& caller : callers_) {
    if (caller.rank == rank && !caller.gone) return true;
  }
  return false;
}

}  // namespace fusco::comm
