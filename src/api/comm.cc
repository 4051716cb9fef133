// Library and communicator calls.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>

#include "api/group.h"
#include "api/state.h"
#include "base/environment.h"
#include "base/launcher.h"
#include "base/log.h"
#include "base/thread.h"
#include "exec/cuda.h"

using namespace fusco;
using namespace fusco::api;

fuscoResult_t fuscoGetVersion(int* version) {
  return guarded("fuscoGetVersion", [&] {
    if (version == nullptr) fail(Code::invalidArgument, "version is NULL");
    *version = FUSCO_VERSION;
  });
}

const char* fuscoGetErrorString(fuscoResult_t result) {
  switch (result) {
    case fuscoSuccess:
      return "no error";
    case fuscoUnhandledCudaError:
      return "a CUDA call failed";
    case fuscoSystemError:
      return "the system refused something";
    case fuscoInternalError:
      return "internal error";
    case fuscoInvalidArgument:
      return "invalid argument";
    case fuscoInvalidUsage:
      return "invalid usage";
    case fuscoRemoteError:
      return "a peer died, left, aborted or did not answer";
    case fuscoInProgress:
      return "in progress";
    default:
      return "unknown result code";
  }
}

const char* fuscoGetLastError(fuscoComm_t comm) {
  std::string& text = ofThisThread<std::string, struct ErrorText>();
  if (comm == nullptr) return (text = threadLastError()).c_str();
  try {
    const auto state = findCommAnyState(comm);
    checkFork(*state);
    text = !state->ready                       ? ""
           : state->initError != Code::success ? state->initErrorText
                                               : state->engine->asyncErrorText();
    return text.c_str();
  } catch (const std::exception& e) {
    return (text = e.what()).c_str();
  }
}

fuscoResult_t fuscoGetSetting(const char* name, const char** value) {
  return guarded("fuscoGetSetting", [&] {
    if (name == nullptr || value == nullptr) fail(Code::invalidArgument, "name or value is NULL");
    for (const SettingInfo& info : settingTable()) {
      if (std::strcmp(info.name, name) != 0) continue;
      *value = environment().text(info.setting).c_str();
      return;
    }
    const std::string nearest = nearestName(name);
    fail(Code::invalidArgument,
         fmt::format("{}: no such setting{}", name, nearest.empty() ? "" : "; is " + nearest + " meant?"));
  });
}

fuscoResult_t fuscoLog(int level, const char* text) {
  return guarded("fuscoLog", [&] {
    if (text == nullptr) fail(Code::invalidArgument, "text is NULL");
    if (level < fuscoLogWarn || level > fuscoLogTrace)
      fail(Code::invalidArgument, fmt::format("level is {}, must be {} to {}", level, static_cast<int>(fuscoLogWarn),
                                              static_cast<int>(fuscoLogTrace)));
    FUSCO_LOG(static_cast<LogLevel>(level), kLogInit, "{}", text);
  });
}

fuscoResult_t fuscoGetAutoDevice(fuscoDevice_t* device, const char** why) {
  return guarded("fuscoGetAutoDevice", [&] {
    if (device == nullptr) fail(Code::invalidArgument, "device is NULL");
    std::string& text = ofThisThread<std::string, struct WhyText>();
    text.clear();
    *device = exec::cuda::available(&text) ? fuscoDeviceCuda : fuscoDeviceHost;
    if (why != nullptr) *why = text.c_str();
  });
}

fuscoResult_t fuscoGetUniqueId(fuscoUniqueId* id) {
  return guarded("fuscoGetUniqueId", [&] {
    if (id == nullptr) fail(Code::invalidArgument, "id is NULL");
    const std::string& address = environment().text(Setting::commId);
    if (address.empty()) {
      comm::makeUniqueId(id->internal);
    } else {
      comm::agreeOnUniqueId(address, launchedJob(), id->internal);
    }
  });
}

namespace {

void abortEngine(const CommState& state) {
  if (state.engine != nullptr) state.engine->abort(fmt::format("rank {} aborted the communicator", state.rank));
}

void finishInit(const std::shared_ptr<CommState>& state, const fuscoUniqueId& id) {
  try {
    state->engine = connect(*state, id.internal);
  } catch (const Error& e) {
    state->initError = e.code();
    state->initErrorText = e.what();
    state->ready = true;
    throw;
  } catch (const std::exception& e) {
    state->initError = Code::systemError;
    state->initErrorText = e.what();
    state->ready = true;
    throw;
  }
  state->ready = true;
  // Who aborts says so, then looks whether init is over; here it is the other way round, so at least one of the two
  // sees the other.
  if (state->aborted) abortEngine(*state);
}

void init(fuscoComm_t* comm, int nranks, const fuscoUniqueId& id, int rank, const fuscoConfig_t* config) {
  if (comm == nullptr) fail(Code::invalidArgument, "comm is NULL");
  *comm = nullptr;
  if (nranks < 1) fail(Code::invalidArgument, fmt::format("nranks is {}, must be at least 1", nranks));
  if (rank < 0 || rank >= nranks)
    fail(Code::invalidArgument, fmt::format("rank is {}, must be 0 to {}", rank, nranks - 1));
  auto state = std::make_shared<CommState>();
  state->rank = rank;
  state->ranks = nranks;
  state->pid = getpid();
  state->config = resolveConfig(config);
  // Here, not in the thread that may join for it.
  if (state->config.device == fuscoDeviceCuda)
    state->gpu = state->config.gpu >= 0 ? state->config.gpu : exec::cuda::currentDevice();
  if (state->config.blocking == 0) {
    // The thread must not own the state that joins it.
    state->initThread = startThread("an init that does not block", [raw = state.get(), id] {
      try {
        const std::shared_ptr<CommState> borrowed(std::shared_ptr<CommState>{}, raw);
        finishInit(borrowed, id);
      } catch (...) {
        // Told by fuscoCommGetAsyncError.
      }
    });
    *comm = addComm(state);
    return;
  }
  if (inGroup()) {
    enqueueInit([comm, state, id] {
      finishInit(state, id);
      *comm = addComm(state);
    });
    return;
  }
  finishInit(state, id);
  *comm = addComm(state);
}

}  // namespace

fuscoResult_t fuscoCommInitRank(fuscoComm_t* comm, int nranks, fuscoUniqueId id, int rank) {
  return guarded("fuscoCommInitRank", [&] { init(comm, nranks, id, rank, nullptr); });
}

fuscoResult_t fuscoCommInitRankConfig(fuscoComm_t* comm, int nranks, fuscoUniqueId id, int rank,
                                      const fuscoConfig_t* config) {
  return guarded("fuscoCommInitRankConfig", [&] { init(comm, nranks, id, rank, config); });
}

fuscoResult_t fuscoCommInitFromEnvironment(fuscoComm_t* comm, const fuscoConfig_t* config) {
  return guarded("fuscoCommInitFromEnvironment", [&] {
    if (comm == nullptr) fail(Code::invalidArgument, "comm is NULL");
    const Launch launch = launchOfProcess();
    FUSCO_INFO(kLogInit, "rank {} of {} by {}, meeting at {}", launch.rank, launch.ranks, launch.launcher,
               launch.address);
    fuscoUniqueId id;
    comm::agreeOnUniqueId(launch.address, launch.job, id.internal);
    init(comm, launch.ranks, id, launch.rank, config);
  });
}

fuscoResult_t fuscoCommSplit(fuscoComm_t comm, int color, int key, fuscoComm_t* newcomm, const fuscoConfig_t* config) {
  return guarded("fuscoCommSplit", [&] {
    if (newcomm == nullptr) fail(Code::invalidArgument, "newcomm is NULL");
    if (inGroup()) fail(Code::invalidUsage, "a split inside a group is not possible: call it outside");
    *newcomm = nullptr;
    const auto parent = findComm(comm);
    comm::Fabric& fabric = parent->engine->fabric();
    const std::int64_t timeout = parent->config.initTimeoutMs;
    struct Wish {
      int color, key;
    };
    // Before anything is exchanged: a bad configuration must not leave the others waiting.
    const fuscoConfig_t childConfig = config == nullptr ? parent->config : resolveConfig(config);
    const Wish mine{color, key};
    std::vector<Wish> all(static_cast<std::size_t>(parent->ranks));
    fabric.allGather(&mine, sizeof mine, all.data(), timeout);
    std::vector<int> members;
    for (int r = 0; r < parent->ranks; ++r) {
      if (color >= 0 && all[static_cast<std::size_t>(r)].color == color) members.push_back(r);
    }
    std::stable_sort(members.begin(), members.end(), [&](int a, int b) {
      return all[static_cast<std::size_t>(a)].key < all[static_cast<std::size_t>(b)].key;
    });
    fuscoUniqueId id{};
    std::exception_ptr noPlace;
    if (!members.empty() && members.front() == parent->rank) {
      try {
        comm::makeUniqueId(id.internal);
      } catch (...) {
        // The others wait for it: they get an id that is none.
        noPlace = std::current_exception();
        id = {};
      }
    }
    std::vector<fuscoUniqueId> ids(static_cast<std::size_t>(parent->ranks));
    fabric.allGather(&id, sizeof id, ids.data(), timeout);
    if (noPlace) std::rethrow_exception(noPlace);
    if (members.empty()) return;
    const fuscoUniqueId& ofChild = ids[static_cast<std::size_t>(members.front())];
    if (std::all_of(ofChild.internal, ofChild.internal + sizeof ofChild.internal, [](char c) { return c == 0; })) {
      fail(Code::remoteError,
           fmt::format("rank {} could not open a place where the ranks of color {} meet; look at its "
                       "error, then split again",
                       members.front(), color));
    }
    auto state = std::make_shared<CommState>();
    state->rank = static_cast<int>(std::find(members.begin(), members.end(), parent->rank) - members.begin());
    state->ranks = static_cast<int>(members.size());
    state->pid = getpid();
    state->config = childConfig;
    if (childConfig.device == fuscoDeviceCuda)
      state->gpu = parent->gpu >= 0 ? parent->gpu : exec::cuda::currentDevice();
    // The child keeps the parent's nodes unless the caller says otherwise.
    const bool says = config != nullptr && config->size >= offsetof(fuscoConfig_t, nodeId) + sizeof config->nodeId;
    if (!says || config->nodeId == FUSCO_UNSET) state->config.nodeId = fabric.topology().nodeOf(parent->rank);
    finishInit(state, ofChild);
    *newcomm = addComm(state);
  });
}

fuscoResult_t fuscoCommFinalize(fuscoComm_t comm) {
  return guarded("fuscoCommFinalize", [&] {
    const auto state = findComm(comm);
    state->engine->finishAll();
    char token = 0;
    std::vector<char> all(static_cast<std::size_t>(state->ranks));
    state->engine->fabric().allGather(&token, 1, all.data(),
                                      state->config.operationTimeoutMs > 0 ? state->config.operationTimeoutMs : 300000);
  });
}

fuscoResult_t fuscoCommDestroy(fuscoComm_t comm) {
  return guarded("fuscoCommDestroy", [&] {
    const auto state = findCommAnyState(comm);
    checkFork(*state);
    if (state->plans > 0) {
      fail(Code::invalidUsage, fmt::format("rank {}: {} plans of this communicator are alive; destroy them first",
                                           state->rank, state->plans.load()));
    }
    removeComm(comm);
  });
}

fuscoResult_t fuscoCommAbort(fuscoComm_t comm) {
  return guarded("fuscoCommAbort", [&] {
    const auto state = findCommAnyState(comm);
    checkFork(*state);
    state->aborted = true;
    if (state->ready) abortEngine(*state);
    removeComm(comm);
  });
}

fuscoResult_t fuscoCommCount(fuscoComm_t comm, int* count) {
  return guarded("fuscoCommCount", [&] {
    if (count == nullptr) fail(Code::invalidArgument, "count is NULL");
    *count = findCommAnyState(comm)->ranks;
  });
}

fuscoResult_t fuscoCommUserRank(fuscoComm_t comm, int* rank) {
  return guarded("fuscoCommUserRank", [&] {
    if (rank == nullptr) fail(Code::invalidArgument, "rank is NULL");
    *rank = findCommAnyState(comm)->rank;
  });
}

fuscoResult_t fuscoCommNode(fuscoComm_t comm, int rank, int* node) {
  return guarded("fuscoCommNode", [&] {
    const auto state = findComm(comm);
    if (node == nullptr) fail(Code::invalidArgument, "node is NULL");
    if (rank < 0 || rank >= state->ranks)
      fail(Code::invalidArgument, fmt::format("rank is {}, must be 0 to {}", rank, state->ranks - 1));
    *node = state->engine->topology().nodeOf(rank);
  });
}

fuscoResult_t fuscoCommCapturesTransfers(fuscoComm_t comm, int* captures) {
  return guarded("fuscoCommCapturesTransfers", [&] {
    const auto state = findComm(comm);
    if (captures == nullptr) fail(Code::invalidArgument, "captures is NULL");
    *captures = state->engine->capturesTransfers() ? 1 : 0;
  });
}

fuscoResult_t fuscoCommGetAsyncError(fuscoComm_t comm, fuscoResult_t* error) {
  return guarded("fuscoCommGetAsyncError", [&] {
    if (error == nullptr) fail(Code::invalidArgument, "error is NULL");
    const auto state = findCommAnyState(comm);
    checkFork(*state);
    if (!state->ready) {
      *error = fuscoInProgress;
      return;
    }
    *error =
        static_cast<fuscoResult_t>(state->initError != Code::success ? state->initError : state->engine->asyncError());
  });
}

fuscoResult_t fuscoCommGetStatistics(fuscoComm_t comm, fuscoStatistics_t* out) {
  return guarded("fuscoCommGetStatistics", [&] {
    if (out == nullptr) fail(Code::invalidArgument, "statistics is NULL");
    checkStruct("fuscoStatistics_t", out->size, out->magic, sizeof *out, FUSCO_STATISTICS_MAGIC);
    const auto state = findCommAnyState(comm);
    checkFork(*state);
    fuscoStatistics_t s = FUSCO_STATISTICS_INIT;
    if (state->ready && state->engine != nullptr) {
      engine::Statistics& from = state->engine->statistics();
      s.operations = from.operations;
      s.rowsPlaced = from.rowsPlaced;
      s.bytesPlaced = from.bytesPlaced;
      s.bytesRead = from.bytesRead;
      s.wireBytes = from.wireBytes;
      s.wireSlices = from.wireSlices;
      s.stagedBytes = from.stagedBytes;
      s.processVmBytes = from.processVmBytes;
      s.planNs = from.planNs;
      s.extractNs = from.extractNs;
      s.wireNs = from.wireNs;
      s.placeNs = from.placeNs;
      s.sumNs = from.sumNs;
      s.waitNs = from.waitNs;
      s.workspaceBytes = state->engine->ledger().bytes + state->engine->fabric().memoryBytes();
    }
    const std::size_t size = out->size;
    std::memcpy(out, &s, size);
    out->size = size;
  });
}

fuscoResult_t fuscoGroupStart(void) {
  return guarded("fuscoGroupStart", [] { groupStart(); });
}

fuscoResult_t fuscoGroupEnd(void) {
  return guarded("fuscoGroupEnd", [] { groupEnd(); });
}
