// A double of libnccl: counts what reaches it. Functions that libfusco only passes on answer their own number; the
// others behave as far as libfusco can tell. As in NCCL, public names call public names, through symbols that may be
// taken.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

// Types only: here the functions have signatures of their own.
#define FUSCO_NCCL(result, name, arguments)
#include "fusco/nccl_api.h"
#include "plugin/nccl/functions.h"

using fusco::nccl::Function;

extern "C" {
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error);
int ncclBroadcast();
}

namespace {
std::atomic<int> calls[static_cast<unsigned>(Function::count)];
int answer(Function function) {
  ++calls[static_cast<unsigned>(function)];
  return 1000 + static_cast<int>(function);
}
ncclResult_t count(Function function) {
  answer(function);
  return ncclSuccess;
}
}  // namespace

struct ncclComm {
  int ranks, rank;
};

#define DOUBLE_EXPORT extern "C" __attribute__((visibility("default")))

// How often a function was reached, by its name without nccl in front; -1: no such function.
DOUBLE_EXPORT int doubleCalls(const char* name) {
  for (unsigned i = 0; i < static_cast<unsigned>(Function::count); ++i) {
    if (std::strcmp(fusco::nccl::kFunctions[i].name, name) == 0) return calls[i];
  }
  return -1;
}

// Both names of a function; arguments as in the header.
#define DOUBLE(result, name, parameters, arguments, ...)                                                \
  DOUBLE_EXPORT result pnccl##name parameters{__VA_ARGS__} DOUBLE_EXPORT result nccl##name parameters { \
    return pnccl##name arguments;                                                                       \
  }

DOUBLE(const char*, GetErrorString, (ncclResult_t result), (result), return "the double's text";)
DOUBLE(const char*, GetLastError, (ncclComm_t comm), (comm), return "the double's last error";)
DOUBLE(ncclResult_t, GetVersion, (int* version), (version), {
  if (version != nullptr) *version = 20000 + DOUBLE_MINOR * 100 + 3;
  return static_cast<ncclResult_t>(answer(Function::GetVersion));
})
DOUBLE(ncclResult_t, GetUniqueId, (ncclUniqueId * id), (id), {
  std::memset(id, 0, sizeof *id);
  std::memset(id->internal, 0x5c, 40);
  return count(Function::GetUniqueId);
})

namespace {
ncclResult_t make(ncclComm_t* comm, int ranks, int rank) {
  *comm = new ncclComm{ranks, rank};
  return ncclSuccess;
}
}  // namespace
DOUBLE(ncclResult_t, CommInitRank, (ncclComm_t * comm, int nranks, ncclUniqueId id, int rank), (comm, nranks, id, rank),
       {
         count(Function::CommInitRank);
         return make(comm, nranks, rank);
       })
DOUBLE(ncclResult_t, CommInitRankConfig,
       (ncclComm_t * comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t* config),
       (comm, nranks, id, rank, config), {
         count(Function::CommInitRankConfig);
         return make(comm, nranks, rank);
       })
DOUBLE(ncclResult_t, CommInitAll, (ncclComm_t * comms, int ndev, const int* devlist), (comms, ndev, devlist), {
  for (int r = 0; r < ndev; ++r) make(comms + r, ndev, r);
  return count(Function::CommInitAll);
})
DOUBLE(ncclResult_t, CommSplit, (ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config),
       (comm, color, key, newcomm, config), {
         count(Function::CommSplit);
         *newcomm = nullptr;
         return color < 0 ? ncclSuccess : make(newcomm, comm->ranks, comm->rank);
       })
DOUBLE(ncclResult_t, CommCount, (const ncclComm_t comm, int* ranks), (comm, ranks), {
  if (comm != nullptr && ranks != nullptr) *ranks = comm->ranks;
  const int number = answer(Function::CommCount);
  return comm == nullptr ? static_cast<ncclResult_t>(number) : ncclSuccess;
})
DOUBLE(ncclResult_t, CommUserRank, (const ncclComm_t comm, int* rank), (comm, rank), {
  if (comm != nullptr && rank != nullptr) *rank = comm->rank;
  const int number = answer(Function::CommUserRank);
  return comm == nullptr ? static_cast<ncclResult_t>(number) : ncclSuccess;
})
DOUBLE(ncclResult_t, CommDestroy, (ncclComm_t comm), (comm), {
  delete comm;
  return count(Function::CommDestroy);
})
DOUBLE(ncclResult_t, CommAbort, (ncclComm_t comm), (comm), {
  delete comm;
  return count(Function::CommAbort);
})
DOUBLE(ncclResult_t, CommFinalize, (ncclComm_t comm), (comm), { return count(Function::CommFinalize); })
DOUBLE(ncclResult_t, CommGetAsyncError, (ncclComm_t comm, ncclResult_t* error), (comm, error), {
  if (error != nullptr) *error = ncclSuccess;
  return count(Function::CommGetAsyncError);
})
DOUBLE(ncclResult_t, GroupStart, (), (), return count(Function::GroupStart);)
DOUBLE(ncclResult_t, GroupEnd, (), (), return count(Function::GroupEnd);)
DOUBLE(ncclResult_t, Send,
       (const void* buffer, size_t size, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream),
       (buffer, size, type, peer, comm, stream), { return count(Function::Send); })
DOUBLE(ncclResult_t, Recv,
       (void* buffer, size_t size, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream),
       (buffer, size, type, peer, comm, stream), { return count(Function::Recv); })

#if DOUBLE_MINOR >= 28
// A call made of others, by their public names.
DOUBLE(ncclResult_t, AlltoAll,
       (const void* send, void* receive, size_t size, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream),
       (send, receive, size, type, comm, stream), {
         if (comm != nullptr) {
           ncclSend(send, size, type, 0, comm, stream);
           ncclRecv(receive, size, type, 0, comm, stream);
         }
         return count(Function::AlltoAll);
       })
#endif

// Calls the library makes to itself: nearly every call asks for asynchronous errors, the old broadcast calls the new.
DOUBLE_EXPORT int pncclAllReduce() {
  ncclResult_t error = ncclSuccess;
  if (ncclCommGetAsyncError(nullptr, &error) != ncclSuccess) return -1;
  return answer(Function::AllReduce);
}
DOUBLE_EXPORT int ncclAllReduce() { return pncclAllReduce(); }
DOUBLE_EXPORT int pncclBroadcast() { return answer(Function::Broadcast); }
DOUBLE_EXPORT int ncclBroadcast() { return pncclBroadcast(); }
DOUBLE_EXPORT int pncclBcast() { return ncclBroadcast() < 0 ? -1 : answer(Function::Bcast); }
DOUBLE_EXPORT int ncclBcast() { return pncclBcast(); }

// All others, of this version and older: generated.
#define DOUBLE_NUMBER(name)                                               \
  DOUBLE_EXPORT int pnccl##name(void*) { return answer(Function::name); } \
  DOUBLE_EXPORT int nccl##name(void*) { return answer(Function::name) + 1000000; }
#include DOUBLE_NUMBERS
