#include "engine/watch.h"

#include <chrono>

#include "base/log.h"
#include "base/thread.h"
#include "engine/engine.h"

namespace fusco::engine {

namespace {
constexpr std::chrono::milliseconds kEvery{100};
}

Watch::Watch(Engine& engine)
    : engine_(engine), thread_(startThread("who looks after the peers of a GPU's kernels", [this] { run(); })) {}

Watch::~Watch() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Watch::run() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, kEvery, [this] { return stop_; })) {
    lock.unlock();
    bool broken = true;
    try {
      broken = engine_.asyncError() != Code::success;
    } catch (const std::exception& e) {
      FUSCO_WARN("{}: nobody looks after the other ranks any longer, kernels wait for them until the time-out: {}",
                 engine_.fabric().describeRank(engine_.fabric().rank()), e.what());
    }
    lock.lock();
    if (broken) return;
  }
}

}  // namespace fusco::engine
