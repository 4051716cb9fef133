// What a thread has collected between GroupStart and the outermost GroupEnd. A call outside a group is a group of one.
#pragma once

#include <functional>
#include <vector>

#include "plugin/nccl/communicators.h"
#include "plugin/nccl/report.h"

namespace fusco::nccl {

// Rows sent to or received from a peer. Without a list: row i is at i.
struct Transfer {
  bool send = false;
  int peer = 0;
  void* base = nullptr;
  std::size_t rows = 0, rowBytes = 0;
  bool listed = false;
  std::vector<std::int64_t> list = {};
  // Device mode: the list stays where it is.
  const void* deviceList = nullptr;
  cudaStream_t stream = nullptr;
};

enum class CollectiveKind { allGather, allReduce, broadcast, reduce, reduceScatter };

struct Collective {
  CollectiveKind kind;
  const void* send = nullptr;
  void* receive = nullptr;
  std::size_t count = 0;
  ncclDataType_t type = ncclInt8;
  ncclRedOp_t operation = ncclSum;
  int root = 0;
};

// All that a group has for one communicator.
struct Work {
  CommunicatorRef communicator;
  std::vector<Collective> collectives;
  std::vector<Transfer> transfers;
};

struct Group {
  int depth = 0;
  ncclResult_t error = ncclSuccess;
  std::string errorText;
  std::vector<std::function<void()>> jobs;  // communicators to be made, side by side
  bool goesOn = false;                      // host mode: others are made by threads that nobody waits for
  // Device mode: what is looked at when the real group has ended, with its result; true: it goes on by itself.
  std::vector<std::function<bool(ncclResult_t)>> later;
  std::vector<Work> work;

  Work& workOf(const CommunicatorRef& communicator);
  // The first error sticks.
  void note(ncclResult_t code);
};

// This thread's.
Group& group();

// Runs all, each on a thread of its own if there are several, and throws the first error. Where threads are short none
// is run.
void runSideBySide(const std::vector<std::function<void()>>& jobs);

// Host mode. `body` checks its arguments and adds to the group; outside a group that is run at once. Who runs a group
// answers ncclInProgress where all went well and something of it goes on.
ncclResult_t hostCall(const char* name, const std::function<void()>& body);
ncclResult_t hostGroupStart();
ncclResult_t hostGroupEnd(bool simulate);

// Carries out what a group collected; collectives of a communicator before its transfers.
void runWork(std::vector<Work> work);

}  // namespace fusco::nccl
