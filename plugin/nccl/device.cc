#include "plugin/nccl/device.h"

#include <dlfcn.h>

#include <thread>
#include <utility>

#include "plugin/nccl/children.h"
#include "plugin/nccl/real.h"

namespace fusco::nccl {

namespace {

// A rank that has not come by then, after the real init has brought all ranks together, has no libfusco.
constexpr std::int64_t kPatienceMs = 5000;

// All ranks have said that they are ready to.
fuscoComm_t makeEngine(const Communicator& communicator, const fuscoUniqueId& id) {
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  config.device = fuscoDeviceCuda;
  config.gpu = communicator.device;
  config.initTimeoutMs = static_cast<int>(4 * kPatienceMs);
  fuscoComm_t engine = nullptr;
  check(fuscoCommInitRankConfig(&engine, communicator.ranks, id, communicator.rank, &config));
  for (int rank = 0; rank < communicator.ranks; ++rank) {
    int node = 0;
    if (fuscoCommNode(engine, rank, &node) == fuscoSuccess && node == 0) continue;
    fuscoCommAbort(engine);
    fail(Code::invalidUsage, "its ranks are on several nodes, and GPU memory moves within one");
  }
  return engine;
}

void vote(Communicator& communicator, bool child) {
  if (!deviceVotes()) {
    communicator.reason = setting("FUSCO_CARRY") == "none" ? "FUSCO_CARRY=none" : deviceReason();
  } else if (!communicator.tag.valid()) {
    communicator.reason = "its id bears no mark of libfusco";
  } else {
    if (child && communicator.rank == 0) openMeeting(communicator.tag);
    const Decision decision = decide(
        communicator.tag, communicator.rank, communicator.ranks, kPatienceMs, child, makeRecord(deviceReason()),
        [&](const fuscoUniqueId& id) { return makeEngine(communicator, id); }, &communicator.cancelled);
    communicator.reason = decision.reason;
    communicator.engine = decision.engine;
    communicator.carried = decision.carried;
  }
  communicator.state = State::ready;
  const std::string text = "rank " + std::to_string(communicator.rank) + " of " + std::to_string(communicator.ranks) +
                           (communicator.carried ? ": carried" : ": passed on to NCCL: " + communicator.reason);
  if (deviceVotes() && communicator.rank == 0 && !communicator.carried) {
    warn(text);
  } else {
    info(text);
  }
}

// Enters the communicator at the slot. What is still to be done for it, if anything.
std::function<void()> enterReal(ncclComm_t* slot, const Tag& tag, bool child) {
  const ncclComm_t handle = slot == nullptr ? nullptr : *slot;
  if (handle == nullptr || findCommunicator(handle)) return {};
  auto made = std::make_unique<Communicator>();
  // A non-blocking communicator that is still being made does not tell yet.
  const bool told = FUSCO_REAL(CommCount, handle, &made->ranks) == ncclSuccess &&
                    FUSCO_REAL(CommUserRank, handle, &made->rank) == ncclSuccess;
  if (told) FUSCO_REAL(CommCuDevice, handle, &made->device);
  made->tag = tag;
  if (!told) {
    made->reason = "it was made without blocking";
    made->state = State::ready;
    enter(handle, std::move(made));
    return {};
  }
  return [communicator = enter(handle, std::move(made)), child] { vote(*communicator, child); };
}

}  // namespace

const std::string& deviceReason() {
  static const std::string& reason = *new std::string([] {
    fuscoDevice_t device = fuscoDeviceHost;
    const char* why = "";
    if (fuscoGetAutoDevice(&device, &why) == fuscoSuccess && device == fuscoDeviceCuda) return std::string();
    return std::string("this process moves no GPU memory: ") + why;
  }());
  return reason;
}

bool deviceVotes() {
  const std::string carry = setting("FUSCO_CARRY");
  return carry == "all" || (carry != "none" && deviceReason().empty());
}

void noteMade(ncclResult_t result, ncclComm_t* slot, const Tag& tag, bool child) {
  if (result != ncclSuccess && result != ncclInProgress) return;
  guarded("libfusco", [&] {
    if (group().depth > 0) {
      group().later.emplace_back([slot, tag, child] {
        if (auto job = enterReal(slot, tag, child)) group().jobs.push_back(std::move(job));
      });
    } else if (const auto job = enterReal(slot, tag, child)) {
      job();
    }
  });
}

Tag noteSplit(ncclComm_t parent, int color) {
  const CommunicatorRef communicator = findCommunicator(parent);
  return communicator && communicator->carried ? splitPlace(*communicator, color) : Tag{};
}

namespace {

// The program has a libcuda when it has streams. 0 is "not captured"; a stream that may not be asked now is not either.
bool captured(cudaStream_t stream) {
  using IsCapturing = int (*)(cudaStream_t, int*);
  static const auto ask = [] {
    void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD);
    return reinterpret_cast<IsCapturing>(driver == nullptr ? nullptr : dlsym(driver, "cuStreamIsCapturing"));
  }();
  int status = 0;
  return ask != nullptr && ask(stream, &status) == 0 && status != 0;
}

}  // namespace

CommunicatorRef carrier(ncclComm_t handle, cudaStream_t stream) {
  CommunicatorRef communicator = findCommunicator(handle);
  if (!communicator) return {};
  if (communicator->state == State::ready && communicator->carried && !captured(stream)) return communicator;
  communicator->passedCalls.fetch_add(1, std::memory_order_relaxed);
  return {};
}

ncclResult_t deviceCall(const char* name, const std::function<void()>& body) {
  ncclResult_t result = guarded(name, body);
  if (group().depth > 0) {
    group().note(result);
    return result;
  }
  const Group collected = std::exchange(group(), Group{});
  if (result == ncclSuccess) result = guarded(name, [&] { runWork(collected.work); });
  return result;
}

ncclResult_t carriedError(const Communicator& communicator) {
  if (communicator.state == State::starting) return ncclInProgress;
  fuscoResult_t state = fuscoSuccess;
  if (!communicator.carried || communicator.engine == nullptr) return ncclSuccess;
  return fuscoCommGetAsyncError(communicator.engine, &state) == fuscoSuccess ? static_cast<ncclResult_t>(state)
                                                                             : ncclSuccess;
}

void deviceEnd(Communicator& communicator, bool abort) {
  communicator.cancelled = true;
  if (!communicator.carried || communicator.engine == nullptr) return;
  abort ? fuscoCommAbort(communicator.engine) : fuscoCommDestroy(communicator.engine);
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
  if (ended.error != ncclSuccess) {
    setLastError(ended.errorText);
    return ended.error;
  }
  if (result == ncclSuccess || result == ncclInProgress) {
    guarded("libfusco", [&] {
      for (const auto& look : ended.later) look();
      // One thread may have made several ranks of one communicator: they vote together.
      const auto jobs = std::exchange(group().jobs, {});
      if (!jobs.empty()) runSideBySide(jobs);
    });
    // What NCCL carries of the group is launched; now what FUSCO carries.
    if (!ended.work.empty()) {
      const ncclResult_t carried = guarded("ncclGroupEnd", [&] { runWork(ended.work); });
      if (carried != ncclSuccess) return carried;
    }
  }
  return result;
}

ncclResult_t deviceGroupSimulateEnd(ncclSimInfo_t* info) {
  const ncclResult_t result = FUSCO_REAL(GroupSimulateEnd, info);
  if (group().depth > 0 && --group().depth == 0) group() = Group{};
  return result;
}

}  // namespace fusco::nccl
