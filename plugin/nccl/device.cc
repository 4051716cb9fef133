#include "plugin/nccl/device.h"

#include <utility>

#include "plugin/nccl/children.h"
#include "plugin/nccl/gpu.h"
#include "plugin/nccl/real.h"

namespace fusco::nccl {

CommunicatorRef carrier(ncclComm_t handle, cudaStream_t stream) {
  CommunicatorRef communicator = findCommunicator(handle);
  if (!communicator) return {};
  const State state = communicator->state;
  // Before the vote and after the end nobody may carry, and the others may not agree: deviceCall says so.
  if (state == State::starting || (communicator->carried && state != State::ready)) return communicator;
  if (communicator->carried && (communicator->captures || !captured(stream))) return communicator;
  communicator->passedCalls.fetch_add(1, std::memory_order_relaxed);
  return {};
}

ncclResult_t deviceCall(const char* name, const CommunicatorRef& communicator, const std::function<void()>& body) {
  ncclResult_t result = guarded(name, [&] {
    requireUsable(*communicator);
    body();
  });
  if (group().depth > 0) {
    group().note(result);
    return result;
  }
  const Group collected = std::exchange(group(), Group{});
  if (result == ncclSuccess) result = guarded(name, [&] { runWork(collected.work); });
  return result;
}

ncclResult_t carriedError(const Communicator& communicator) {
  const State state = communicator.state;
  if (state == State::starting) return ncclInProgress;
  fuscoResult_t error = fuscoSuccess;
  if (state != State::ready || !communicator.carried) return ncclSuccess;
  return fuscoCommGetAsyncError(communicator.engine, &error) == fuscoSuccess ? static_cast<ncclResult_t>(error)
                                                                             : ncclSuccess;
}

void deviceEnd(Communicator& communicator, bool abort) {
  communicator.cancelled = true;
  {
    // They refer to it.
    std::lock_guard lock(communicator.childMutex);
    communicator.unfinished.clear();
  }
  std::lock_guard lock(communicator.endMutex);
  if (communicator.state == State::starting || communicator.state.exchange(State::finalized) != State::ready) return;
  if (!communicator.carried) return;
  abort ? fuscoCommAbort(communicator.engine) : fuscoCommDestroy(communicator.engine);
}

void deviceRevoke(ncclComm_t handle) {
  const CommunicatorRef communicator = findCommunicator(handle);
  if (!communicator) return;
  std::lock_guard lock(communicator->endMutex);
  if (communicator->state == State::starting || !communicator->carried) return;
  revoke(*communicator);
}

ncclResult_t deviceGroupStart() {
  const ncclResult_t result = FUSCO_REAL(GroupStart);
  if (result == ncclSuccess) ++group().depth;
  return result;
}

ncclResult_t deviceGroupEnd() {
  const ncclResult_t result = FUSCO_REAL(GroupEnd);
  if (group().depth == 0 || --group().depth > 0) return result;
  const Group ended = std::exchange(group(), Group{});
  if (result != ncclSuccess && result != ncclInProgress) return result;
  bool goesOn = result == ncclInProgress;
  guarded("libfusco", [&] {
    for (const auto& look : ended.later) goesOn |= look(result);
    // One thread may have made several ranks of one communicator: they vote together.
    const auto jobs = std::exchange(group().jobs, {});
    if (!jobs.empty()) runSideBySide(jobs);
  });
  if (ended.error != ncclSuccess) {
    setLastError(ended.errorText);
    return ended.error;
  }
  // What NCCL carries of the group is launched; now what FUSCO carries.
  if (!ended.work.empty()) {
    const ncclResult_t carried = guarded("ncclGroupEnd", [&] { runWork(ended.work); });
    if (carried != ncclSuccess) return carried;
  }
  return goesOn ? ncclInProgress : result;
}

ncclResult_t deviceGroupSimulateEnd(ncclSimInfo_t* info) {
  const ncclResult_t result = FUSCO_REAL(GroupSimulateEnd, info);
  // Where NCCL has no such call its group is still open.
  if (realFunction(Function::GroupSimulateEnd) == nullptr) return result;
  if (group().depth > 0 && --group().depth == 0) group() = Group{};
  return result;
}

}  // namespace fusco::nccl
