#include "api/state.h"

#include <fmt/format.h>
#include <unistd.h>

#include <system_error>
#include <unordered_map>

#include "api/group.h"
#include "base/environment.h"
#include "base/log.h"
#include "base/thread.h"
#include "engine/device/nic_memory.h"
#include "exec/cuda.h"
#include "exec/ranges.h"

namespace fusco::api {

namespace {

// Each slice from or to a GPU has a price of its own: a launch, a copy, an event, and the question whether it has come.
constexpr std::int64_t kSliceBytes = 256 << 10, kSliceBytesOfGpu = 1 << 20;

std::string& lastError() { return ofThisThread<std::string, struct LastError>(); }

template <class Handle, class State>
class Registry {
 public:
  // Never destroyed: threads may still hold communicators while the process ends.
  static Registry& instance() {
    static auto& one = *new Registry;
    // A child asks for handles of its parent, and is told.
    holdAtForks<[]() -> std::mutex& { return one.mutex_; }>();
    return one;
  }
  Handle add(std::shared_ptr<State> state) {
    std::lock_guard lock(mutex_);
    // Handles are numbers, never given twice: use after destroy is found.
    const auto handle = reinterpret_cast<Handle>(next_ += 16);
    live_.emplace(handle, std::move(state));
    return handle;
  }
  std::shared_ptr<State> find(Handle handle) {
    std::lock_guard lock(mutex_);
    const auto found = live_.find(handle);
    return found == live_.end() ? nullptr : found->second;
  }
  std::shared_ptr<State> remove(Handle handle) {
    std::lock_guard lock(mutex_);
    const auto found = live_.find(handle);
    if (found == live_.end()) return nullptr;
    auto state = std::move(found->second);
    live_.erase(found);
    return state;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<Handle, std::shared_ptr<State>> live_;
  std::uintptr_t next_ = 0x1000;
};

Registry<fuscoComm_t, CommState>& comms() { return Registry<fuscoComm_t, CommState>::instance(); }
Registry<fuscoPlan_t, PlanHandleState>& planRegistry() { return Registry<fuscoPlan_t, PlanHandleState>::instance(); }

template <class State>
std::shared_ptr<State> known(std::shared_ptr<State> state, const char* what, const void* handle) {
  if (state == nullptr) {
    fail(Code::invalidArgument, handle == nullptr
                                    ? fmt::format("{} is NULL", what)
                                    : fmt::format("{} {} does not exist (any more): was it destroyed?", what, handle));
  }
  return state;
}

}  // namespace

CommState::~CommState() {
  if (initThread.joinable()) initThread.join();
}

fuscoComm_t addComm(std::shared_ptr<CommState> state) { return comms().add(std::move(state)); }

void checkFork(const CommState& state) {
  if (state.pid != getpid()) {
    fail(Code::invalidUsage,
         fmt::format(
             "rank {}: this communicator was made by process {}, a fork cannot use it (this is process {}); make a "
             "new one here",
             state.rank, state.pid, getpid()));
  }
}

std::shared_ptr<CommState> findCommAnyState(fuscoComm_t comm) {
  return known(comms().find(comm), "communicator", comm);
}

std::shared_ptr<CommState> findComm(fuscoComm_t comm) {
  auto state = findCommAnyState(comm);
  checkFork(*state);
  if (!state->ready)
    fail(Code::invalidUsage, "the communicator is not ready yet: wait until fuscoCommGetAsyncError says fuscoSuccess");
  if (state->initError != Code::success) fail(state->initError, state->initErrorText);
  state->engine->checkUsable();
  return state;
}

std::shared_ptr<CommState> removeComm(fuscoComm_t comm) { return known(comms().remove(comm), "communicator", comm); }

fuscoPlan_t addPlan(std::shared_ptr<PlanHandleState> state) { return planRegistry().add(std::move(state)); }

std::shared_ptr<PlanHandleState> findPlan(fuscoPlan_t plan) {
  auto state = known(planRegistry().find(plan), "plan", plan);
  checkFork(*state->comm);
  return state;
}

std::shared_ptr<PlanHandleState> removePlan(fuscoPlan_t plan) {
  return known(planRegistry().remove(plan), "plan", plan);
}

void setLastError(const std::string& text) { lastError() = text; }
const std::string& threadLastError() { return lastError(); }

fuscoResult_t guarded(const char* function, const std::function<void()>& body) {
  const exec::Range range(function);
  Code code = Code::internalError;
  try {
    body();
    return fuscoSuccess;
  } catch (const Error& e) {
    code = e.code();
    lastError() = fmt::format("{}: {}", function, e.what());
  } catch (const std::bad_alloc&) {
    code = Code::systemError;
    lastError() = fmt::format("{}: memory is short", function);
  } catch (const std::system_error& e) {
    code = Code::systemError;
    const bool threads = e.code() == std::errc::resource_unavailable_try_again;
    lastError() = fmt::format("{}: {}", function, threads ? noThreadText("this call", e.what()) : e.what());
  } catch (const std::exception& e) {
    lastError() = fmt::format("{}: {}", function, e.what());
  } catch (...) {
    lastError() = fmt::format("{}: unknown failure", function);
  }
  if (inGroup()) noteGroupError(code, lastError());
  FUSCO_WARN("{}", lastError());
  return static_cast<fuscoResult_t>(code);
}

void checkStruct(const char* name, std::size_t size, unsigned magic, std::size_t expectedSize, unsigned expectedMagic) {
  // Size, magic and version are there in every version.
  if (magic != expectedMagic || size < sizeof(std::size_t) + 2 * sizeof(unsigned) || size > expectedSize) {
    fail(
        Code::invalidArgument,
        fmt::format("{} of size {} and magic {:#x}: start from its INIT macro (size {}, magic {:#x}), and use a header "
                    "that is not newer than the library",
                    name, size, magic, expectedSize, expectedMagic));
  }
}

std::size_t typeBytes(fuscoDataType_t type) {
  switch (type) {
    case fuscoInt8:
    case fuscoUint8:
    case fuscoFloat8e4m3:
    case fuscoFloat8e5m2:
      return 1;
    case fuscoFloat16:
    case fuscoBfloat16:
      return 2;
    case fuscoInt32:
    case fuscoUint32:
    case fuscoFloat32:
      return 4;
    case fuscoInt64:
    case fuscoUint64:
    case fuscoFloat64:
      return 8;
  }
  fail(Code::invalidArgument, fmt::format("data type {} does not exist", static_cast<int>(type)));
}

fuscoConfig_t resolveConfig(const fuscoConfig_t* given) {
  fuscoConfig_t c = FUSCO_CONFIG_INIT;
  if (given != nullptr) {
    checkStruct("fuscoConfig_t", given->size, given->magic, sizeof c, FUSCO_CONFIG_MAGIC);
    // An older caller's struct is shorter: what it does not have keeps its default.
    std::memcpy(&c, given, given->size);
    c.size = sizeof c;
  }
  const Environment& env = environment();
  const auto choose = [&](auto& field, Setting setting) {
    if (field == FUSCO_UNSET) field = static_cast<std::remove_reference_t<decltype(field)>>(env.number(setting));
  };
  if (c.device == fuscoDeviceAuto) c.device = static_cast<int>(env.number(Setting::device));
  choose(c.nodeId, Setting::node);
  choose(c.lanesPerNode, Setting::lanes);
  choose(c.initTimeoutMs, Setting::initTimeoutMs);
  choose(c.operationTimeoutMs, Setting::operationTimeoutMs);
  choose(c.sliceBytes, Setting::sliceBytes);
  choose(c.slices, Setting::slices);
  choose(c.balance, Setting::balance);
  choose(c.maxStagingBytes, Setting::maxStagingBytes);
  choose(c.allowProcessVm, Setting::processVm);
  choose(c.maxSms, Setting::maxSms);
  if (c.blocking == FUSCO_UNSET) c.blocking = 1;
  const auto range = [](const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most) {
      fail(Code::invalidArgument, fmt::format("fuscoConfig_t.{} is {}, must be {} to {}", name, value, least, most));
    }
  };
  range("device", c.device, 0, 2);
  range("blocking", c.blocking, 0, 1);
  range("nodeId", c.nodeId, -1, INT32_MAX);
  range("lanesPerNode", c.lanesPerNode, 1, 1024);
  range("initTimeoutMs", c.initTimeoutMs, 1, INT32_MAX);
  range("operationTimeoutMs", c.operationTimeoutMs, 0, INT32_MAX);
  if (c.sliceBytes != FUSCO_UNSET) range("sliceBytes", c.sliceBytes, 4096, std::int64_t{1} << 30);
  range("slices", c.slices, 1, 1024);
  range("balance", c.balance, 0, 2);
  range("maxStagingBytes", c.maxStagingBytes, 0, INT64_MAX);
  range("allowProcessVm", c.allowProcessVm, 0, 1);
  range("maxSms", c.maxSms, 0, 1024);
  range("gpu", c.gpu, -1, 1023);
  if ((c.allocate == nullptr) != (c.release == nullptr)) {
    fail(Code::invalidArgument, "fuscoConfig_t: allocate and release come together or not at all");
  }
  if (c.device != fuscoDeviceHost) {
    std::string why;
    const bool there = exec::cuda::available(&why);
    if (!there && c.device == fuscoDeviceCuda) {
      fail(Code::invalidUsage,
           fmt::format("device cuda was asked for, but {}; use device host (FUSCO_DEVICE=host)", why));
    }
    c.device = there ? fuscoDeviceCuda : fuscoDeviceHost;
  }
  if (c.sliceBytes == FUSCO_UNSET) c.sliceBytes = c.device == fuscoDeviceCuda ? kSliceBytesOfGpu : kSliceBytes;
  c.sliceBytes = (c.sliceBytes + 63) / 64 * 64;
  return c;
}

namespace {

// Nothing where the GPU cannot be asked: what it is used for next fails in the same way, when the others can be told.
comm::GpuPlace placeOf(int gpu) {
  try {
    const std::uint32_t id = exec::cuda::busIdOf(gpu);
    if (!environment().flag(Setting::p2pDisable)) return comm::gpuPlace(id, exec::cuda::withoutPath(gpu));
    return {id, {comm::GpuPlace::kAllOthers}};
  } catch (const Error& error) {
    FUSCO_INFO(kLogInit, "GPU {} does not say how it reaches others: {}", gpu, error.what());
    return {};
  }
}

}  // namespace

std::shared_ptr<engine::Engine> connect(const CommState& state, const char id[128]) {
  const fuscoConfig_t& c = state.config;
  comm::FabricConfig f;
  f.rank = state.rank;
  f.ranks = state.ranks;
  f.nodeId = c.nodeId;
  if (state.gpu >= 0 && state.ranks > 1) f.gpu = placeOf(state.gpu);
  f.hostId = environment().text(Setting::hostId);
  f.net = static_cast<comm::Net>(environment().number(Setting::net));
  f.lanesPerNode = c.lanesPerNode;
  f.controlBytes = engine::controlBytes(state.ranks);
  f.slotBytes = static_cast<std::size_t>(c.sliceBytes);
  f.slots = c.slices;
  f.allowProcessVm = c.allowProcessVm != 0;
  f.initTimeoutMs = c.initTimeoutMs;
  // Sizes and lanes are compared one by one.
  static constexpr const char* kBalances[] = {"none", "paper", "full"};
  f.settings =
      fmt::format("device {}, balance {}", c.device == fuscoDeviceCuda ? "cuda" : "host", kBalances[c.balance]);
  if (state.gpu >= 0 && environment().flag(Setting::ibGpuMemory)) f.gpuMemory = engine::nicMemory(state.gpu);
  engine::EngineConfig e;
  e.allocator = {c.allocate, c.release, c.allocatorContext};
  e.operationTimeoutMs = c.operationTimeoutMs;
  e.maxStagingBytes = c.maxStagingBytes;
  // What is brought to a GPU of a plan is laid out for the default flows.
  if (state.gpu < 0) e.balance = static_cast<plan::Balance>(c.balance);
  auto engine = std::make_shared<engine::Engine>(comm::Fabric::connect(f, id), e);
  if (state.gpu >= 0) engine->useDevice(state.gpu, c.maxSms, c.initTimeoutMs);
  return engine;
}

}  // namespace fusco::api
