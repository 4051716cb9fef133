// One thread with epoll that serves sockets: it runs what must go on while nobody waits in a call, and wakes who
// sleeps. The thread is made with the first socket, is asleep as long as nothing was asked for, and is joined by the
// destructor.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "base/handle.h"

namespace fusco::transport {

// Who does its own input and output as long as somebody is awake, and wants to be told of arrivals only when nobody is.
class Attended {
 public:
  virtual ~Attended() = default;
  // Reads and writes what can be without waiting; true if something has arrived (a slice, a credit, an end).
  virtual bool poke() = 0;
  // From now on the reactor tells of arrivals (Reactor::arm). Called after poke() found nothing, before somebody
  // sleeps.
  virtual void attend() = 0;
};

class Reactor {
 public:
  using Call = std::function<void(std::uint32_t events)>;  // epoll's bits; runs on the reactor's thread

  Reactor();
  ~Reactor();
  Reactor(const Reactor&) = delete;
  Reactor& operator=(const Reactor&) = delete;

  // Knows the descriptor from now on; nothing is reported before arm(). The descriptor must stay open until remove(). A
  // child that is forked off meanwhile has something else under its number, and so does not keep the connection up.
  void add(int descriptor, Call call);
  // Reports once, the next time that one of `events` (EPOLLIN, EPOLLOUT) holds or the connection has broken; at once if
  // it does already. Replaces what was asked for before.
  void arm(int descriptor, std::uint32_t events);
  // After its return the call neither runs nor will run (unless it is the call itself that removes), whoever has
  // removed it first.
  void remove(int descriptor);
  // Returns once the call that runs at the moment, whosever it is, has returned: for who has to outlive calls whose
  // descriptors it no longer knows.
  void settle();

  // Calls about every so many milliseconds on the reactor's thread until it is cancelled; cancel() as remove().
  std::uint64_t every(std::int64_t milliseconds, std::function<void()> call);
  void cancel(std::uint64_t timer);

  // For a fabric's sleep(): first poke(), some times over if it wants to spin; then attend(), then sleep on the bell
  // that was read before. Whatever arrives after attend() rings by itself, so that no wake-up is lost.
  void join(Attended* attended);
  void leave(Attended* attended);
  bool poke();
  void attend();
  bool attends() const { return joined_.load(std::memory_order_relaxed) != 0; }

 private:
  struct Watched {
    int descriptor;
    Call call;
  };
  struct Timer {
    std::int64_t everyNs;
    std::int64_t nextNs;
    std::function<void()> call;
  };

  void run();
  void start();
  void wake();
  void awaitEnd(std::unique_lock<std::mutex>& lock, std::uint64_t key);
  void runTimers(std::unique_lock<std::mutex>& lock);
  int untilNextTimerMs() const;
  bool ofThisProcess() const;

  const int process_;
  UniqueFd epoll_;
  UniqueFd wakeUp_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::map<std::uint64_t, Watched> watched_;  // by key
  std::map<int, std::uint64_t> keys_;         // by descriptor
  std::map<std::uint64_t, Timer> timers_;
  std::uint64_t nextKey_ = 1;
  std::uint64_t running_ = 0;    // key of the call that runs
  int runningDescriptor_ = -1;  // what it was called for, if it was for a descriptor
  bool stop_ = false;
  std::thread thread_;

  std::mutex attendedMutex_;
  std::vector<Attended*> attended_;
  std::atomic<int> joined_{0};
};

}  // namespace fusco::transport
