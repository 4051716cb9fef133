// Communicators of a real library that libfusco carries: each way in which they come, and how they end. Only
// point-to-point calls: those are what is carried.
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "nccl/program.h"

namespace fusco::test {

namespace {

using Clock = std::chrono::steady_clock;
double secondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

using Carrier = ncclResult_t (*)(ncclComm_t, void**);
using Shrink = ncclResult_t (*)(ncclComm_t, int*, int, ncclComm_t*, ncclConfig_t*, int);
using Grow = ncclResult_t (*)(ncclComm_t, int, const ncclUniqueId*, int, ncclComm_t*, ncclConfig_t*);
using GetId = ncclResult_t (*)(ncclComm_t, ncclUniqueId*);
using Revoke = ncclResult_t (*)(ncclComm_t, int);
using Scalable = ncclResult_t (*)(ncclComm_t*, int, int, int, ncclUniqueId*, ncclConfig_t*);

bool isCarried(ncclComm_t comm) {
  void* carrier = nullptr;
  return extra<Carrier>("fuscoNcclComm")(comm, &carrier) == ncclSuccess;
}

void waitUntilReady(ncclComm_t comm) {
  ncclResult_t state = ncclInProgress;
  const auto start = Clock::now();
  while (state == ncclInProgress && secondsSince(start) < 30) {
    OK(ncclCommGetAsyncError(comm, &state));
    usleep(500);
  }
  ok(state, "a communicator made without blocking");
}

// All ranks are there, in order, and reached through FUSCO.
void expectCarried(ncclComm_t comm, int rank, int ranks, const std::string& what) {
  require(comm != nullptr, what + ": there is none");
  require(isCarried(comm), what + ": not carried: " + ncclGetLastError(nullptr));
  std::vector<int> all(static_cast<std::size_t>(ranks), -1);
  OK(ncclGroupStart());
  for (int peer = 0; peer < ranks; ++peer) {
    OK(ncclSend(&rank, 1, ncclInt32, peer, comm, nullptr));
    OK(ncclRecv(&all[static_cast<std::size_t>(peer)], 1, ncclInt32, peer, comm, nullptr));
  }
  OK(ncclGroupEnd());
  for (int r = 0; r < ranks; ++r) require(all[static_cast<std::size_t>(r)] == r, what + ": ranks are mixed up");
}

ncclConfig_t nonBlocking() {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return config;
}

void expectInProgress(ncclResult_t result, const std::string& what) {
  require(result == ncclInProgress, what + " answers " + std::to_string(static_cast<int>(result)));
}

void inits(const Rank& self, ncclComm_t first) {
  expectCarried(first, self.rank, self.ranks, "init");

  ncclConfig_t config = nonBlocking();
  ncclComm_t quick = nullptr;
  expectInProgress(ncclCommInitRankConfig(&quick, self.ranks, self.id(1), self.rank, &config), "init");
  waitUntilReady(quick);
  expectCarried(quick, self.rank, self.ranks, "init without blocking");

  // Its children do not block either, and are stored when the real library has made them.
  ncclComm_t half = nullptr, none = nullptr;
  expectInProgress(ncclCommSplit(quick, self.rank % 2, self.rank, &half, nullptr), "split");
  waitUntilReady(quick);
  expectCarried(half, self.rank / 2, (self.ranks + 1 - self.rank % 2) / 2, "split without blocking");
  OK(ncclCommSplit(quick, NCCL_SPLIT_NOCOLOR, 0, &none, nullptr));
  waitUntilReady(quick);
  require(none == nullptr, "no colour, no communicator");
  OK(ncclCommDestroy(half));
  OK(ncclCommDestroy(quick));

  // Two in a group, one that blocks and one that does not.
  ncclComm_t one = nullptr, other = nullptr;
  const ncclUniqueId ids[2] = {self.id(2), self.id(3)};
  OK(ncclGroupStart());
  OK(ncclCommInitRank(&one, self.ranks, ids[0], self.rank));
  const ncclResult_t added = ncclCommInitRankConfig(&other, self.ranks, ids[1], self.rank, &config);
  require(added == ncclSuccess || added == ncclInProgress, "init in a group");
  expectInProgress(ncclGroupEnd(), "a group with both kinds");
  waitUntilReady(other);
  waitUntilReady(one);
  expectCarried(one, self.rank, self.ranks, "init in a group");
  expectCarried(other, self.rank, self.ranks, "init in a group without blocking");
  OK(ncclCommDestroy(one));
  OK(ncclCommDestroy(other));

  ncclUniqueId several[2] = {self.id(4), self.id(5)};
  ncclComm_t scalable = nullptr;
  OK(extra<Scalable>("ncclCommInitRankScalable")(&scalable, self.ranks, self.rank, 2, several, nullptr));
  expectCarried(scalable, self.rank, self.ranks, "scalable init");
  OK(ncclCommDestroy(scalable));
}

void children(const Rank& self, ncclComm_t first) {
  ncclComm_t reversed = nullptr, none = nullptr;
  OK(ncclCommSplit(first, 7, -self.rank, &reversed, nullptr));
  expectCarried(reversed, self.ranks - 1 - self.rank, self.ranks, "split in reverse");
  OK(ncclCommDestroy(reversed));
  OK(ncclCommSplit(first, self.rank == 0 ? NCCL_SPLIT_NOCOLOR : 3, 0, &none, nullptr));
  require((none == nullptr) == (self.rank == 0), "no colour, no communicator");
  if (none != nullptr) {
    expectCarried(none, self.rank - 1, self.ranks - 1, "split without one");
    OK(ncclCommDestroy(none));
  }

  // Shrunk without the last rank, then grown again by it.
  int last = self.ranks - 1;
  ncclComm_t less = nullptr, more = nullptr;
  if (self.rank != last) {
    OK(extra<Shrink>("ncclCommShrink")(first, &last, 1, &less, nullptr, 0));
    expectCarried(less, self.rank, self.ranks - 1, "shrunk");
    if (self.rank == 0) {
      OK(extra<GetId>("ncclCommGetUniqueId")(less, &self.board->ids[6]));
      self.board->made[6] = 1;
    }
    const ncclUniqueId* const id = self.rank == 0 ? &self.board->ids[6] : nullptr;
    OK(extra<Grow>("ncclCommGrow")(less, self.ranks, id, -1, &more, nullptr));
    OK(ncclCommDestroy(less));
  } else {
    const ncclUniqueId id = self.id(6);
    OK(extra<Grow>("ncclCommGrow")(nullptr, self.ranks, &id, self.rank, &more, nullptr));
  }
  expectCarried(more, self.rank, self.ranks, "grown");
  OK(ncclCommDestroy(more));
}

// Fields that older headers have not.
ncclConfig_t configWith(const char* name, int policy) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
  config.commName = name;
  config.CTAPolicy = policy;
#else
  (void)name, (void)policy;
  throw std::runtime_error("this header's configuration has no names");
#endif
  return config;
}

// What is asked for by the configuration of a communicator.
void wishes(const Rank& self) {
  const auto made = [&](int id, const char* name, int policy) {
    ncclConfig_t config = configWith(name, policy);
    ncclComm_t comm = nullptr;
    OK(ncclCommInitRankConfig(&comm, self.ranks, self.id(id), self.rank, &config));
    const bool carried = isCarried(comm);
    OK(ncclCommDestroy(comm));
    return carried;
  };
  require(made(7, "experts", NCCL_CONFIG_UNDEF_INT), "a name that means nothing");
  require(!made(8, "nccl, please", NCCL_CONFIG_UNDEF_INT), "a name that asks for NCCL");
  require(!made(9, nullptr, 2), "CTA policy zero is never carried");
  require(made(10, nullptr, 1), "another CTA policy");
}

void ends(const Rank& self, ncclComm_t first) {
  // Captured: passed on, at both ends.
  int value = self.rank, got = -1;
  const auto graph = reinterpret_cast<cudaStream_t>(std::uintptr_t{0xca97});
  OK(ncclGroupStart());
  OK(ncclSend(&value, 1, ncclInt32, self.rank, first, graph));
  OK(ncclRecv(&got, 1, ncclInt32, self.rank, first, graph));
  OK(ncclGroupEnd());
  require(got == -1, "a captured call was carried");
  // A list that is not there: the real library says what is wrong.
  ncclComm_t wrong = nullptr;
  const ncclResult_t refused = extra<Shrink>("ncclCommShrink")(first, nullptr, 1, &wrong, nullptr, 0);
  require(refused == ncclInvalidArgument, "shrink without a list answers " + std::to_string(static_cast<int>(refused)));
  // Revoked: nothing more is carried, and what was on its way ends; then shrunk by who is left.
  const ncclComm_t revoked = self.connect(11);
  OK(extra<Revoke>("ncclCommRevoke")(revoked, 0));
  const ncclResult_t after = ncclSend(&value, 1, ncclInt32, 0, revoked, nullptr);
  require(after == ncclInvalidUsage, "use of a revoked one answers " + std::to_string(static_cast<int>(after)));
  int last = self.ranks - 1;
  ncclComm_t less = nullptr;
  if (self.rank != last) {
    OK(extra<Shrink>("ncclCommShrink")(revoked, &last, 1, &less, nullptr, kShrinkAbort));
    expectCarried(less, self.rank, self.ranks - 1, "shrunk after a failure");
    OK(ncclCommDestroy(less));
  }
  OK(ncclCommAbort(revoked));
  // Given up while it is still being made: no rank but this one comes.
  if (self.rank == 0) {
    ncclConfig_t config = nonBlocking();
    ncclComm_t never = nullptr;
    expectInProgress(ncclCommInitRankConfig(&never, self.ranks, self.id(12), 0, &config), "init");
    const ncclResult_t early = ncclSend(&value, 1, ncclInt32, 0, never, nullptr);
    require(early == ncclInvalidUsage, "use before it is ready answers " + std::to_string(static_cast<int>(early)));
    const auto start = Clock::now();
    OK(ncclCommAbort(never));
    require(secondsSince(start) < 5, "an abort of one that is being made");
  }
}

}  // namespace

void carriedCommunicators(const Rank& self) {
  const ncclComm_t first = self.connect(0);
  inits(self, first);
  children(self, first);
  wishes(self);
  ends(self, first);
  OK(ncclCommDestroy(first));
}

void notCarried(const Rank& self) {
  const ncclComm_t comm = self.connect(0);
  require(!isCarried(comm), "nothing was to be carried");
  OK(ncclCommDestroy(comm));
}

// An NCCL that cannot simulate a group says so, and the group is as open as before, with all that is in it.
void noSimulation(const Rank& self) {
  const ncclComm_t comm = self.connect(0);
  const auto simulate = reinterpret_cast<ncclResult_t (*)(void*)>(findExtra("ncclGroupSimulateEnd"));
  const int value = self.rank + 1;
  int got = -1;
  OK(ncclGroupStart());
  OK(ncclSend(&value, 1, ncclInt32, (self.rank + 1) % self.ranks, comm, nullptr));
  OK(ncclRecv(&got, 1, ncclInt32, (self.rank + self.ranks - 1) % self.ranks, comm, nullptr));
  require(simulate(nullptr) == ncclInvalidUsage, "this NCCL has ncclGroupSimulateEnd");
  OK(ncclGroupEnd());
  require(got == (self.rank + self.ranks - 1) % self.ranks + 1, "the group was lost");
  OK(ncclCommDestroy(comm));
}

// What libfusco said earlier on this thread does not stand before what NCCL says.
void lastErrors(const Rank& self) {
  const ncclComm_t comm = self.connect(0);
  require(!isCarried(comm), "nothing was to be carried");
  const std::string both = ncclGetLastError(comm);
  require(both.find("not carried") != std::string::npos, "the text is '" + both + "'");
  require(both.find("the double's last error") != std::string::npos, "NCCL's text is hidden by '" + both + "'");
  OK(ncclCommDestroy(comm));
}

// No thread is left to vote on communicators that NCCL has made: they are NCCL's, and ready.
void shortOfThreads(int ranks) {
  std::vector<ncclComm_t> comms(static_cast<std::size_t>(ranks));
  pthread_attr_t usual, huge;
  require(pthread_getattr_default_np(&usual) == 0 && pthread_attr_init(&huge) == 0, "attributes of threads");
  // No address space holds such a stack.
  pthread_attr_setstacksize(&huge, std::size_t{1} << 47);
  pthread_setattr_default_np(&huge);
  const ncclResult_t made = ncclCommInitAll(comms.data(), ranks, nullptr);
  pthread_setattr_default_np(&usual);
  OK(made);
  for (const ncclComm_t comm : comms) {
    ncclResult_t state = ncclInProgress;
    OK(ncclCommGetAsyncError(comm, &state));
    ok(state, "a communicator without a vote");
    require(!isCarried(comm), "a communicator is carried without a vote");
    int value = 0;
    OK(ncclSend(&value, 1, ncclInt32, 0, comm, nullptr));
    OK(ncclCommDestroy(comm));
  }
}

// The last rank is on another machine, as far as libfusco can tell: nobody waits for it.
void elsewhere(const Rank& self) {
  setenv("FUSCO_HOSTID", self.rank == self.ranks - 1 ? "there" : "here", 1);
  const ncclUniqueId id = self.id(0);
  const auto start = Clock::now();
  ncclComm_t comm = nullptr;
  OK(ncclCommInitRank(&comm, self.ranks, id, self.rank));
  require(secondsSince(start) < 4, "init took " + std::to_string(secondsSince(start)) + " s");
  require(!isCarried(comm), "a communicator of two machines");
  const std::string why = ncclGetLastError(nullptr);
  require(why.find("rank " + std::to_string(self.ranks - 1) + " is on another machine") != std::string::npos, why);
  OK(ncclCommDestroy(comm));
}

// Each rank makes the id by itself (NCCL_COMM_ID), which is the same everywhere but for a mark: nobody waits for ranks
// that have another one.
void everyoneMakesTheId(const Rank& self) {
  ncclUniqueId id;
  OK(ncclGetUniqueId(&id));
  const auto start = Clock::now();
  ncclComm_t comm = nullptr;
  OK(ncclCommInitRank(&comm, self.ranks, id, self.rank));
  require(secondsSince(start) < 4, "init took " + std::to_string(secondsSince(start)) + " s");
  require(!isCarried(comm), "a communicator whose ranks cannot meet");
  OK(ncclCommDestroy(comm));
}

// Only the communicator that asks for it by its name is carried (FUSCO_CARRY=none).
void carriedByName(const Rank& self) {
  const ncclComm_t first = self.connect(0);
  require(!isCarried(first), "nothing was to be carried");
  ncclConfig_t config = configWith("fusco experts", NCCL_CONFIG_UNDEF_INT);
  ncclComm_t named = nullptr;
  OK(ncclCommInitRankConfig(&named, self.ranks, self.id(1), self.rank, &config));
  expectCarried(named, self.rank, self.ranks, "by its name");
  OK(ncclCommDestroy(named));
  OK(ncclCommDestroy(first));
}

}  // namespace fusco::test
