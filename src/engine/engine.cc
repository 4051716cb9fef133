#include "engine/engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "base/clock.h"
#include "base/log.h"
#include "base/thread.h"
#include "engine/device/domain.h"
#include "engine/device/peers.h"
#include "engine/watch.h"

namespace fusco::engine {

namespace {
// An operation in which nothing moves is told of after the first, then after each further of the second.
constexpr std::int64_t kStallWarningNs = 10'000'000'000;
constexpr std::int64_t kStallAgainNs = 60'000'000'000;
// A step takes milliseconds: so long an abort waits for the one that another thread of this rank is in.
constexpr std::int64_t kStepMs = 1000;

class Moving {
 public:
  explicit Moving(comm::Fabric& fabric) : fabric_(fabric) { fabric_.moveBegins(); }
  ~Moving() { fabric_.moveEnds(); }
  Moving(const Moving&) = delete;
  Moving& operator=(const Moving&) = delete;

 private:
  comm::Fabric& fabric_;
};
}  // namespace

Engine::Engine(std::unique_ptr<comm::Fabric> fabric, const EngineConfig& config)
    : fabric_(std::move(fabric)),
      config_(config),
      executor_(&exec::hostExecutor()),
      balancer_(*fabric_, config.balance) {
  const int rank = fabric_->rank();
  const auto members = topology().ranksOf(topology().nodeOf(rank));
  nodeRanks_.assign(members.begin(), members.end());
  localIndex_ = topology().localIndex(rank);
  for (auto& slot : staging_) {
    for (WindowBuffer& window : slot) window = WindowBuffer(&ledger_);
  }
  for (Buffer& scratch : scratch_) scratch = buffer();
  for (auto& pair : transfers_) pair.assign(static_cast<std::size_t>(fabric_->ranks()), 0);
  listWindow_ = WindowBuffer(&ledger_);
  for (WindowBuffer& window : countsWindow_) window = WindowBuffer(&ledger_);
  planner_ = std::make_unique<plan::Planner>(topology(), rank);
}

Engine::~Engine() {
  if (device_ != nullptr) leaveDevice();
  watch_.reset();
  {
    std::lock_guard lock(threadMutex_);
    stop_ = true;
  }
  threadWake_.notify_all();
  if (thread_.joinable()) thread_.join();
  // Nobody is to touch the tensors of what was started and has not finished when their owner gets them back.
  try {
    std::lock_guard lock(mutex_);
    const bool open = std::any_of(queue_.begin(), queue_.end(), [](const auto& one) { return !one->finished; });
    if (!open) return;
    const std::string reason = fmt::format(
        "{} destroyed its communicator while an operation was under way that it had started; call fuscoFinish for it "
        "before",
        fabric_->describeRank(fabric_->rank()));
    tellAborted(reason);
    dropOpen(reason);
  } catch (const std::exception& e) {
    FUSCO_WARN("operations that had not finished when their communicator was destroyed: {}", e.what());
  }
}

std::byte* Engine::staging(int slot, int direction, std::size_t bytes) {
  if (config_.maxStagingBytes > 0 && bytes > static_cast<std::size_t>(config_.maxStagingBytes)) {
    fail(Code::invalidUsage,
         fmt::format("rank {}: rows in private memory need a window of {} bytes, maxStagingBytes allows {}; use "
                     "fuscoMemAlloc for the "
                     "tensor, allow process_vm (FUSCO_PROCESS_VM=1), or raise FUSCO_MAX_STAGING_BYTES",
                     fabric_->rank(), bytes, config_.maxStagingBytes));
  }
  return staging_[slot][direction].need(bytes);
}

// Launches have some time to end; then nobody waits any longer, and nobody else is to hear of that.
void Engine::leaveDevice() {
  constexpr int kPatienceMs = 5000, kGraceMs = 1000;
  if (devicePeers_ != nullptr) {
    std::lock_guard lock(mutex_);
    devicePeers_->leave();
  }
  const bool ended = device_->ends(kPatienceMs);
  watch_.reset();
  device_->endWaits();
  if (ended) return;
  FUSCO_WARN(
      "{}: operations on GPU {} had not ended when their communicator was destroyed; what they write is undefined",
      fabric_->describeRank(fabric_->rank()), device_->device());
  device_->ends(kGraceMs);
}

void Engine::useDevice(int device, int maxSms, std::int64_t timeoutMs) {
  device_ = std::make_shared<DeviceDomain>(*this, device, maxSms, timeoutMs);
  devicePeers_ = std::make_shared<DevicePeers>(*this, *device_, timeoutMs);
  if (device_->meetsOnGpu()) watch_ = std::make_unique<Watch>(*this);
  if (topology().nodes() == 1) return;
  deviceExecutor_ = std::make_unique<exec::CudaExecutor>(device, maxSms, ledger_.bytes);
  executor_ = deviceExecutor_.get();
}

bool Engine::capturesTransfers() const { return devicePeers_ != nullptr && devicePeers_->eachCaptures(); }

void Engine::adoptSlots(const transport::PostedLink& link, const std::byte* slot) {
  if (deviceExecutor_ == nullptr || deviceExecutor_->adopted(slot)) return;
  for (const transport::Segment& memory : link.slotMemory()) deviceExecutor_->adopt(memory.address, memory.bytes);
}

std::byte* Engine::payloadOut(transport::PostedLink& link, std::byte* inSlot) {
  adoptSlots(link, inSlot);
  std::byte* const mirror = link.mirrorOf(inSlot);
  return mirror != nullptr ? mirror : inSlot;
}

const std::byte* Engine::payloadIn(transport::PostedLink& link, const std::byte* inSlot) {
  adoptSlots(link, inSlot);
  const std::byte* const mirror = link.arrivedMirror(inSlot);
  return mirror != nullptr ? mirror : inSlot;
}

std::shared_ptr<Submission> Engine::submit(std::unique_ptr<Operation> operation, bool async) {
  auto submission = std::make_shared<Submission>();
  submission->operation = std::move(operation);
  if (async) {
    // Before anything is queued: what was refused must not be carried out later.
    std::lock_guard lock(threadMutex_);
    if (!thread_.joinable()) thread_ = startThread("started operations", [this] { runThread(); });
  }
  {
    std::lock_guard lock(mutex_);
    submission->operation->enter();
    queue_.push_back(submission);
    if (async) started_.push_back(submission);
  }
  if (async) {
    std::lock_guard lock(threadMutex_);
    ++asyncOpen_;
    threadWake_.notify_one();
  }
  return submission;
}

void Engine::failOperation(Submission& submission, std::exception_ptr error) {
  submission.error = error;
  submission.operation->giveUp();
  submission.finished = true;
  // What all ranks have seen before anything moved leaves nothing half done. Anything else breaks the communicator, and
  // the others are told why.
  try {
    std::rethrow_exception(error);
  } catch (const CommonError&) {
    return;
  } catch (...) {
    breakDown(error);
    fabric_->awaitMoves();
  }
}

namespace {
const std::string kUsagePrefix = "invalid usage: ";
}

Code Engine::breakDown(std::exception_ptr error) {
  Code code = Code::internalError;
  std::string text = "unknown failure";
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    code = e.code();
    text = e.what();
  } catch (const std::exception& e) {
    text = e.what();
  }
  {
    std::lock_guard lock(errorMutex_);
    if (error_ == Code::success) {
      error_ = code;
      errorText_ = text;
    }
  }
  // Ranks that disagree are all told so: the code travels in front of the text.
  fabric_->abort(code == Code::invalidUsage && text.rfind(kUsagePrefix, 0) != 0 ? kUsagePrefix + text : text);
  if (device_ != nullptr) device_->endWaits();
  return code;
}

bool Engine::tryBegin(Operation& operation) {
  std::lock_guard lock(mutex_);
  bool& held = channelHeld_[operation.channel()];
  for (const auto& submission : queue_) {
    if (submission->begun && !submission->finished && submission->operation->channel() == operation.channel())
      return false;
  }
  if (held) return false;
  operation.begin();
  held = true;
  return true;
}

Outcome Engine::runStage(Operation& operation, int stage) {
  std::lock_guard lock(mutex_);
  const Outcome outcome = [&] {
    const Moving moving(*fabric_);
    return operation.advanceStage(stage);
  }();
  if (outcome == Outcome::idle) fabric_->checkAwaited([&](int rank) { return operation.waitsFor(rank); });
  idleOnLinks_ = outcome == Outcome::idle && operation.waitsForLinks();
  if (operation.complete()) {
    channelHeld_[operation.channel()] = false;
    ++statistics_.operations;
  }
  return outcome;
}

Code Engine::abandon(Operation& operation, std::exception_ptr error) {
  std::lock_guard lock(mutex_);
  operation.clearCounts();
  operation.giveUp();
  const Code code = breakDown(error);
  fabric_->awaitMoves();
  return code;
}

bool Engine::advance(Submission& submission) {
  Operation& operation = *submission.operation;
  try {
    if (!submission.begun) {
      operation.begin();
      submission.begun = true;
      submission.movedNs = nowNs();
      submission.warnNs = submission.movedNs + kStallWarningNs;
      if (config_.operationTimeoutMs > 0) submission.deadlineNs = nowNs() + config_.operationTimeoutMs * 1'000'000;
    }
    const bool moved = [&] {
      const Moving moving(*fabric_);
      return operation.advance();
    }();
    if (operation.complete() && fabric_->settled()) {
      submission.finished = true;
      ++statistics_.operations;
      return true;
    }
    if (!moved) {
      fabric_->checkAwaited([&](int rank) { return operation.waitsFor(rank); });
      const std::int64_t now = nowNs();
      if (now > submission.warnNs) {
        FUSCO_WARN("rank {}: {} has not moved for {} s; waiting goes on{}", fabric_->rank(), operation.describe(),
                   (now - submission.movedNs) / 1'000'000'000,
                   submission.deadlineNs == 0 ? ""
                                              : fmt::format(" for at most {} s (FUSCO_OPERATION_TIMEOUT_MS)",
                                                            (submission.deadlineNs - now) / 1'000'000'000));
        submission.warnNs = now + kStallAgainNs;
      }
      if (submission.deadlineNs != 0 && now > submission.deadlineNs) {
        fail(Code::remoteError,
             fmt::format("rank {}: {} did not finish within {} ms; look at the rank that is waited for, or raise "
                         "FUSCO_OPERATION_TIMEOUT_MS",
                         fabric_->rank(), operation.describe(), config_.operationTimeoutMs));
      }
    } else {
      submission.movedNs = nowNs();
      submission.warnNs = submission.movedNs + kStallWarningNs;
    }
    return moved;
  } catch (const CommonError&) {
    failOperation(submission, std::current_exception());
  } catch (const Error& e) {
    const std::string text = ownText(e.code(), e.what(), fabric_->describeRank(fabric_->rank()));
    const bool usage = e.code() == Code::remoteError && text.find(kUsagePrefix) != std::string::npos;
    const Code code = usage ? Code::invalidUsage : e.code();
    const std::string during =
        text.find(operationName(operation.kind())) == std::string::npos ? " (during " + operation.describe() + ")" : "";
    failOperation(submission, std::make_exception_ptr(Error(code, text + during)));
  } catch (...) {
    failOperation(submission, std::current_exception());
  }
  return true;
}

bool Engine::progress() {
  std::lock_guard lock(mutex_);
  bool moved = false;
  bool onLinks = false;
  bool channelBusy[kChannels];
  std::copy_n(channelHeld_, kChannels, channelBusy);
  int active = 0;
  // On GPUs of one node all ranks launch shuffles in one order, since kernels of the one may wait for the other's.
  const bool launches = device_ != nullptr && deviceExecutor_ == nullptr && !device_->waitsOnHost();
  bool launching = false;
  for (std::size_t i = 0; i < queue_.size() && active < kChannels; ++i) {
    Submission& submission = *queue_[i];
    if (submission.finished) continue;
    const OperationKind kind = submission.operation->kind();
    if (launches && kind != OperationKind::transfers) {
      if (launching && kind != OperationKind::plan) continue;
      launching = true;
    } else if (launching && device_->meetsOnGpu()) {
      continue;  // transfers neither: their kernels wait, too
    }
    bool& busy = channelBusy[submission.operation->channel()];
    // In order: an operation waits for the one before it on its channel, planning for all before it.
    if (busy || (i > 0 && kind == OperationKind::plan)) break;
    busy = true;
    ++active;
    moved |= advance(submission);
    onLinks |= !submission.finished && submission.operation->waitsForLinks();
  }
  idleOnLinks_ = onLinks;
  while (!queue_.empty() && queue_.front()->finished) queue_.pop_front();
  return moved;
}

void Engine::rest(std::uint32_t bell, std::int64_t microseconds) {
  StageTimer timer(idleOnLinks_ ? statistics_.wireNs : statistics_.waitNs);
  fabric_->sleep(bell, microseconds);
}

void Engine::wait(const std::shared_ptr<Submission>& submission) {
  for (;;) {
    const std::uint32_t seen = bell();
    const bool moved = progress();
    {
      std::lock_guard lock(mutex_);
      if (submission->finished) break;
    }
    if (!moved) rest(seen);
  }
  if (submission->error) std::rethrow_exception(submission->error);
}

void Engine::finishOldest() {
  std::shared_ptr<Submission> oldest;
  {
    std::lock_guard lock(mutex_);
    if (started_.empty()) fail(Code::invalidUsage, "nothing was started on this communicator");
    oldest = started_.front();
    started_.pop_front();
  }
  const auto close = [this] {
    std::lock_guard lock(threadMutex_);
    --asyncOpen_;
  };
  try {
    wait(oldest);
  } catch (...) {
    close();
    throw;
  }
  close();
}

int Engine::startedOperations() {
  std::lock_guard lock(mutex_);
  return static_cast<int>(started_.size());
}

void Engine::finishAll() {
  while (startedOperations() > 0) finishOldest();
}

void Engine::runThread() {
  std::unique_lock lock(threadMutex_);
  while (!stop_) {
    if (asyncOpen_ == 0) {
      threadWake_.wait(lock);
      continue;
    }
    lock.unlock();
    const std::uint32_t seen = bell();
    bool open;
    {
      std::lock_guard queueLock(mutex_);
      open = !queue_.empty();
    }
    const bool moved = open && progress();
    lock.lock();
    if (!open) {
      // Started operations have finished and only wait to be fetched.
      threadWake_.wait_for(lock, std::chrono::milliseconds(20));
    } else if (!moved) {
      lock.unlock();
      rest(seen);
      lock.lock();
    }
  }
}

void Engine::checkUsable() {
  std::lock_guard lock(errorMutex_);
  if (error_ != Code::success) fail(error_, fmt::format("this communicator is broken: {}", errorText_));
}

void Engine::hearComplaints() {
  if (!devicePeers_) return;
  // Who holds the lock is not waited for: the next time then.
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock) devicePeers_->hearComplaints();
}

Code Engine::asyncError() {
  {
    std::lock_guard lock(errorMutex_);
    if (error_ != Code::success) return error_;
  }
  // Who only polls this, as watchdogs do, waits in no operation that would find out.
  try {
    hearComplaints();
    fabric_->checkPeers();
    if (device_ != nullptr) device_->checkArrivals();
  } catch (const Error&) {
    breakDown(std::current_exception());
  }
  std::lock_guard lock(errorMutex_);
  return error_;
}

std::string Engine::asyncErrorText() {
  std::lock_guard lock(errorMutex_);
  return errorText_;
}

void Engine::tellAborted(const std::string& reason) {
  {
    std::lock_guard lock(errorMutex_);
    if (error_ == Code::success) {
      error_ = Code::remoteError;
      errorText_ = reason;
    }
  }
  fabric_->abort(reason);
  if (device_ != nullptr) device_->endWaits();
  // Of peers; of this rank who moves holds the lock.
  fabric_->awaitMoves();
}

// Under the lock. Who waits for one of them, in another thread, is told when it next looks.
void Engine::dropOpen(const std::string& reason) {
  for (const auto& submission : queue_) {
    if (submission->finished) continue;
    submission->error = std::make_exception_ptr(
        Error(Code::remoteError, reason + " (during " + submission->operation->describe() + ")"));
    submission->operation->giveUp();
    submission->finished = true;
  }
}

void Engine::abort(const std::string& reason) {
  tellAborted(reason);
  // A thread that is inside a step ends it and finds out; it may be stuck there, or be the one that calls this.
  const Deadline patience = Deadline::afterMs(kStepMs);
  std::unique_lock lock(mutex_, std::try_to_lock);
  while (!lock && !patience.passed()) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    static_cast<void>(lock.try_lock());
  }
  if (lock) dropOpen(reason);
}

}  // namespace fusco::engine
