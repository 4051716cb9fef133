// The place where ranks meet: one thread each, in the process that opened it.
#include <poll.h>
#include <pthread.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/status.h"
#include "base/thread.h"
#include "plugin/nccl/elsewhere.h"
#include "plugin/nccl/meeting_wire.h"
#include "plugin/nccl/report.h"

namespace fusco::nccl {

namespace {

constexpr std::size_t kMostCallers = 8192;
constexpr std::int64_t kSilentCallerMs = 10000;
constexpr std::int64_t kLateComersMs = 5000;
constexpr std::int64_t kNobodyMs = 24 * 3600 * 1000;

class Place {
 public:
  Place(const Tag& tag, Socket listener, Socket wide)
      : tag_(tag), listener_(std::move(listener)), wide_(std::move(wide)) {}
  void serve();
  std::atomic<bool> stop{false};
  std::atomic<bool> finished{false};
  std::thread thread;
  bool isAt(const Tag& tag) const { return std::memcmp(tag.name, tag_.name, sizeof tag.name) == 0; }
  void wake() { ::shutdown(listener_.get(), SHUT_RDWR); }
  // Without a word to those who come: the listeners are another process's too.
  void closeListeners() {
    listener_ = {};
    wide_ = {};
  }

 private:
  struct Caller {
    Socket socket;
    bool local = true;
    int rank = -1;
    std::string in;
    Deadline silent = Deadline::afterMs(kSilentCallerMs);
    bool spoke = false;  // in this round
    bool gone = false;
  };

  void acceptCallers(const Socket& listener, bool local);
  bool admit(std::int32_t rank, std::int32_t ranks);
  void hearOfElsewhere(Caller& caller);
  void hear(Caller& caller);
  void welcome(Caller& caller);
  void takeWords(Caller& caller);
  bool roundComplete() const;
  void answerRound();
  void answer(Caller& caller, std::int32_t code, const std::string& body);

  const Tag tag_;
  Socket listener_, wide_;
  std::list<Caller> callers_;
  std::int32_t ranks_ = 0;
  std::int64_t patienceMs_ = 0;
  std::vector<std::optional<std::string>> words_;  // of this round
  std::size_t wordBytes_ = 0;
  std::vector<bool> missing_;  // ranks that were absent in an earlier round, have left, or are elsewhere
  std::vector<bool> elsewhere_;
  int rounds_ = 0;  // answered
  bool everyoneCame_ = false;
  std::string firstTable_;
  Deadline round_ = Deadline::never();
  Deadline linger_ = Deadline::never();
};

void Place::answer(Caller& caller, std::int32_t code, const std::string& body) {
  const wire::Head head{static_cast<std::uint32_t>(body.size()), code};
  std::string message(reinterpret_cast<const char*>(&head), sizeof head);
  message += body;
  for (std::size_t at = 0; at < message.size();) {
    const ssize_t sent = ::send(caller.socket.get(), message.data() + at, message.size() - at, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    // A caller that takes nothing for as long as the socket waits (SO_SNDTIMEO) is as good as gone.
    if (sent <= 0) {
      caller.gone = true;
      return;
    }
    at += static_cast<std::size_t>(sent);
  }
}

// By the first one that comes it is known how many there are.
bool Place::admit(std::int32_t rank, std::int32_t ranks) {
  if (ranks < 1 || ranks > wire::kMostRanks || rank < 0 || rank >= ranks) return false;
  if (ranks_ == 0) {
    ranks_ = ranks;
    words_.resize(static_cast<std::size_t>(ranks));
    missing_.resize(static_cast<std::size_t>(ranks));
    elsewhere_.resize(static_cast<std::size_t>(ranks));
  }
  return ranks == ranks_;
}

void Place::hearOfElsewhere(Caller& caller) {
  Elsewhere words;
  if (caller.in.size() < sizeof words) return;
  std::memcpy(&words, caller.in.data(), sizeof words);
  caller.gone = true;
  if (words.magic != Elsewhere::kMagic || std::memcmp(words.name, tag_.name, sizeof words.name) != 0) return;
  if (!admit(words.rank, words.ranks) || words_[static_cast<std::size_t>(words.rank)]) return;
  missing_[static_cast<std::size_t>(words.rank)] = true;
  elsewhere_[static_cast<std::size_t>(words.rank)] = true;
}

void Place::welcome(Caller& caller) {
  wire::Hello hello;
  std::memcpy(&hello, caller.in.data(), sizeof hello);
  caller.in.erase(0, sizeof hello);
  unsigned different = 0;
  for (std::size_t i = 0; i < sizeof hello.key; ++i) different |= hello.key[i] ^ tag_.key[i];
  if (hello.magic != wire::Hello::kMagic || different != 0 || hello.ranks < 1 || hello.ranks > wire::kMostRanks ||
      hello.rank < 0 || hello.rank >= hello.ranks) {
    caller.gone = true;
    return;
  }
  caller.silent = Deadline::never();
  std::string wrong;
  const bool admitted = admit(hello.rank, hello.ranks);
  if (patienceMs_ == 0) {
    patienceMs_ = std::max<std::int64_t>(hello.patienceMs, 1);
    round_ = Deadline::afterMs(patienceMs_);
  }
  if (!admitted) {
    wrong = "rank " + std::to_string(hello.rank) + " wants a communicator of " + std::to_string(hello.ranks) +
            " ranks, another one says " + std::to_string(ranks_);
  } else {
    for (const Caller& other : callers_) {
      if (&other != &caller && other.rank == hello.rank)
        wrong = "two callers say that they are rank " + std::to_string(hello.rank);
    }
  }
  if (!wrong.empty()) {
    answer(caller, static_cast<std::int32_t>(Code::invalidUsage), wrong);
    caller.gone = true;
    return;
  }
  caller.rank = hello.rank;
}

void Place::takeWords(Caller& caller) {
  wire::Head head;
  if (caller.in.size() < sizeof head) return;
  std::memcpy(&head, caller.in.data(), sizeof head);
  if (head.bytes > wire::kMostWords) {
    caller.gone = true;
    return;
  }
  if (caller.in.size() < sizeof head + head.bytes) return;
  std::string words = caller.in.substr(sizeof head, head.bytes);
  caller.in.erase(0, sizeof head + head.bytes);
  const auto rank = static_cast<std::size_t>(caller.rank);
  if (rounds_ > 0 && missing_[rank]) {
    // Too late: it learns who was there, and that it was not.
    answer(caller, 0, firstTable_);
    return;
  }
  if (round_.isNever()) round_ = Deadline::afterMs(patienceMs_);
  wordBytes_ = words.size();
  words_[rank] = std::move(words);
  caller.spoke = true;
}

void Place::hear(Caller& caller) {
  char buffer[4096];
  const ssize_t got = ::recv(caller.socket.get(), buffer, sizeof buffer, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) {
    caller.gone = true;
    if (caller.rank >= 0) missing_[static_cast<std::size_t>(caller.rank)] = true;
    return;
  }
  caller.in.append(buffer, static_cast<std::size_t>(got));
  if (!caller.local) return hearOfElsewhere(caller);
  if (caller.rank < 0) {
    if (caller.in.size() < sizeof(wire::Hello)) return;
    welcome(caller);
  }
  if (!caller.gone && !caller.spoke) takeWords(caller);
}

bool Place::roundComplete() const {
  if (ranks_ == 0) return false;
  bool any = false;
  for (std::size_t r = 0; r < words_.size(); ++r) {
    any = any || words_[r];
    if (!words_[r] && !missing_[r]) return any && round_.passed();
  }
  return any;
}

void Place::answerRound() {
  std::string table;
  for (std::size_t r = 0; r < words_.size(); ++r) {
    if (!words_[r] || words_[r]->size() != wordBytes_) {
      missing_[r] = true;
      words_[r].reset();
    }
    table += words_[r] ? wire::kThere : elsewhere_[r] ? wire::kElsewhere : wire::kAbsent;
    table += words_[r].value_or(std::string(wordBytes_, 0));
  }
  if (rounds_++ == 0) {
    firstTable_ = table;
    everyoneCame_ = std::none_of(missing_.begin(), missing_.end(), [](bool gone) { return gone; });
  }
  for (Caller& caller : callers_) {
    if (caller.spoke && !caller.gone) answer(caller, 0, table);
    caller.spoke = false;
  }
  std::fill(words_.begin(), words_.end(), std::nullopt);
  round_ = Deadline::never();
}

void Place::acceptCallers(const Socket& listener, bool local) {
  for (;;) {
    Socket socket(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (socket.get() < 0) return;
    const timeval patience{5, 0};
    ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (callers_.size() >= kMostCallers) return;
    callers_.emplace_back();
    callers_.back().socket = std::move(socket);
    callers_.back().local = local;
  }
}

void Place::serve() {
  Deadline end = Deadline::afterMs(kNobodyMs);
  bool lingers = false;
  while (!stop) {
    // No second listener: poll passes over -1.
    std::vector<pollfd> polled{{listener_.get(), POLLIN, 0}, {wide_.get(), POLLIN, 0}};
    Deadline next = end.earlier(round_);
    for (const Caller& caller : callers_) {
      polled.push_back({caller.socket.get(), POLLIN, 0});
      next = next.earlier(caller.silent);
    }
    ::poll(polled.data(), polled.size(), std::min(next.isNever() ? 60000 : next.leftMs(), 60000));
    std::size_t k = 2;
    for (Caller& caller : callers_) {
      if (polled[k++].revents != 0) hear(caller);
      if (caller.silent.passed()) caller.gone = true;
    }
    acceptCallers(listener_, true);
    if (wide_.get() >= 0) acceptCallers(wide_, false);
    if (roundComplete()) answerRound();
    callers_.remove_if([](const Caller& caller) { return caller.gone; });
    if (patienceMs_ > 0) end = Deadline::never();
    const bool allLeft = ranks_ > 0 && callers_.empty() && rounds_ > 0;
    if (!allLeft) {
      lingers = false;
    } else if (everyoneCame_) {
      return;
    } else {
      // Somebody may still come, and should not wait in vain.
      if (!lingers) linger_ = Deadline::afterMs(kLateComersMs);
      lingers = true;
      if (linger_.passed()) return;
      end = linger_;
    }
    if (end.passed()) return;
  }
}

struct Places {
  std::mutex mutex;
  std::list<std::unique_ptr<Place>> open;
  std::list<std::unique_ptr<Place>> inherited;  // of the parent: their threads do not exist here
};

void endAll();
void afterForkInChild();

Places& places() {
  // Never destroyed: threads may still serve while the process ends.
  static auto& all = *new Places;
  static const int registered =
      ::pthread_atfork([] { all.mutex.lock(); }, [] { all.mutex.unlock(); }, [] { afterForkInChild(); });
  static const int atExit = std::atexit([] { endAll(); });
  (void)registered;
  (void)atExit;
  return all;
}

// The parent serves on; here is nobody who could.
void afterForkInChild() {
  Places& all = places();
  for (auto& place : all.open) place->closeListeners();
  all.inherited.splice(all.inherited.end(), all.open);
  all.mutex.unlock();
}

void endAll() {
  std::list<std::unique_ptr<Place>> ending;
  {
    std::lock_guard lock(places().mutex);
    ending.swap(places().open);
  }
  for (auto& place : ending) {
    place->stop = true;
    place->wake();
  }
  for (auto& place : ending) place->thread.join();
}

}  // namespace

namespace {

void open(const Tag& tag, Socket wide) {
  Socket listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address;
  const socklen_t bytes = wire::nameSocket(tag, address);
  if (listener.get() < 0 || ::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), bytes) != 0 ||
      ::listen(listener.get(), 4096) != 0) {
    fail(Code::systemError, std::string("cannot open a place where ranks meet: ") + std::strerror(errno));
  }
  Places& all = places();
  std::lock_guard lock(all.mutex);
  all.open.remove_if([](const std::unique_ptr<Place>& place) {
    if (!place->finished) return false;
    place->thread.join();
    return true;
  });
  all.open.push_back(std::make_unique<Place>(tag, std::move(listener), std::move(wide)));
  Place* const place = all.open.back().get();
  try {
    place->thread = startThread("a place where ranks meet", [place] {
      try {
        place->serve();
      } catch (...) {
        // Out of memory: who waits here sees the socket close.
      }
      place->wake();  // who comes now is refused, and need not wait
      place->finished = true;
    });
  } catch (...) {
    // Nobody would be served, and at the end a thread waited for that there is not.
    all.open.pop_back();
    throw;
  }
}

}  // namespace

void openMeeting(const Tag& tag) { open(tag, {}); }

void closeMeeting(const Tag& tag) {
  std::lock_guard lock(places().mutex);
  for (auto& place : places().open) {
    if (!place->isAt(tag)) continue;
    place->stop = true;
    place->wake();
  }
}

Tag openWideMeeting() {
  Tag tag = newTag();
  Socket wide = listenForElsewhere(tag.port);
  if (tag.port != 0) open(tag, std::move(wide));
  return tag;
}

Tag newTag() {
  Tag tag;
  tag.machine = machineIdentity();
  tag.magic = Tag::kMagic;
  tag.protocol = Tag::kProtocol;
  if (getentropy(tag.name, sizeof tag.name) != 0 || getentropy(tag.key, sizeof tag.key) != 0)
    fail(Code::systemError, "the kernel gives no random numbers");
  return tag;
}

Tag openMeeting() {
  const Tag tag = newTag();
  openMeeting(tag);
  return tag;
}

}  // namespace fusco::nccl
