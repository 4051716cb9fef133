// A double of libnccl: counts what reaches it. Functions that libfusco only passes on answer their own number; the
// others behave as far as libfusco can tell. As in NCCL, public names call public names, through symbols that may be
// taken.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

// Types only: here the functions have signatures of their own.
#define FUSCO_NCCL(result, name, arguments)
#include "fusco/nccl_api.h"
#include "nccl/double_world.h"
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
  int ranks = 0, rank = 0;
  std::uint64_t place = 0, children = 0;
  bool blocking = true;
  std::atomic<int> unfinished{0};  // of its own making and its children's
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
namespace {

void makeId(ncclUniqueId* id) {
  std::memset(id, 0, sizeof *id);
  std::memset(id->internal, 0x5c, 40);
  // An address at its usual place.
  const unsigned char loopback[16] = {2, 0, 0, 9, 127, 0, 0, 1};
  std::memcpy(id->internal + 8, loopback, sizeof loopback);
  std::uint64_t place = fusco::test::newPlace();
  if (const char* const agreed = std::getenv("NCCL_COMM_ID")) {
    // As in NCCL: every rank makes the same one.
    const std::uint64_t magic = 0x0280028002800280;
    std::memcpy(id->internal, &magic, sizeof magic);
    place = std::hash<std::string>()(agreed);
  }
  std::memcpy(id->internal + 32, &place, sizeof place);
}
std::uint64_t placeOf(const ncclUniqueId& id) {
  std::uint64_t place = 0;
  std::memcpy(&place, id.internal + 32, sizeof place);
  return place;
}

thread_local int depth = 0;
thread_local std::vector<std::function<ncclResult_t()>> jobs;

// Makes a communicator by `body`, which meets the other ranks: at once, when the group ends, or beside. `waiting` are
// those who are in progress till then; what the body returns comes to the slot at the end.
ncclResult_t make(ncclComm_t* slot, bool blocking, std::vector<ncclComm_t> waiting,
                  const std::function<ncclComm_t()>& body) {
  for (const ncclComm_t comm : waiting) ++comm->unfinished;
  const auto all = [slot, waiting, body, later = *slot == nullptr] {
    const ncclComm_t made = body();
    if (later) __atomic_store_n(slot, made, __ATOMIC_RELEASE);
    for (const ncclComm_t comm : waiting) --comm->unfinished;
    return ncclSuccess;
  };
  const auto begin = [all, blocking] {
    if (blocking) return all();
    std::thread(all).detach();
    return ncclInProgress;
  };
  if (depth == 0) return begin();
  jobs.emplace_back(begin);
  return ncclSuccess;
}

bool blocks(const ncclConfig_t* config, bool otherwise) {
  return config == nullptr || config->blocking == NCCL_CONFIG_UNDEF_INT ? otherwise : config->blocking != 0;
}

ncclResult_t init(ncclComm_t* slot, int ranks, int rank, std::uint64_t place, bool blocking) {
  auto* const comm = new ncclComm{ranks, rank, place, 0, blocking};
  // Who does not block has it at once.
  *slot = blocking ? nullptr : comm;
  return make(slot, blocking, {comm},
              [=]() -> ncclComm_t { return fusco::test::meetAt(place, rank, ranks, 0).empty() ? nullptr : comm; });
}

ncclComm_t child(int ranks, int rank, std::uint64_t place, bool blocking) {
  return new ncclComm{ranks, rank, place, 0, blocking};
}

}  // namespace

DOUBLE(ncclResult_t, GetUniqueId, (ncclUniqueId * id), (id), {
  makeId(id);
  return count(Function::GetUniqueId);
})
DOUBLE(ncclResult_t, CommInitRank, (ncclComm_t * comm, int nranks, ncclUniqueId id, int rank), (comm, nranks, id, rank),
       {
         count(Function::CommInitRank);
         return init(comm, nranks, rank, placeOf(id), true);
       })
DOUBLE(ncclResult_t, CommInitRankConfig,
       (ncclComm_t * comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t* config),
       (comm, nranks, id, rank, config), {
         count(Function::CommInitRankConfig);
         return init(comm, nranks, rank, placeOf(id), blocks(config, true));
       })
DOUBLE(ncclResult_t, CommInitAll, (ncclComm_t * comms, int ndev, const int* devlist), (comms, ndev, devlist), {
  for (int r = 0; r < ndev; ++r) comms[r] = new ncclComm{ndev, r, fusco::test::newPlace(), 0, true};
  return count(Function::CommInitAll);
})
DOUBLE(ncclResult_t, CommSplit, (ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config),
       (comm, color, key, newcomm, config), {
         count(Function::CommSplit);
         *newcomm = nullptr;
         const bool blocking = blocks(config, comm->blocking);
         const std::uint64_t place = fusco::test::mixed(comm->place, ++comm->children);
         const ncclResult_t result = make(newcomm, blocking, {comm}, [=]() -> ncclComm_t {
           const auto mine =
               static_cast<std::uint64_t>(static_cast<std::uint32_t>(color)) << 32 | static_cast<std::uint32_t>(key);
           std::vector<std::pair<int, int>> members;
           const auto words = fusco::test::meetAt(place, comm->rank, comm->ranks, mine);
           for (std::size_t r = 0; r < words.size(); ++r) {
             if (static_cast<int>(words[r] >> 32) == color)
               members.emplace_back(static_cast<int>(words[r]), static_cast<int>(r));
           }
           if (color < 0 || members.empty()) return nullptr;
           std::sort(members.begin(), members.end());
           const auto me = std::find(members.begin(), members.end(), std::pair(key, comm->rank)) - members.begin();
           return child(static_cast<int>(members.size()), static_cast<int>(me),
                        fusco::test::mixed(place, static_cast<std::uint64_t>(color)), blocking);
         });
         // As in NCCL: that it goes on is told by the parent's state alone.
         return result == ncclInProgress ? ncclSuccess : result;
       })
#if DOUBLE_MINOR >= 23
DOUBLE(ncclResult_t, CommInitRankScalable,
       (ncclComm_t * comm, int nranks, int rank, int nId, ncclUniqueId* ids, ncclConfig_t* config),
       (comm, nranks, rank, nId, ids, config), {
         count(Function::CommInitRankScalable);
         return init(comm, nranks, rank, placeOf(ids[0]), blocks(config, true));
       })
#endif
#if DOUBLE_MINOR >= 29
DOUBLE(ncclResult_t, CommShrink,
       (ncclComm_t comm, int* excluded, int excludedCount, ncclComm_t* newcomm, ncclConfig_t* config, int flags),
       (comm, excluded, excludedCount, newcomm, config, flags), {
         count(Function::CommShrink);
         *newcomm = nullptr;
         if (excludedCount > 0 && excluded == nullptr) return ncclInvalidArgument;
         int before = 0;
         for (int i = 0; i < excludedCount; ++i) before += excluded[i] < comm->rank ? 1 : 0;
         const int ranks = comm->ranks - excludedCount, rank = comm->rank - before;
         const std::uint64_t place = fusco::test::mixed(comm->place, 1000 + ++comm->children);
         const bool blocking = blocks(config, comm->blocking);
         return make(newcomm, blocking, {comm}, [=]() -> ncclComm_t {
           if (fusco::test::meetAt(place, rank, ranks, 0).empty()) return nullptr;
           return child(ranks, rank, place, blocking);
         });
       })
DOUBLE(ncclResult_t, CommGetUniqueId, (ncclComm_t comm, ncclUniqueId* id), (comm, id), {
  makeId(id);
  return count(Function::CommGetUniqueId);
})
DOUBLE(ncclResult_t, CommGrow,
       (ncclComm_t comm, int nranks, const ncclUniqueId* id, int rank, ncclComm_t* newcomm, ncclConfig_t* config),
       (comm, nranks, id, rank, newcomm, config), {
         count(Function::CommGrow);
         *newcomm = nullptr;
         const std::uint64_t brought = id == nullptr ? 0 : placeOf(*id);
         const std::uint64_t meeting = comm == nullptr ? 0 : fusco::test::mixed(comm->place, 2000 + ++comm->children);
         const bool blocking = blocks(config, comm == nullptr || comm->blocking);
         const std::vector<ncclComm_t> waiting(comm == nullptr ? 0 : 1, comm);
         return make(newcomm, blocking, waiting, [=]() -> ncclComm_t {
           std::uint64_t place = brought;
           if (comm != nullptr) {
             for (const std::uint64_t theirs : fusco::test::meetAt(meeting, comm->rank, comm->ranks, brought))
               place = std::max(place, theirs);
           }
           const int mine = comm == nullptr ? rank : comm->rank;
           if (fusco::test::meetAt(place, mine, nranks, 0).empty()) return nullptr;
           return child(nranks, mine, place, blocking);
         });
       })
DOUBLE(ncclResult_t, CommRevoke, (ncclComm_t comm, int flags), (comm, flags), { return count(Function::CommRevoke); })
#endif
DOUBLE(ncclResult_t, CommCount, (const ncclComm_t comm, int* ranks), (comm, ranks), {
  if (comm != nullptr && comm->unfinished > 0) return ncclInvalidArgument;
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
  if (error != nullptr) *error = comm != nullptr && comm->unfinished > 0 ? ncclInProgress : ncclSuccess;
  return count(Function::CommGetAsyncError);
})
DOUBLE(ncclResult_t, GroupStart, (), (), {
  ++depth;
  return count(Function::GroupStart);
})
DOUBLE(ncclResult_t, GroupEnd, (), (), {
  count(Function::GroupEnd);
  if (depth == 0) return ncclInvalidUsage;
  if (--depth > 0) return ncclSuccess;
  std::vector<std::thread> threads;
  std::atomic<bool> goesOn{false};
  for (const auto& job : std::exchange(jobs, {}))
    threads.emplace_back([&goesOn, job] {
      if (job() == ncclInProgress) goesOn = true;
    });
  for (std::thread& thread : threads) thread.join();
  return goesOn ? ncclInProgress : ncclSuccess;
})
#if DOUBLE_MINOR >= 22
DOUBLE(ncclResult_t, GroupSimulateEnd, (ncclSimInfo_t * info), (info), {
  count(Function::GroupSimulateEnd);
  if (depth > 0 && --depth == 0) jobs.clear();
  return ncclSuccess;
})
#endif
// Memory as in host mode; without a place for it the number of the function.
DOUBLE(ncclResult_t, CommCuDevice, (const ncclComm_t comm, int* device), (comm, device), {
  const int number = answer(Function::CommCuDevice);
  if (comm == nullptr || device == nullptr) return static_cast<ncclResult_t>(number);
  *device = 0;
  return ncclSuccess;
})
#if DOUBLE_MINOR >= 19
DOUBLE(ncclResult_t, MemAlloc, (void** pointer, size_t bytes), (pointer, bytes), {
  const int number = answer(Function::MemAlloc);
  if (pointer == nullptr) return static_cast<ncclResult_t>(number);
  *pointer = std::malloc(bytes);
  return ncclSuccess;
})
DOUBLE(ncclResult_t, MemFree, (void* pointer), (pointer), {
  const int number = answer(Function::MemFree);
  if (pointer == nullptr) return static_cast<ncclResult_t>(number);
  std::free(pointer);
  return ncclSuccess;
})
DOUBLE(ncclResult_t, CommRegister, (const ncclComm_t comm, void* buffer, size_t bytes, void** handle),
       (comm, buffer, bytes, handle), {
         const int number = answer(Function::CommRegister);
         if (handle == nullptr) return static_cast<ncclResult_t>(number);
         *handle = buffer;
         return ncclSuccess;
       })
DOUBLE(ncclResult_t, CommDeregister, (const ncclComm_t comm, void* handle), (comm, handle), {
  const int number = answer(Function::CommDeregister);
  return comm == nullptr ? static_cast<ncclResult_t>(number) : ncclSuccess;
})
#endif
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
