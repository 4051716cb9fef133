#include "comm/rendezvous.h"

#include <cstring>

#include "base/log.h"
#include "base/status.h"
#include "transport/local/socket.h"

namespace fusco::comm {

using transport::Io;

namespace {

constexpr std::size_t kMostCallers = 8192;
constexpr std::size_t kMostNamed = 16;

bool endsInTime(const char* text, std::size_t room) { return std::memchr(text, 0, room) != nullptr; }

bool wellFormed(const Record& record) {
  return record.ranks > 0 && record.rank >= 0 && record.rank < record.ranks &&
         endsInTime(record.hostName, sizeof(record.hostName)) &&
         endsInTime(record.socketName, sizeof(record.socketName)) && endsInTime(record.failure, sizeof(record.failure));
}

}  // namespace

void Rendezvous::serve(const std::atomic<bool>& stop) {
  end_ = Deadline::afterMs(patience_.nobodyMs);
  while (!stop.load()) {
    acceptCallers();
    polled_.assign(1, pollfd{listener_, POLLIN, 0});
    Deadline next = end_.earlier(timeout_).earlier(progress_);
    for (const Caller& caller : callers_) {
      const bool sending = caller.sent < caller.answer.size();
      polled_.push_back({caller.socket.get(), static_cast<short>(POLLIN | (sending ? POLLOUT : 0)), 0});
      next = next.earlier(caller.deadline);
    }
    ::poll(polled_.data(), polled_.size(), transport::pollMs(next, 60000));

    for (std::size_t k = 0; k < callers_.size(); ++k) {
      Caller& caller = callers_[k];
      const short events = polled_[k + 1].revents;
      if (events & (POLLIN | POLLHUP | POLLERR)) hear(caller);
      if (!caller.gone && (events & POLLOUT)) push(caller);
      if (caller.deadline.passed()) caller.gone = true;
    }
    if (!decided_) {
      if (timeout_.passed()) {
        failAll(static_cast<int>(Code::remoteError), "not all ranks came to init within the time-out of " +
                                                         std::to_string((nowNs() - firstCameNs_) / 1000000) +
                                                         " ms: " + std::to_string(records_.size()) + " of " +
                                                         std::to_string(ranks_) + " came; missing: " + missing() +
                                                         "; look whether they were started and got the same id");
        end_ = Deadline::afterMs(200);
      } else if (progress_.passed()) {
        reportProgress();
      }
    }
    std::erase_if(callers_, [](const Caller& caller) { return caller.gone; });
    if (end_.passed()) return;
    if (decided_ && answered_ >= mostRanks_) {
      bool flushed = true;
      for (const Caller& caller : callers_) flushed = flushed && caller.sent == caller.answer.size();
      if (flushed) return;
    }
  }
}

void Rendezvous::acceptCallers() {
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

void Rendezvous::hear(Caller& caller) {
  Hello hello;
  std::size_t bytes = 0;
  const Io io = transport::receiveMessage(caller.socket.get(), &hello, sizeof(hello), &bytes);
  if (io == Io::again) return;
  if (caller.rank >= 0 || caller.answered) {
    // A rank says one thing only; its end or a second message means that it waits no more.
    caller.gone = true;
    if (!decided_ && caller.rank >= 0) {
      failAll(
          static_cast<int>(Code::remoteError),
          records_.at(caller.rank).describe() + " died or gave up at init, before all ranks had come; look at its log");
    }
    return;
  }
  if (io == Io::closed || bytes != sizeof(hello) || hello.magic != Hello::kMagic ||
      !transport::sameSecret(hello.key, id_.key, sizeof(id_.key)) || !wellFormed(hello.record)) {
    caller.gone = true;
    return;
  }
  welcome(caller, hello.record);
}

void Rendezvous::welcome(Caller& caller, const Record& record) {
  caller.deadline = Deadline::never();
  mostRanks_ = std::max<std::int64_t>(mostRanks_, record.ranks);
  if (records_.empty() && !decided_) {
    ranks_ = record.ranks;
    firstCameNs_ = nowNs();
    timeout_ = Deadline::afterMs(record.initTimeoutMs);
    progress_ = Deadline::afterMs(patience_.firstProgressMs);
    end_ = Deadline::never();
  }
  if (decided_) return answer(caller);

  std::string text;
  Code code = Code::invalidUsage;
  if (record.failure[0] != 0) {
    text = record.describe() + " failed at init: " + record.failure;
    code = record.failureCode == static_cast<int>(Code::invalidUsage) ? Code::invalidUsage : Code::remoteError;
  } else if (auto same = records_.find(record.rank); same != records_.end()) {
    text = "two ranks call themselves rank " + std::to_string(record.rank) + ": " + same->second.describe() + " and " +
           record.describe() + "; give each its own number from 0 to " + std::to_string(ranks_ - 1);
  } else if (!records_.empty()) {
    text = disagreement(records_.begin()->second, record);
  }
  if (!text.empty()) {
    caller.rank = -1;
    caller.answered = false;
    failAll(static_cast<int>(code), text);
    return answer(caller);
  }
  caller.rank = record.rank;
  records_.emplace(record.rank, record);
  if (static_cast<std::int64_t>(records_.size()) < ranks_) return;

  decided_ = true;
  code_ = 0;
  for (const auto& [rank, one] : records_) verdict_.append(reinterpret_cast<const char*>(&one), sizeof(one));
  end_ = Deadline::afterMs(patience_.lateComersMs);
  for (Caller& one : callers_) {
    if (one.rank >= 0) answer(one);
  }
}

std::string Rendezvous::disagreement(const Record& first, const Record& other) const {
  struct Item {
    const char* name;
    std::uint64_t one, two;
  };
  const Item items[] = {
      {"the number of ranks", static_cast<std::uint64_t>(first.ranks), static_cast<std::uint64_t>(other.ranks)},
      {"lanes per node", static_cast<std::uint64_t>(first.lanesPerNode),
       static_cast<std::uint64_t>(other.lanesPerNode)},
      {"the size of control memory", first.controlBytes, other.controlBytes},
      {"the size of a slot", first.slotBytes, other.slotBytes},
      {"the number of slots", static_cast<std::uint64_t>(first.slots), static_cast<std::uint64_t>(other.slots)},
      {"the hash of their settings", first.signature, other.signature},
  };
  for (const Item& item : items) {
    if (item.one == item.two) continue;
    return std::string("ranks disagree on ") + item.name + ": " + first.describe() + " has " +
           std::to_string(item.one) + ", " + other.describe() + " has " + std::to_string(item.two) +
           "; give all ranks the same";
  }
  return {};
}

void Rendezvous::failAll(int code, const std::string& text) {
  if (decided_) return;
  decided_ = true;
  code_ = code;
  verdict_ = text;
  end_ = Deadline::afterMs(patience_.lateComersMs);
  for (Caller& caller : callers_) {
    if (caller.rank >= 0 && !caller.gone) answer(caller);
  }
  // Whoever has gone needs no answer.
  for (const auto& [rank, record] : records_) {
    bool here = false;
    for (const Caller& caller : callers_) here = here || (caller.rank == rank && !caller.gone);
    if (!here) ++answered_;
  }
}

void Rendezvous::answer(Caller& caller) {
  if (caller.answered) return;
  caller.answered = true;
  ++answered_;
  AnswerHead head{Hello::kMagic, code_, 0, verdict_.size()};
  caller.answer.emplace_back(reinterpret_cast<const char*>(&head), sizeof(head));
  for (std::size_t at = 0; at < verdict_.size(); at += kAnswerPart) {
    caller.answer.push_back(verdict_.substr(at, kAnswerPart));
  }
  push(caller);
}

void Rendezvous::push(Caller& caller) {
  while (caller.sent < caller.answer.size()) {
    const std::string& part = caller.answer[caller.sent];
    const Io io = transport::sendMessage(caller.socket.get(), part.data(), part.size());
    if (io == Io::again) return;
    if (io == Io::closed) {
      caller.sent = caller.answer.size();
      return;
    }
    ++caller.sent;
  }
}

std::string Rendezvous::missing() const {
  std::string names;
  std::size_t named = 0, unnamed = 0;
  for (int rank = 0; rank < ranks_; ++rank) {
    if (records_.contains(rank)) continue;
    if (named++ < kMostNamed) {
      names += (names.empty() ? "rank " : ", rank ") + std::to_string(rank);
    } else {
      ++unnamed;
    }
  }
  if (unnamed > 0) names += " and " + std::to_string(unnamed) + " more";
  return names;
}

void Rendezvous::reportProgress() {
  FUSCO_WARN("init has waited for {} s: {} of {} ranks have come; missing: {}", (nowNs() - firstCameNs_) / 1000000000,
             records_.size(), ranks_, missing());
  progress_ = Deadline::afterMs(60000);
}

}  // namespace fusco::comm
