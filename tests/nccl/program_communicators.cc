// How communicators come, go and fail.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <thread>

#include "fusco/fusco.h"
#include "nccl/program.h"

namespace fusco::test {

namespace {

using Clock = std::chrono::steady_clock;
double secondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// All ranks of a communicator are there and in order.
void checkWorks(ncclComm_t comm, int rank, int ranks) {
  int gotRank = -1, gotRanks = -1;
  OK(ncclCommUserRank(comm, &gotRank));
  OK(ncclCommCount(comm, &gotRanks));
  require(gotRank == rank && gotRanks == ranks, "rank " + std::to_string(gotRank) + " of " + std::to_string(gotRanks));
  std::vector<int> all(static_cast<std::size_t>(ranks), -1);
  if (hasCollectives()) OK(ncclAllGather(&rank, all.data(), 1, ncclInt32, comm, nullptr));
  for (int r = 0; !hasCollectives() && r < ranks; ++r) {
    OK(ncclGroupStart());
    OK(ncclSend(&rank, 1, ncclInt32, r, comm, nullptr));
    OK(ncclRecv(&all[static_cast<std::size_t>(r)], 1, ncclInt32, r, comm, nullptr));
    OK(ncclGroupEnd());
  }
  for (int r = 0; r < ranks; ++r) require(all[static_cast<std::size_t>(r)] == r, "all-gather of ranks");
}

void waitUntilReady(ncclComm_t comm) {
  ncclResult_t state = ncclInProgress;
  for (int i = 0; i < 30000 && state == ncclInProgress; ++i) {
    OK(ncclCommGetAsyncError(comm, &state));
    usleep(1000);
  }
  ok(state, "a non-blocking communicator");
}

std::size_t threadsHere() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<std::size_t>(std::distance(begin(tasks), end(tasks)));
}

using Shrink = ncclResult_t (*)(ncclComm_t, int*, int, ncclComm_t*, ncclConfig_t*, int);
using Grow = ncclResult_t (*)(ncclComm_t, int, const ncclUniqueId*, int, ncclComm_t*, ncclConfig_t*);
using GetId = ncclResult_t (*)(ncclComm_t, ncclUniqueId*);
using Revoke = ncclResult_t (*)(ncclComm_t, int);
using Scalable = ncclResult_t (*)(ncclComm_t*, int, int, int, ncclUniqueId*, ncclConfig_t*);

void expect(ncclResult_t got, ncclResult_t wanted, const std::string& part, const std::string& what) {
  require(got == wanted, what + ": " + std::to_string(static_cast<int>(got)) + " " + ncclGetLastError(nullptr));
  require(std::string(ncclGetLastError(nullptr)).find(part) != std::string::npos,
          what + ": the text is '" + ncclGetLastError(nullptr) + "'");
}

}  // namespace

void communicators(const Rank& self) {
  const ncclComm_t comm = self.connect(0);
  checkWorks(comm, self.rank, self.ranks);

  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t nonBlocking = nullptr;
  const ncclResult_t started = ncclCommInitRankConfig(&nonBlocking, self.ranks, self.id(1), self.rank, &config);
  require(started == ncclInProgress, "non-blocking init");
  waitUntilReady(nonBlocking);
  checkWorks(nonBlocking, self.rank, self.ranks);
  OK(ncclCommDestroy(nonBlocking));

  // In a group, beside one that blocks: its end tells that the other goes on.
  ncclComm_t blocking = nullptr;
  OK(ncclGroupStart());
  OK(ncclGroupStart());
  OK(ncclCommInitRankConfig(&nonBlocking, self.ranks, self.id(5), self.rank, &config));
  OK(ncclGroupEnd());
  OK(ncclCommInitRank(&blocking, self.ranks, self.id(6), self.rank));
  require(ncclGroupEnd() == ncclInProgress, "the end of a group with a non-blocking init");
  OK(ncclGroupStart());
  OK(ncclGroupEnd());
  waitUntilReady(nonBlocking);
  checkWorks(nonBlocking, self.rank, self.ranks);
  checkWorks(blocking, self.rank, self.ranks);
  OK(ncclCommDestroy(nonBlocking));
  OK(ncclCommDestroy(blocking));

  const std::size_t threads = threadsHere();
  ncclUniqueId ids[2] = {self.id(2), self.id(3)};
  ncclComm_t scalable = nullptr;
  OK(extra<Scalable>("ncclCommInitRankScalable")(&scalable, self.ranks, self.rank, 2, ids, nullptr));
  checkWorks(scalable, self.rank, self.ranks);
  OK(ncclCommDestroy(scalable));
  // Nor does anybody wait for ranks by the ids that are left.
  for (int i = 0; i < 10000 && threadsHere() > threads; ++i) usleep(1000);
  require(threadsHere() <= threads, "threads stay behind");

  ncclComm_t none = comm;
  OK(ncclCommSplit(comm, self.rank == 0 ? NCCL_SPLIT_NOCOLOR : 3, 0, &none, nullptr));
  require((none == nullptr) == (self.rank == 0), "no colour, no communicator");
  if (none != nullptr) {
    checkWorks(none, self.rank - 1, self.ranks - 1);
    OK(ncclCommDestroy(none));
  }

  // Shrunk without the last rank, while the parent lives on; then grown again by it.
  int last = self.ranks - 1;
  ncclComm_t less = nullptr, more = nullptr;
  if (self.rank != last) {
    OK(extra<Shrink>("ncclCommShrink")(comm, &last, 1, &less, nullptr, 0));
    checkWorks(less, self.rank, self.ranks - 1);
    if (self.rank == 0) {
      OK(extra<GetId>("ncclCommGetUniqueId")(less, &self.board->ids[4]));
      self.board->made[4] = 1;
    }
    OK(extra<Grow>("ncclCommGrow")(less, self.ranks, self.rank == 0 ? &self.board->ids[4] : nullptr, -1, &more,
                                   nullptr));
    OK(ncclCommDestroy(less));
  } else {
    const ncclUniqueId id = self.id(4);
    OK(extra<Grow>("ncclCommGrow")(nullptr, self.ranks, &id, self.rank, &more, nullptr));
  }
  checkWorks(more, self.rank, self.ranks);
  OK(ncclCommDestroy(more));

  // Revoked, then shrunk by who is left.
  OK(extra<Revoke>("ncclCommRevoke")(comm, 0));
  expect(ncclAllReduce(&last, &last, 1, ncclInt32, ncclSum, comm, nullptr), ncclInvalidUsage, "revoked",
         "use of a revoked one");
  if (self.rank != last) {
    OK(extra<Shrink>("ncclCommShrink")(comm, &last, 1, &less, nullptr, kShrinkAbort));
    checkWorks(less, self.rank, self.ranks - 1);
    OK(ncclCommDestroy(less));
  }
  OK(ncclCommDestroy(comm));
}

// Refused while a plan lives on it, and nothing is lost by that.
void destroyTooEarly() {
  ncclUniqueId id;
  ncclComm_t alone = nullptr;
  OK(ncclGetUniqueId(&id));
  OK(ncclCommInitRank(&alone, 1, id, 0));
  fuscoComm* carrier = nullptr;
  OK(extra<decltype(&fuscoNcclComm)>("fuscoNcclComm")(alone, &carrier));
  const std::vector<std::int64_t> experts(8, 0);
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  config.expertIds = experts.data();
  config.tokens = 8;
  config.experts = 1;
  fuscoPlan_t plan = nullptr;
  const auto create = extra<decltype(&fuscoPlanCreate)>("fuscoPlanCreate");
  const auto destroy = extra<decltype(&fuscoPlanDestroy)>("fuscoPlanDestroy");
  require(create(&plan, &config, carrier, nullptr) == fuscoSuccess, "a plan on the carrier");
  for (int i = 0; i < 2; ++i)
    expect(ncclCommDestroy(alone), ncclInvalidUsage, "destroy them first", "destroyed before its plan");
  checkWorks(alone, 0, 1);
  require(destroy(plan) == fuscoSuccess, "the plan's end");
  OK(ncclCommDestroy(alone));
  expect(ncclCommDestroy(alone), ncclInvalidArgument, "destroyed", "destroyed twice");
}

void misuse(const Rank& self) {
  const ncclComm_t comm = self.connect();
  int a = 0, b = 0;
  expect(ncclGroupEnd(), ncclInvalidUsage, "ncclGroupStart", "an end without a start");
  OK(ncclGroupStart());
  OK(ncclGroupEnd());
  expect(ncclSend(&a, 1, ncclInt32, self.ranks, comm, nullptr), ncclInvalidArgument, "peer",
         "a peer that is not there");
  expect(ncclSend(nullptr, 1, ncclInt32, 0, comm, nullptr), ncclInvalidArgument, "NULL", "no buffer");
  expect(ncclSend(&a, 1, static_cast<ncclDataType_t>(99), 0, comm, nullptr), ncclInvalidArgument, "99", "no such type");
  expect(ncclSend(&a, 1, ncclInt32, 0, nullptr, nullptr), ncclInvalidArgument, "NULL", "no communicator");
  expect(ncclAllReduce(&a, &b, 1, ncclInt32, static_cast<ncclRedOp_t>(77), comm, nullptr), ncclInvalidArgument, "77",
         "no such operation");
  expect(extra<GatherSend>("gatherSend")(&a, 3, ncclInt8, 0, comm, nullptr, &b, 2), ncclInvalidArgument, "segments",
         "half a segment");
  // An error inside sticks, and nothing of the group runs.
  OK(ncclGroupStart());
  OK(ncclSend(&a, 1, ncclInt32, self.rank, comm, nullptr));
  require(ncclRecv(&b, 1, ncclInt32, -1, comm, nullptr) == ncclInvalidArgument, "a bad receive in a group");
  OK(ncclRecv(&b, 1, ncclInt32, self.rank, comm, nullptr));
  expect(ncclGroupEnd(), ncclInvalidArgument, "peer", "a group with an error");
  // Closed without being run.
  OK(ncclGroupStart());
  OK(ncclSend(&a, 1, ncclInt32, self.rank, comm, nullptr));
  OK(reinterpret_cast<ncclResult_t (*)(void*)>(findExtra("ncclGroupSimulateEnd"))(nullptr));
  expect(ncclSend(&a, 1, ncclInt32, self.rank, comm, nullptr), ncclInvalidUsage, "itself", "a send to oneself alone");
  // Nothing is no mistake, as in NCCL: cleaning up needs no questions.
  OK(ncclCommFinalize(nullptr));
  OK(ncclCommDestroy(nullptr));
  OK(ncclCommAbort(nullptr));
  OK(extra<CommDeregister>("ncclCommDeregister")(comm, nullptr));
  ncclUniqueId unmarked{};
  ncclComm_t never = comm;
  expect(ncclCommInitRank(&never, 1, unmarked, 0), ncclInvalidArgument, "FUSCO_DEVICE=host",
         "an id of somebody else's");
  require(never == nullptr, "no communicator after a failed init");
  expect(reinterpret_cast<ncclResult_t (*)(ncclComm_t, void*, std::size_t, void**, int)>(
             findExtra("ncclCommWindowRegister"))(comm, &a, 4, nullptr, 0),
         ncclInvalidUsage, "host mode", "what host mode has not");
  ncclResult_t state = ncclInProgress;
  const ncclComm_t second = self.connect(1);
  void* registered = nullptr;
  OK(extra<CommRegister>("ncclCommRegister")(second, &a, sizeof a, &registered));
  OK(ncclCommFinalize(second));
  OK(extra<CommDeregister>("ncclCommDeregister")(second, registered));
  OK(ncclCommDestroy(second));
  expect(ncclCommDestroy(second), ncclInvalidArgument, "destroyed", "destroyed twice");
  destroyTooEarly();
  // Sizes that do not match: both are named, on both sides.
  const ncclComm_t third = self.connect(2);
  OK(ncclCommGetAsyncError(third, &state));
  require(state == ncclSuccess, "a healthy communicator");
  // What goes wrong next is told to everybody: first, all have asked.
  ++self.board->words[1];
  while (self.board->words[1] < self.ranks) usleep(100);
  if (self.rank == 0) {
    std::vector<int> many(10);
    expect(ncclSend(many.data(), 10, ncclInt32, 1, third, nullptr), ncclInvalidUsage, "40", "sizes that differ");
  } else if (self.rank == 1) {
    std::vector<int> few(5);
    expect(ncclRecv(few.data(), 5, ncclInt32, 0, third, nullptr), ncclInvalidUsage, "20", "sizes that differ");
    OK(ncclCommGetAsyncError(third, &state));
    require(state == ncclInvalidUsage, "the error stays");
  }
  // Nobody gives up before both have seen it.
  ++self.board->words[0];
  while (self.board->words[0] < self.ranks) usleep(100);
  OK(ncclCommAbort(third));
  if (self.ranks > 0) OK(ncclAllReduce(&self.rank, &b, 1, ncclInt32, ncclMax, comm, nullptr));
  require(b == self.ranks - 1, "the first communicator still works");
  OK(ncclCommDestroy(comm));
}

void abortWhileWaiting(const Rank& self) {
  const ncclComm_t comm = self.connect();
  std::atomic<bool> waiting{false}, ended{false};
  ncclResult_t result = ncclSuccess;
  // Everybody waits for a message that nobody sends; rank 0 is aborted by another thread.
  std::thread waits([&] {
    int value = 0;
    ncclGroupStart();
    ncclRecv(&value, 1, ncclInt32, (self.rank + 1) % self.ranks, comm, nullptr);
    waiting = true;
    result = ncclGroupEnd();
    ended = true;
  });
  struct Joined {
    std::thread& thread;
    ~Joined() {
      if (thread.joinable()) thread.join();
    }
  } joined{waits};
  // A group that ends in its call after the abort would be told that its communicator is none.
  while (!waiting) usleep(1000);
  usleep(300000);
  require(!ended, "nothing to wait for");
  // Nobody aborts before all have seen that they wait.
  ++self.board->words[0];
  while (self.board->words[0] < self.ranks) usleep(100);
  const auto start = Clock::now();
  if (self.rank == 0) OK(ncclCommAbort(comm));
  while (!ended && secondsSince(start) < 10) usleep(1000);
  const double seconds = secondsSince(start);
  require(ended, "the group never ended");
  waits.join();
  require(result == ncclRemoteError, "the group ended with " + std::to_string(static_cast<int>(result)));
  require(seconds < 5, "the group ended after " + std::to_string(seconds) + " s");
  if (self.rank != 0) {
    ncclResult_t state = ncclSuccess;
    OK(ncclCommGetAsyncError(comm, &state));
    require(state == ncclRemoteError, "the error stays");
    OK(ncclCommAbort(comm));
  }
  // Life goes on.
  const ncclComm_t again = self.connect(1);
  checkWorks(again, self.rank, self.ranks);
  OK(ncclCommDestroy(again));
}

// The last rank does without libfusco: it gets the ids, and does not come.
void oneMissing(const Rank& self) {
  const ncclUniqueId id = self.id(0), second = self.id(1);
  const auto start = Clock::now();
  if (self.rank == self.ranks - 1) return;
  ncclComm_t comm = nullptr;
  const std::string missing = "rank " + std::to_string(self.ranks - 1) + " did not show up";
  expect(ncclCommInitRank(&comm, self.ranks, id, self.rank), ncclRemoteError, missing, "init with a rank too few");
  require(comm == nullptr, "a communicator without one of its ranks");
  // Without blocking: the communicator says why, whatever else this thread was told.
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  require(ncclCommInitRankConfig(&comm, self.ranks, second, self.rank, &config) == ncclInProgress, "non-blocking init");
  ncclResult_t state = ncclInProgress;
  while (state == ncclInProgress && secondsSince(start) < 10) {
    OK(ncclCommGetAsyncError(comm, &state));
    usleep(1000);
  }
  require(state == ncclRemoteError,
          "the state of one that cannot be made is " + std::to_string(static_cast<int>(state)));
  expect(ncclGroupEnd(), ncclInvalidUsage, "ncclGroupStart", "an end without a start");
  const std::string why = ncclGetLastError(comm);
  require(why.find(missing) != std::string::npos, "the communicator's text is '" + why + "'");
  OK(ncclCommDestroy(comm));
  require(secondsSince(start) < 10, "that took too long");
}

// A child that is forked off while ids wait for their ranks, and ends, takes nothing from its parent.
void forkedOff(const Rank& self) {
  if (self.rank == 0) {
    OK(ncclGetUniqueId(&self.board->ids[0]));
    const pid_t child = fork();
    if (child == 0) {
#if defined(__SANITIZE_ADDRESS__)
      // The sanitizer's own locks may be held by a thread that is not here.
      _exit(0);
#endif
      alarm(20);
      bool well = true;
#if !defined(__SANITIZE_THREAD__)
      // ThreadSanitizer refuses threads here.
      ncclUniqueId id;
      ncclComm_t alone = nullptr;
      well = ncclGetUniqueId(&id) == ncclSuccess && ncclCommInitRank(&alone, 1, id, 0) == ncclSuccess &&
             ncclCommDestroy(alone) == ncclSuccess;
#endif
      std::exit(well ? 0 : 1);
    }
    int status = -1;
    require(waitpid(child, &status, 0) == child, "no child");
    require(status == 0, "the child ended with " + std::to_string(status));
    self.board->made[0] = 1;
  }
  const ncclComm_t comm = self.connect();
  checkWorks(comm, self.rank, self.ranks);
  OK(ncclCommDestroy(comm));
}

// Against the double, or through libfusco to it: a few calls of each kind, none of which fails.
void passedOn(const Rank& self) {
  const auto start = Clock::now();
  ncclComm_t comm = nullptr;
  if (std::getenv("FUSCO_TEST_ONE_WITHOUT") != nullptr && self.rank == self.ranks - 1) {
    // As a process without libfusco has it: the other library's own functions.
    void* const other = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
    require(other != nullptr, "the other library is not loaded");
    const auto init =
        reinterpret_cast<ncclResult_t (*)(ncclComm_t*, int, ncclUniqueId, int)>(dlsym(other, "pncclCommInitRank"));
    OK(init(&comm, self.ranks, self.id(0), self.rank));
    return;
  }
  comm = self.connect();
  require(secondsSince(start) < 15, "init took too long");
  int value = 0;
  OK(ncclGroupStart());
  OK(ncclSend(&value, 1, ncclInt32, 0, comm, nullptr));
  OK(ncclRecv(&value, 1, ncclInt32, 0, comm, nullptr));
  OK(ncclGroupEnd());
  OK(extra<AlltoAll>("ncclAlltoAll")(&value, &value, 1, ncclInt32, comm, nullptr));
  ncclResult_t state = ncclInProgress;
  OK(ncclCommGetAsyncError(comm, &state));
  require(state == ncclSuccess, "the double is always well");
  OK(ncclCommDestroy(comm));
  const auto calls = reinterpret_cast<int (*)(const char*)>(findExtra("doubleCalls"));
  require(calls("CommInitRank") == 1 && calls("CommDestroy") == 1, "init and destroy reach the real library once");
  require(calls("Send") == 2 && calls("Recv") == 2 && calls("AlltoAll") == 1, "sends reach the real library");
  require(calls("CommGetAsyncError") == 1, "asking reaches the real library");
}

// Nor does it wait for a lock that another thread held when it was forked off.
void forkedOffMeanwhile() {
  const auto stale = reinterpret_cast<ncclComm_t>(std::uintptr_t{0x5708});
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  ncclCommAbort(stale);  // what is made once, is
  for (int i = 0; i < 3; ++i) {
    others.emplace_back([&] {
      while (!stop) ncclCommAbort(stale);
    });
  }
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr int kForks = 50;
#else
  constexpr int kForks = 1000;
#endif
  int status = 0;
  for (int i = 0; i < kForks && status == 0; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      _exit(ncclCommAbort(stale) == ncclInvalidArgument ? 0 : 1);
    }
    if (waitpid(child, &status, 0) != child) status = -1;
  }
  stop = true;
  for (std::thread& thread : others) thread.join();
  require(status == 0, "a child ended with " + std::to_string(status));
}

// Who has communicators in static objects calls when the main thread's own variables are gone.
void lastWords() {
  const auto stale = reinterpret_cast<ncclComm_t>(std::uintptr_t{0x5708});
  struct End {
    ncclComm_t comm;
    ~End() {
      ncclResult_t state = ncclSuccess;
      bool well = ncclCommGetAsyncError(comm, &state) == ncclInvalidArgument;
      well = well && std::string(ncclGetLastError(comm)).find("ncclCommGetAsyncError: there is no") == 0;
      int value = 1, got = 0;
      ncclUniqueId id;
      ncclComm_t alone = nullptr;
      well = well && ncclGetUniqueId(&id) == ncclSuccess && ncclCommInitRank(&alone, 1, id, 0) == ncclSuccess;
      well = well && ncclGroupStart() == ncclSuccess;
      well = well && ncclSend(&value, 1, ncclInt32, 0, alone, nullptr) == ncclSuccess;
      well = well && ncclRecv(&got, 1, ncclInt32, 0, alone, nullptr) == ncclSuccess;
      well = well && ncclGroupEnd() == ncclSuccess && got == 1;
      well = well && ncclCommDestroy(alone) == ncclSuccess;
      if (!well) _exit(1);
    }
  };
  static const End end{stale};
  // A text that has to grow later.
  int ranks = 0;
  require(ncclCommCount(stale, &ranks) == ncclInvalidArgument, "a communicator that never was");
  require(ncclGetLastError(nullptr)[0] != 0, "an error without a text");
}

void answers() {
  int version = 0, number = -1;
  ncclResult_t result = ncclGetVersion(&version);
  std::printf("version: %d, %d\n", static_cast<int>(result), version);
  for (int code = 0; code < 9; ++code)
    std::printf("error %d: %s\n", code, ncclGetErrorString(static_cast<ncclResult_t>(code)));
  std::printf("group: %d\n", static_cast<int>(ncclGroupStart()));
  std::printf("group: %d\n", static_cast<int>(ncclGroupEnd()));
  std::printf("send: %d\n", static_cast<int>(ncclSend(&number, 1, ncclInt32, 0, nullptr, nullptr)));
  std::printf("count: %d\n", static_cast<int>(ncclCommCount(nullptr, &number)));
  ncclUniqueId id{};
  result = ncclGetUniqueId(&id);
  std::printf("id: %d\n", static_cast<int>(result));
  ncclComm_t comm = nullptr;
  result = ncclCommInitRank(&comm, 1, id, 0);
  std::printf("init: %d, %s\n", static_cast<int>(result), ncclGetLastError(nullptr));
}

}  // namespace fusco::test
