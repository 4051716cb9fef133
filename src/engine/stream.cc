#include "engine/stream.h"

#include <fmt/format.h>

#include "base/clock.h"

namespace fusco::engine {

FakeStream::FakeStream() : thread_([this] { runThread(); }) {}

FakeStream::~FakeStream() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void FakeStream::enqueue(std::function<void()> kernel) {
  {
    std::lock_guard lock(mutex_);
    kernels_.push_back(std::move(kernel));
  }
  changed_.notify_all();
}

void FakeStream::synchronize() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return kernels_.empty() && !running_; });
}

void FakeStream::runThread() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !kernels_.empty(); });
    if (kernels_.empty()) return;
    std::function<void()> kernel = std::move(kernels_.front());
    kernels_.pop_front();
    running_ = true;
    lock.unlock();
    kernel();
    kernel = nullptr;
    lock.lock();
    running_ = false;
    if (kernels_.empty()) changed_.notify_all();
  }
}

void StreamDriver::encode(const std::shared_ptr<Operation>& operation) {
  engine_.checkUsable();
  operation->enter();
  bool begins = true;
  for (const int stage : operation->stages()) {
    launch({operation, stage, begins, {}});
    begins = false;
  }
}

void StreamDriver::call(std::function<void()> work) { launch({nullptr, 0, false, std::move(work)}); }

void StreamDriver::beginCapture() {
  if (capturing_)
    fail(Code::invalidUsage, fmt::format("rank {}: this stream is being captured already", engine_.fabric().rank()));
  capturing_ = true;
  captured_.clear();
}

StreamDriver::Graph StreamDriver::endCapture() {
  if (!capturing_)
    fail(Code::invalidUsage, fmt::format("rank {}: this stream is not being captured", engine_.fabric().rank()));
  capturing_ = false;
  return std::move(captured_);
}

void StreamDriver::replay(const Graph& graph) {
  engine_.checkUsable();
  for (const Launch& recorded : graph) launch(recorded);
}

void StreamDriver::launch(Launch launch) {
  if (capturing_) {
    captured_.push_back(std::move(launch));
    return;
  }
  stream_.enqueue([this, launch = std::move(launch)] { run(launch); });
}

void StreamDriver::run(const Launch& launch) {
  if (launch.operation == nullptr) {
    launch.work();
    return;
  }
  // Behind a failure nothing runs any more: the stream is drained, not stuck.
  if (status_.load(std::memory_order_acquire) != 0) {
    launch.operation->clearCounts();
    return;
  }
  try {
    runStage(launch);
  } catch (...) {
    const Code code = engine_.abandon(*launch.operation, std::current_exception());
    status_.store(static_cast<std::uint32_t>(code), std::memory_order_release);
  }
}

// A kernel: it waits for peers, bounded by the abort word and the deadline of its operation.
void StreamDriver::runStage(const Launch& launch) {
  Operation& operation = *launch.operation;
  if (launch.begins) {
    const std::int64_t limit = engine_.config().operationTimeoutMs;
    deadlineNs_ = limit > 0 ? nowNs() + limit * 1'000'000 : 0;
    for (;;) {
      const std::uint32_t seen = engine_.bell();
      if (engine_.tryBegin(operation)) break;
      engine_.fabric().check();
      checkDeadline(operation);
      engine_.rest(seen, 1000);
    }
  }
  for (;;) {
    const std::uint32_t seen = engine_.bell();
    const Outcome outcome = engine_.runStage(operation, launch.stage);
    if (outcome == Outcome::complete) return;
    if (outcome == Outcome::moved) continue;
    checkDeadline(operation);
    engine_.rest(seen);
  }
}

void StreamDriver::checkDeadline(const Operation& operation) const {
  if (deadlineNs_ == 0 || nowNs() <= deadlineNs_) return;
  fail(Code::remoteError,
       fmt::format(
           "rank {}: {} did not finish within {} ms on its stream; look at the rank that is waited for, or raise "
           "FUSCO_OPERATION_TIMEOUT_MS",
           engine_.fabric().rank(), operation.describe(), engine_.config().operationTimeoutMs));
}

}  // namespace fusco::engine
