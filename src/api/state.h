// What stands behind the handles of the C API, and how its functions are guarded.
#pragma once

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "base/status.h"
#include "comm/fabric.h"
#include "engine/engine.h"
#include "engine/plan_state.h"
#include "fusco/fusco.h"

namespace fusco::api {

// A configuration with every field filled in: by the caller, the environment, or the default.
// Throws invalidArgument when a field is out of range, invalidUsage for a device that this build has not got.
fuscoConfig_t resolveConfig(const fuscoConfig_t* given);

struct CommState {
  int rank = 0;
  int ranks = 0;
  int pid = 0;
  int gpu = -1;  // -1: host
  fuscoConfig_t config;
  std::thread initThread;  // non-blocking init
  // Init has come to its end. What it leaves behind is read only then, and stays as it is: that needs no lock, which a
  // fork could leave held in the child.
  std::atomic<bool> ready{false};
  std::atomic<bool> aborted{false};        // by a caller
  std::shared_ptr<engine::Engine> engine;  // null if init has failed
  Code initError = Code::success;
  std::string initErrorText;
  std::atomic<int> plans{0};
  ~CommState();
};

struct PlanHandleState {
  std::shared_ptr<CommState> comm;
  std::shared_ptr<engine::PlanState> plan;
};

// Throws invalidUsage in a child that was forked off after the communicator was made: locks of it may be held there for
// ever.
void checkFork(const CommState& state);

// Handles that are alive. Throws invalidArgument for others.
fuscoComm_t addComm(std::shared_ptr<CommState> state);
std::shared_ptr<CommState> findComm(fuscoComm_t comm);  // throws also when init has not finished or in a forked child
std::shared_ptr<CommState> findCommAnyState(fuscoComm_t comm);
std::shared_ptr<CommState> removeComm(fuscoComm_t comm);
fuscoPlan_t addPlan(std::shared_ptr<PlanHandleState> state);
std::shared_ptr<PlanHandleState> findPlan(fuscoPlan_t plan);
std::shared_ptr<PlanHandleState> removePlan(fuscoPlan_t plan);

// Runs a body and turns what it throws into a code and this thread's last error.
fuscoResult_t guarded(const char* function, const std::function<void()>& body);
void setLastError(const std::string& text);
const std::string& threadLastError();

std::shared_ptr<engine::Engine> connect(const CommState& state, const char id[128]);

// Throws invalidArgument unless a struct given by the caller begins as its INIT macro has it.
void checkStruct(const char* name, std::size_t size, unsigned magic, std::size_t expectedSize, unsigned expectedMagic);

std::size_t typeBytes(fuscoDataType_t type);  // throws invalidArgument

}  // namespace fusco::api
