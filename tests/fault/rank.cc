// A rank of a fault case, as a process: joins, shuffles three times with everything checked, destroys; whatever ends
// that, it must end with an answer, leave nothing behind, and be able to begin anew. Usage: fault_rank RANK, the board
// as descriptor 3.
#include <arpa/inet.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "base/clock.h"
#include "base/point.h"
#include "comm/world.h"
#include "fault/board.h"
#include "shuffle/case.h"

using namespace fusco;
using namespace fusco::fault;
using comm::testing::Footprint;
using comm::testing::footprint;

namespace {

Board* board;
int own;
std::atomic<bool> armed{false};
fuscoComm_t current = nullptr;

void complain(const std::string& text) {
  RankPage& page = board->ranks[own];
  page.complaint.set(page.complaint.get() + text + "; ");
}

bool pointIs(const char* point) { return std::strcmp(board->what.point, point) == 0; }

// The child of a rank may not use its communicator, and must not disturb it.
void forkAndUse() {
  const pid_t child = ::fork();
  if (child == 0) {
    int found = 0;
    if (current != nullptr) {
      fuscoResult_t error = fuscoSuccess;
      fuscoPlan_t plan = nullptr;
      fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
      if (fuscoPlanCreate(&plan, &config, current, nullptr) != fuscoInvalidUsage) found |= 1;
      if (fuscoCommGetAsyncError(current, &error) != fuscoInvalidUsage) found |= 2;
      if (fuscoCommDestroy(current) != fuscoInvalidUsage) found |= 4;
    }
    ::_exit(found);
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    complain("the forked child ended with status " + std::to_string(status));
}

// Where the victim is when it happens.
void atPoint(const char* name, int number) {
  const CaseText& what = board->what;
  if (std::strcmp(name, "taken") == 0 && number < Board::kMostRanks) board->taken[number].store(1);
  if (own != what.victim) return;
  if (!armed.load() || number != what.number || !pointIs(name)) return;
  static std::atomic<bool> came{false};
  if (came.exchange(true)) return;
  const auto now = [] { board->faultNs.store(nowNs()); };
  // Who dies, or is cut off, before anybody has heard of it is only missing.
  if (pointIs("meet") && number == 1) {
    for (const Deadline patience = Deadline::afterMs(20000); board->taken[own].load() == 0 && !patience.passed();)
      ::usleep(500);
  }
  board->atPoint.store(1);
  switch (what.fault) {
    case Fault::kill:
      now();
      ::kill(::getpid(), SIGKILL);
      break;
    case Fault::stop:
      now();
      ::kill(::getpid(), SIGSTOP);
      break;
    case Fault::exit:
      now();
      std::exit(0);
    case Fault::reset:
    case Fault::cut:
    case Fault::slow:
      while (board->go.load() == 0) ::usleep(500);
      break;
    case Fault::descriptors: {
      now();
      const int next = ::dup(0);
      ::close(next);
      rlimit limit{};
      ::getrlimit(RLIMIT_NOFILE, &limit);
      limit.rlim_cur = static_cast<rlim_t>(next + what.room);
      ::setrlimit(RLIMIT_NOFILE, &limit);
      break;
    }
    case Fault::memory: {
      now();
      // Shared memory is files without names: none may grow any more. The signal that comes with it is the caller's
      // affair.
      ::signal(SIGXFSZ, SIG_IGN);
      rlimit limit{};
      ::getrlimit(RLIMIT_FSIZE, &limit);
      limit.rlim_cur = 0;
      ::setrlimit(RLIMIT_FSIZE, &limit);
      break;
    }
    case Fault::fork:
      now();
      forkAndUse();
      break;
  }
}

// A shuffle of all layouts but the slotted one, which has no exchange; the same on all ranks.
test::Case shuffleOf(std::uint64_t seed, int ranks) {
  for (;; seed += 1000) {
    test::Case one = test::randomCase(seed, ranks);
    if (one.layout != fuscoLayoutSlotted) return one;
  }
}

// All tokens to the next node: enough for a slow cable to be held up for seconds, whose node ever it is and whichever
// way the rows go.
test::Case longShuffleOf(std::uint64_t seed, int ranks, int nodes) {
  test::Case one;
  constexpr std::uint64_t kTypesTakeTurns = 28;
  one.seed = seed - seed % kTypesTakeTurns;  // float: what combine sends has as many bytes
  one.ranks = ranks;
  one.experts = ranks;
  one.topk = 1;
  one.rowBytes = 16384;
  for (int rank = 0; rank < ranks; ++rank) {
    constexpr std::int64_t kTokens = 32;
    one.tokens.push_back(kTokens);
    one.ids.emplace_back(kTokens, (rank + ranks / nodes) % ranks);
    one.weights.emplace_back(kTokens, 0.5f);
  }
  return one;
}

void shuffle(fuscoComm_t comm, const test::Case& what, int rank) {
  const std::string wrong = test::runRank(what, comm, rank);
  if (!wrong.empty()) complain("wrong data was called a success: " + wrong);
}

fuscoComm_t join(int which, int rank, int ranks, bool makesId) {
  fuscoUniqueId id;
  if (makesId) {
    if (fuscoGetUniqueId(&id) != fuscoSuccess) throw std::runtime_error(fuscoGetLastError(nullptr));
    std::memcpy(board->ids[which], id.internal, sizeof(id.internal));
    board->idReady[which].store(1);
  }
  while (board->idReady[which].load() == 0) ::usleep(500);
  std::memcpy(id.internal, board->ids[which], sizeof(id.internal));
  fuscoComm_t comm = nullptr;
  const fuscoResult_t result = fuscoCommInitRank(&comm, ranks, id, rank);
  test::ok(result, "fuscoCommInitRank");
  return comm;
}

// What a rank is there for. Throws what the library says.
void attempt() {
  const CaseText& what = board->what;
  const bool duringInit = pointIs("meet") || pointIs("answer") || pointIs("connect");
  if (own == what.held) {
    while (board->go.load() == 0) ::usleep(500);
  }
  if (own == what.after) {
    while (board->taken[what.victim].load() == 0) ::usleep(500);
  }
  pointWatcher.store(atPoint);
  armed.store(duringInit);
  current = join(0, own, what.ranks, own == 0);
  board->ranks[own].joined.store(1);
  for (int round = 0; round < 3; ++round) {
    armed.store(round > 0 && !duringInit && !pointIs("destroy"));
    const std::uint64_t seed = what.seed * 3 + static_cast<std::uint64_t>(round);
    const bool meetsSlowCable = what.fault == Fault::slow && round == (duringInit ? 0 : 1);
    shuffle(current, meetsSlowCable ? longShuffleOf(seed, what.ranks, what.nodes) : shuffleOf(seed, what.ranks), own);
  }
  armed.store(pointIs("destroy"));
}

void destroy() {
  // Its handle is gone before anything else happens.
  const fuscoComm_t comm = std::exchange(current, nullptr);
  if (comm == nullptr) return;
  const std::int64_t begin = nowNs();
  if (fuscoCommDestroy(comm) != fuscoSuccess) complain(std::string("destroy: ") + fuscoGetLastError(nullptr));
  board->ranks[own].destroyNs.store(nowNs() - begin);
}

// A meeting place stays open for a while to tell late comers of a failure.
void expectFootprint(const Footprint& before, const char* when) {
  Footprint after;
  for (const Deadline patience = Deadline::afterMs(8000); !patience.passed(); ::usleep(20000)) {
    after = footprint();
    // A thread that had been joined may have been counted before.
    if (after.descriptors == before.descriptors && after.threads <= before.threads && after.mappings <= before.mappings)
      return;
  }
  const auto numbers = [](const Footprint& one) {
    return std::to_string(one.descriptors) + " descriptors, " + std::to_string(one.threads) + " threads, " +
           std::to_string(one.mappings) + " mappings";
  };
  complain(std::string(when) + " there are " + numbers(after) + "; before there were " + numbers(before));
}

// Its own numbers among those who are left.
void beginAnew() {
  int rank = 0, ranks = 0;
  for (int one = 0; one < board->what.ranks; ++one) {
    if (board->ranks[one].pid.load() == 0) continue;
    if (one < own) ++rank;
    ++ranks;
  }
  fuscoComm_t comm = join(1, rank, ranks, rank == 0);
  shuffle(comm, shuffleOf(board->what.seed + 7, ranks), rank);
  if (fuscoCommDestroy(comm) != fuscoSuccess) complain("the second communicator cannot be destroyed");
}

}  // namespace

int main(int, char** arguments) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  own = std::atoi(arguments[1]);
  board = static_cast<Board*>(::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, 3, 0));
  if (board == MAP_FAILED) return 1;
  RankPage& page = board->ranks[own];
  try {
    // What is made once in a process is no leak.
    fuscoUniqueId id;
    fuscoComm_t alone = nullptr;
    if (fuscoGetUniqueId(&id) != fuscoSuccess || fuscoCommInitRank(&alone, 1, id, 0) != fuscoSuccess)
      throw std::runtime_error(fuscoGetLastError(nullptr));
    shuffle(alone, shuffleOf(1, 1), 0);
    fuscoCommDestroy(alone);
    const Footprint before = footprint();
    rlimit files{}, sizes{};
    ::getrlimit(RLIMIT_NOFILE, &files);
    ::getrlimit(RLIMIT_FSIZE, &sizes);
    try {
      attempt();
      page.endedNs.store(nowNs());
    } catch (const std::exception& error) {
      if (const auto* call = dynamic_cast<const test::CallFailed*>(&error)) page.code.store(call->code);
      page.text.set(error.what());
      page.failed.store(1);
      page.waitedForCoreNs.store(waitedForCore(::getpid()));
      page.endedNs.store(nowNs());
    }
    destroy();
    pointWatcher.store(nullptr);
    ::setrlimit(RLIMIT_NOFILE, &files);
    ::setrlimit(RLIMIT_FSIZE, &sizes);
    expectFootprint(before, "after destroy");
    page.over.store(1);
    while (board->recover.load() == 0) ::usleep(1000);
    beginAnew();
    expectFootprint(before, "after the second communicator");
  } catch (const std::exception& error) {
    complain(std::string("it cannot go on: ") + error.what());
  }
  page.over.store(2);
  return 0;
}
