#include "transport/tcp/reactor.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "base/thread.h"

namespace fusco::transport {

namespace {

// What one connection or timer could not do (memory is short, the kernel watches no more descriptors) must not end the
// process: who waits for it has time-outs.
template <typename Call, typename... Arguments>
void attempt(const Call& call, Arguments... arguments) {
  try {
    call(arguments...);
  } catch (const std::exception& error) {
    FUSCO_WARN(
        "a connection of this process is not served any more: {}; calls that wait for it end by their time-outs; look "
        "whether memory or descriptors (`ulimit -n`) are short",
        error.what());
  }
}

// A connection is up as long as any process holds it. A child that is forked off gets a copy of each; were they left
// there, the peers would not see the end of a parent that dies while the child lives on. The numbers stay taken, since
// what owns them has its memory in the child, too. No lock: one of its parent's might be held.
class Inherited {
 public:
  void enter(int descriptor) { word(descriptor).fetch_or(bit(descriptor), std::memory_order_relaxed); }
  void leave(int descriptor) { word(descriptor).fetch_and(~bit(descriptor), std::memory_order_relaxed); }

  // In the child. Without a descriptor to put in their place they stay.
  void giveUp() {
    int nothing = -1;
    for (std::size_t i = 0; i < words_.size(); ++i) {
      // Pages that were never written to stay the parent's.
      if (words_[i].load(std::memory_order_relaxed) == 0) continue;
      if (nothing < 0) nothing = ::eventfd(0, EFD_CLOEXEC);
      std::uint64_t held = words_[i].exchange(0, std::memory_order_relaxed);
      for (; held != 0 && nothing >= 0; held &= held - 1) {
        ::dup3(nothing, static_cast<int>(i) * 64 + std::countr_zero(held), O_CLOEXEC);
      }
    }
    if (nothing >= 0) ::close(nothing);
  }

 private:
  static constexpr int kMost = 1 << 20;  // as the kernel has it by default
  static std::uint64_t bit(int descriptor) { return std::uint64_t{1} << descriptor % 64; }
  // Of those that are beyond nothing is known.
  std::atomic<std::uint64_t>& word(int descriptor) {
    return descriptor < kMost ? words_[static_cast<std::size_t>(descriptor / 64)] : beyond_;
  }

  std::array<std::atomic<std::uint64_t>, kMost / 64> words_{};
  std::atomic<std::uint64_t> beyond_{0};
};

constinit Inherited inherited;

void giveUpInChildren() {
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { inherited.giveUp(); });
  static_cast<void>(registered);
}

}  // namespace

Reactor::Reactor() : process_(::getpid()) { giveUpInChildren(); }

Reactor::~Reactor() {
  if (ofThisProcess()) {
    // Of who was not made to its end, and so has removed nothing.
    for (const auto& [descriptor, key] : keys_) inherited.leave(descriptor);
  }
  if (!thread_.joinable()) return;
  if (!ofThisProcess()) {
    // A child that was forked off has no such thread, and shares the epoll with its parent: nothing is taken from it.
    thread_.detach();
    return;
  }
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake();
  thread_.join();
}

bool Reactor::ofThisProcess() const { return ::getpid() == process_; }

// Under the lock. Descriptors and thread come with the first use.
void Reactor::start() {
  if (thread_.joinable()) return;
  epoll_ = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) failErrno("cannot make an epoll (raise `ulimit -n` if descriptors are short)");
  wakeUp_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wakeUp_) failErrno("cannot make an eventfd (raise `ulimit -n` if descriptors are short)");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = 0;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wakeUp_.get(), &event) != 0) failErrno("cannot watch an eventfd");
  thread_ = startThread("the links between nodes", [this] { run(); });
}

void Reactor::wake() {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wakeUp_.get(), &one, sizeof(one));
}

void Reactor::add(int descriptor, Call call) {
  std::lock_guard lock(mutex_);
  start();
  const std::uint64_t key = nextKey_++;
  epoll_event event{};
  event.data.u64 = key;  // no events: nothing is reported but that the connection broke, and that once
  event.events = EPOLLONESHOT;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, descriptor, &event) != 0) failErrno("cannot watch a socket");
  watched_.emplace(key, Watched{descriptor, std::move(call)});
  keys_[descriptor] = key;
  inherited.enter(descriptor);
}

void Reactor::arm(int descriptor, std::uint32_t events) {
  std::lock_guard lock(mutex_);
  const auto found = keys_.find(descriptor);
  if (found == keys_.end()) return;
  epoll_event event{};
  event.data.u64 = found->second;
  event.events = events | EPOLLONESHOT;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, descriptor, &event) != 0) failErrno("cannot watch a socket");
}

void Reactor::awaitEnd(std::unique_lock<std::mutex>& lock, std::uint64_t key) {
  if (std::this_thread::get_id() == thread_.get_id()) return;
  ended_.wait(lock, [&] { return running_ != key; });
}

void Reactor::remove(int descriptor) {
  if (!ofThisProcess()) return;
  std::unique_lock lock(mutex_);
  const auto found = keys_.find(descriptor);
  if (found == keys_.end()) {
    // Perhaps its call, which still runs, has removed it itself.
    if (runningDescriptor_ == descriptor) awaitEnd(lock, running_);
    return;
  }
  const std::uint64_t key = found->second;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, descriptor, nullptr);
  inherited.leave(descriptor);
  keys_.erase(found);
  // The call itself may be what removes: it lives until it has returned (run()).
  watched_.erase(key);
  awaitEnd(lock, key);
}

void Reactor::settle() {
  if (!ofThisProcess()) return;
  std::unique_lock lock(mutex_);
  if (running_ != 0) awaitEnd(lock, running_);
}

std::uint64_t Reactor::every(std::int64_t milliseconds, std::function<void()> call) {
  std::lock_guard lock(mutex_);
  start();
  const std::uint64_t key = nextKey_++;
  const std::int64_t ns = std::max<std::int64_t>(1, milliseconds) * 1'000'000;
  timers_.emplace(key, Timer{ns, nowNs() + ns, std::move(call)});
  wake();
  return key;
}

void Reactor::cancel(std::uint64_t timer) {
  if (!ofThisProcess()) return;
  std::unique_lock lock(mutex_);
  timers_.erase(timer);
  awaitEnd(lock, timer);
}

int Reactor::untilNextTimerMs() const {
  if (timers_.empty()) return -1;
  std::int64_t next = INT64_MAX;
  for (const auto& [key, timer] : timers_) next = std::min(next, timer.nextNs);
  return static_cast<int>(std::clamp<std::int64_t>((next - nowNs() + 999'999) / 1'000'000, 0, 60'000));
}

void Reactor::runTimers(std::unique_lock<std::mutex>& lock) {
  const std::int64_t now = nowNs();
  std::vector<std::uint64_t> due;
  for (const auto& [key, timer] : timers_) {
    if (timer.nextNs <= now) due.push_back(key);
  }
  for (const std::uint64_t key : due) {
    const auto found = timers_.find(key);
    if (found == timers_.end()) continue;
    found->second.nextNs = now + found->second.everyNs;
    const std::function<void()> call = found->second.call;
    running_ = key;
    lock.unlock();
    attempt(call);
    lock.lock();
    running_ = 0;
    ended_.notify_all();
  }
}

void Reactor::run() {
  std::array<epoll_event, 64> events;
  std::unique_lock lock(mutex_);
  while (!stop_) {
    const int timeout = untilNextTimerMs();
    lock.unlock();
    const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout);
    lock.lock();
    for (int i = 0; i < count && !stop_; ++i) {
      const std::uint64_t key = events[static_cast<std::size_t>(i)].data.u64;
      if (key == 0) {
        std::uint64_t counted;
        [[maybe_unused]] const ssize_t got = ::read(wakeUp_.get(), &counted, sizeof(counted));
        continue;
      }
      const auto found = watched_.find(key);
      if (found == watched_.end()) continue;  // removed meanwhile
      const Call call = found->second.call;
      running_ = key;
      runningDescriptor_ = found->second.descriptor;
      lock.unlock();
      attempt(call, events[static_cast<std::size_t>(i)].events);
      lock.lock();
      running_ = 0;
      runningDescriptor_ = -1;
      ended_.notify_all();
    }
    runTimers(lock);
  }
}

void Reactor::join(Attended* attended) {
  std::lock_guard lock(attendedMutex_);
  attended_.push_back(attended);
  joined_.fetch_add(1, std::memory_order_relaxed);
}

void Reactor::leave(Attended* attended) {
  if (!ofThisProcess()) return;
  std::lock_guard lock(attendedMutex_);
  const auto found = std::find(attended_.begin(), attended_.end(), attended);
  if (found == attended_.end()) return;
  attended_.erase(found);
  joined_.fetch_sub(1, std::memory_order_relaxed);
}

bool Reactor::poke() {
  if (!attends()) return false;
  std::lock_guard lock(attendedMutex_);
  bool moved = false;
  for (Attended* attended : attended_) moved |= attended->poke();
  return moved;
}

void Reactor::attend() {
  if (!attends()) return;
  std::lock_guard lock(attendedMutex_);
  for (Attended* attended : attended_) attended->attend();
}

}  // namespace fusco::transport
