#include "shuffle/cuda/watchdog.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

namespace fusco::bench::gpu {

Watchdog::Watchdog(int seconds) : seconds_(seconds), thread_([this] { watch(); }) {}

Watchdog::~Watchdog() {
  {
    std::lock_guard lock(mutex_);
    leave_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Watchdog::step(const std::string& what) {
  {
    std::lock_guard lock(mutex_);
    what_ = what;
    ++turn_;
  }
  wake_.notify_all();
}

void Watchdog::watch() {
  std::unique_lock lock(mutex_);
  while (!leave_) {
    const long turn = turn_;
    if (wake_.wait_for(lock, std::chrono::seconds(seconds_), [&] { return leave_ || turn_ != turn; })) continue;
    fmt::print("# ended: {} took more than {} s (--timeout)\n", what_, seconds_);
    std::fflush(stdout);
    _exit(1);
  }
}

}  // namespace fusco::bench::gpu
