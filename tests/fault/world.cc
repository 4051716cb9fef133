#include "fault/world.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <thread>

#include "base/clock.h"
#include "base/handle.h"
#include "fault/connections.h"
#include "fusco/fusco.h"

namespace fusco::fault {

namespace {

constexpr std::int64_t kPatienceMs = 60000;  // with a whole case; then it hangs
constexpr std::int64_t kStoppedMs = 5000;
constexpr std::int64_t kDestroyLimitMs = 5000;

std::int64_t msOf(std::int64_t ns) { return ns / 1000000; }

class World {
 public:
  explicit World(const FaultCase& one);
  ~World();
  Outcome run();

 private:
  void start(int rank);
  void say(const std::string& complaint) { outcome_.complaints.push_back(complaint); }
  bool await(const char* what, const std::function<bool()>& come);
  bool left(int rank) const { return page(rank).pid.load() != 0; }
  RankPage& page(int rank) const { return board_->ranks[rank]; }
  bool allEnded() const;
  void fault();
  void reap(int rank, const char* why);
  void judge();
  void judge(int rank);
  std::string nameOf(int rank) const;
  int nodeOf(int rank) const { return rank / one_.layout.ranksPerNode; }
  bool deadly() const { return one_.fault == Fault::kill || one_.fault == Fault::exit; }
  void cable(const char* words) const;

  const FaultCase& one_;
  UniqueFd memory_, said_;
  Board* board_ = nullptr;
  std::vector<pid_t> pids_;
  std::vector<std::int64_t> waitedBefore_;
  std::int64_t noticedNs_ = 0;
  Outcome outcome_;
};

World::World(const FaultCase& one) : one_(one) {
  memory_ = UniqueFd(::memfd_create("board", MFD_CLOEXEC));
  said_ = UniqueFd(::memfd_create("said", MFD_CLOEXEC));
  if (!memory_ || !said_ || ::ftruncate(memory_.get(), sizeof(Board)) != 0)
    throw std::runtime_error("no memory for a board");
  void* at = ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, memory_.get(), 0);
  if (at == MAP_FAILED) throw std::runtime_error("no memory for a board");
  board_ = new (at) Board;
  CaseText& what = board_->what;
  what.ranks = one.layout.ranks();
  what.nodes = one.layout.nodes;
  what.fault = one.fault;
  what.victim = one.victim;
  what.held = one.held;
  what.after = one.after;
  what.number = one.number;
  what.room = one.room;
  what.seed = one.seed;
  std::snprintf(what.point, sizeof(what.point), "%s", one.point.c_str());
}

World::~World() {
  for (std::size_t rank = 0; rank < pids_.size(); ++rank) reap(static_cast<int>(rank), "");
  ::munmap(board_, sizeof(Board));
}

void World::start(int rank) {
  const std::string node = std::to_string(nodeOf(rank));
  std::vector<std::string> environment = {"FUSCO_DEVICE=host", "FUSCO_DEBUG=WARN", "FUSCO_INIT_TIMEOUT_MS=40000",
                                          "FUSCO_OPERATION_TIMEOUT_MS=40000", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"};
  UniqueFd network;
  if (!one_.place.cluster.empty()) {
    environment.push_back("FUSCO_SOCKET_IFNAME==lane" + std::to_string(one_.place.lane));
    network = UniqueFd(::open(("/run/netns/" + one_.place.cluster + node).c_str(), O_RDONLY | O_CLOEXEC));
    if (!network) throw std::runtime_error("the cluster's namespace cannot be opened");
  } else {
    environment.push_back("FUSCO_HOSTID=fault" + node);
    environment.push_back("FUSCO_SOCKET_IFNAME=lo");
  }
  for (const char* name : {"ASAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS", "LSAN_OPTIONS"}) {
    if (const char* value = std::getenv(name)) environment.push_back(std::string(name) + "=" + value);
  }
  std::vector<char*> variables;
  for (std::string& variable : environment) variables.push_back(variable.data());
  variables.push_back(nullptr);
  std::string number = std::to_string(rank), program = FAULT_RANK;
  char* const arguments[] = {program.data(), number.data(), nullptr};
  const int board = memory_.get(), said = said_.get(), space = network ? network.get() : -1;
  const pid_t pid = ::fork();
  if (pid == 0) {
    // Other threads of this process may hold any lock: only system calls from here on.
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (space >= 0 && ::setns(space, CLONE_NEWNET) != 0) ::_exit(3);
    ::dup2(said, 2);
    if (board == 3) {
      ::fcntl(3, F_SETFD, 0);
    } else {
      ::dup2(board, 3);
    }
    ::close_range(4, ~0u, 0);
    ::execve(arguments[0], arguments, variables.data());
    ::_exit(4);
  }
  page(rank).pid.store(pid);
  pids_.push_back(pid);
}

// Ends a rank that has not ended; `why` is a complaint about it.
void World::reap(int rank, const char* why) {
  pid_t& pid = pids_[static_cast<std::size_t>(rank)];
  if (pid <= 0) return;
  if (*why != 0) say("rank " + std::to_string(rank) + " " + why);
  ::kill(pid, SIGKILL);
  while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
  }
  pid = 0;
}

bool World::await(const char* what, const std::function<bool()>& come) {
  for (const Deadline patience = Deadline::afterMs(kPatienceMs); !come(); ::usleep(2000)) {
    if (patience.passed()) {
      say(std::string("in vain waited for ") + what);
      return false;
    }
    // Who dies unasked is found here, and not by the end of patience.
    for (std::size_t rank = 0; rank < pids_.size(); ++rank) {
      int status = 0;
      if (pids_[rank] <= 0 || ::waitpid(pids_[rank], &status, WNOHANG) != pids_[rank]) continue;
      pids_[rank] = 0;
      const bool expected = deadly() && static_cast<int>(rank) == one_.victim && board_->atPoint.load() != 0;
      const bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0 && page(static_cast<int>(rank)).over.load() == 2;
      if (!expected && !good) say("rank " + std::to_string(rank) + " ended with status " + std::to_string(status));
      page(static_cast<int>(rank)).pid.store(0);
    }
  }
  return true;
}

bool World::allEnded() const {
  for (int rank = 0; rank < one_.layout.ranks(); ++rank) {
    if (left(rank) && page(rank).endedNs.load() == 0) return false;
  }
  return true;
}

void World::cable(const char* words) const {
  const std::string node = one_.place.cluster + std::to_string(nodeOf(one_.victim));
  const std::string command = "ip netns exec " + node + " " + words;
  if (std::system(command.c_str()) != 0) throw std::runtime_error("failed: " + command);
}

// What the world does when the victim has come to its point.
void World::fault() {
  const std::string lane = "lane" + std::to_string(one_.place.lane);
  switch (one_.fault) {
    case Fault::stop:
      ::usleep(kStoppedMs * 1000);
      ::kill(pids_[static_cast<std::size_t>(one_.victim)], SIGCONT);
      return;
    case Fault::reset: {
      std::vector<pid_t> whose{pids_[static_cast<std::size_t>(one_.victim)]};
      // While they meet, the first to come has the connection of its machine.
      if (one_.phase == "bootstrap") {
        whose.clear();
        for (int rank = 0; rank < one_.layout.ranks(); ++rank) {
          if (nodeOf(rank) == nodeOf(one_.victim) && left(rank)) whose.push_back(pids_[static_cast<std::size_t>(rank)]);
        }
      }
      std::vector<Ports> ports;
      // Whoever has left takes its connections along.
      const Deadline patience = Deadline::afterMs(one_.maySucceed ? 500 : kPatienceMs);
      await("connections to reset", [&] { return !(ports = portsOf(whose)).empty() || patience.passed(); });
      board_->faultNs.store(nowNs());
      const std::string wrong = ports.empty() ? "" : resetPorts(ports);
      if (!wrong.empty()) say(wrong);
      board_->go.store(1);
      return;
    }
    case Fault::cut:
      cable(("ip link set " + lane + " down").c_str());
      board_->faultNs.store(nowNs());
      board_->go.store(1);
      return;
    case Fault::slow:
      cable(("tc qdisc replace dev " + lane + " root tbf rate 1500kbit burst 16kb latency 200ms").c_str());
      board_->faultNs.store(nowNs());
      board_->go.store(1);
      return;
    default:
      return;
  }
}

Outcome World::run() {
  for (int rank = 0; rank < one_.layout.ranks(); ++rank) start(rank);
  const auto allOver = [&](int state) {
    for (int rank = 0; rank < one_.layout.ranks(); ++rank) {
      if (left(rank) && page(rank).over.load() < state) return false;
    }
    return true;
  };
  if (await("the victim at its point", [&] { return board_->atPoint.load() != 0 || allOver(1); })) {
    if (board_->atPoint.load() == 0) say("the victim never came to its point");
    for (const pid_t pid : pids_) waitedBefore_.push_back(pid > 0 ? waitedForCore(pid) : 0);
    noticedNs_ = nowNs();
    fault();
  }
  if (board_->faultNs.load() > noticedNs_) noticedNs_ = board_->faultNs.load();
  if (deadly()) await("the victim's end", [&] { return !left(one_.victim); });
  await("the ranks' answers", [&] { return allEnded(); });
  if (one_.fault == Fault::cut) cable(("ip link set lane" + std::to_string(one_.place.lane) + " up").c_str());
  judge();
  await("the ranks' leavings", [&] { return allOver(1); });
  board_->recover.store(1);
  await("a second communicator", [&] { return allOver(2); });
  for (int rank = 0; rank < one_.layout.ranks(); ++rank) {
    RankPage& one = page(rank);
    if (deadly() && rank == one_.victim) continue;
    if (one.over.load() < 2) {
      reap(rank, "hangs");
    } else {
      while (pids_[static_cast<std::size_t>(rank)] > 0 &&
             ::waitpid(pids_[static_cast<std::size_t>(rank)], nullptr, 0) < 0 && errno == EINTR) {
      }
      pids_[static_cast<std::size_t>(rank)] = 0;
    }
    if (const std::string text = one.complaint.get(); !text.empty()) say("rank " + std::to_string(rank) + ": " + text);
    // The victim's own five seconds do not count.
    const std::int64_t stopped = one_.fault == Fault::stop && rank == one_.victim ? kStoppedMs : 0;
    outcome_.slowestDestroyMs = std::max(outcome_.slowestDestroyMs, msOf(one.destroyNs.load()) - stopped);
  }
  // What they had to wait for a core is not the library's: the deadlines are promises on machines that keep up.
  const std::int64_t allowed = kDestroyLimitMs * 11 / 10 + outcome_.waitedForCoreMs;
  if (outcome_.slowestDestroyMs > allowed) say("destroy took " + std::to_string(outcome_.slowestDestroyMs) + " ms");
  std::string said(static_cast<std::size_t>(::lseek(said_.get(), 0, SEEK_END)), 0);
  if (::pread(said_.get(), said.data(), said.size(), 0) != static_cast<ssize_t>(said.size())) said.clear();
  outcome_.said = said;
  if (said.find("Sanitizer") != std::string::npos) say("a sanitizer's report: " + said);
  return outcome_;
}

void World::judge() {
  // Also what the world itself saw late is the machine's.
  const std::int64_t late =
      board_->faultNs.load() == 0 ? 0 : std::max<std::int64_t>(0, noticedNs_ - board_->faultNs.load());
  for (int rank = 0; rank < one_.layout.ranks(); ++rank) {
    if (!left(rank)) continue;
    const std::int64_t until = page(rank).waitedForCoreNs.load();
    if (until > 0)
      outcome_.waitedForCoreMs +=
          msOf(std::max<std::int64_t>(0, until - waitedBefore_[static_cast<std::size_t>(rank)]));
  }
  outcome_.waitedForCoreMs += msOf(late);
  for (int rank = 0; rank < one_.layout.ranks(); ++rank) {
    if (left(rank) && page(rank).endedNs.load() != 0) judge(rank);
  }
}

std::string World::nameOf(int rank) const { return "rank " + std::to_string(rank) + " ("; }

void World::judge(int rank) {
  RankPage& one = page(rank);
  const std::string text = one.text.get();
  const auto complain = [&](const std::string& what) {
    say("rank " + std::to_string(rank) + " " + what +
        (text.empty() ? "" : ": code " + std::to_string(one.code.load()) + ", " + text));
  };
  if (one.failed.load() == 0) {
    if (one_.limitMs > 0 && !one_.maySucceed) complain("was told nothing of it");
    return;
  }
  if (one_.limitMs == 0) return complain("failed");
  if (outcome_.firstText.empty() && rank != one_.victim) outcome_.firstText = text;
  // The phase of destroy begins when all have done their work: a rank that is told then was not in need of anybody.
  const std::int64_t took = msOf(one.endedNs.load() - board_->faultNs.load());
  outcome_.slowestMs = std::max(outcome_.slowestMs, took);
  if (took > one_.limitMs * 11 / 10 + outcome_.waitedForCoreMs) {
    complain("answered after " + std::to_string(took) + " ms, of which its machine's ranks waited " +
             std::to_string(outcome_.waitedForCoreMs) + " ms for a core");
  }
  // Who is short of something says so itself, the others that somebody is gone.
  const bool isShort = rank == one_.victim && (one_.fault == Fault::descriptors || one_.fault == Fault::memory);
  const int code = isShort ? fuscoSystemError : fuscoRemoteError;
  if (one.code.load() != code) complain("gave another code");
  if (isShort) {
    const char* remedy = one_.fault == Fault::descriptors ? "ulimit -n" : "RLIMIT_FSIZE";
    if (text.find(remedy) == std::string::npos) complain("does not say what to do");
    return;
  }
  // Whom it names: the victim; of a cut or a reset anyone at the other end.
  const bool duringInit = one_.phase == "bootstrap" || one_.phase == "connect";
  bool named = false;
  // Ranks that give up because another one has are named as well, where they were the first to be missed.
  const bool shortAtInit = (one_.fault == Fault::descriptors || one_.fault == Fault::memory) && duringInit;
  if (one_.fault == Fault::cut || one_.fault == Fault::reset || shortAtInit) {
    for (int other = 0; other < one_.layout.ranks(); ++other) {
      named = named || text.find(nameOf(other)) != std::string::npos;
    }
    // While they meet there is only the other machine's address, or that of the process that others meet through.
    named = named || (one_.phase == "bootstrap" && text.find("meeting place") != std::string::npos);
    named = named || (one_.phase == "bootstrap" && text.find("the process that ") != std::string::npos);
  } else {
    named = text.find(nameOf(one_.victim)) != std::string::npos;
    // Of a process that others meet through only that is known.
    named = named || (one_.phase == "bootstrap" && text.find("the process that ") != std::string::npos);
  }
  if (!named) complain("does not name who is gone");
  const auto says = [&](const char* word) { return text.find(word) != std::string::npos; };
  // A rank may be through with init before it is told.
  const bool inOperation = says("during ") || says("plan") || says("dispatch") || says("combine");
  const bool phased = duringInit ? says("init") || inOperation : inOperation;
  if (!phased) complain("does not say in which phase");
  if (!says("; ") && !says("raise ")) complain("does not say what to do");
}

}  // namespace

std::string FaultCase::describe() const {
  static constexpr const char* kNames[] = {"SIGKILL", "SIGSTOP",     "exit",          "reset", "cut",
                                           "slow",    "descriptors", "shared memory", "fork"};
  std::string text = std::string(kNames[static_cast<int>(fault)]) + " of rank " + std::to_string(victim) + " in " +
                     phase + " (" + point + " " + std::to_string(number) + "), " + layout.name + ", seed " +
                     std::to_string(seed);
  if (fault == Fault::descriptors) text += ", room for " + std::to_string(room);
  return text;
}

Outcome runCase(const FaultCase& one) {
  try {
    return World(one).run();
  } catch (const std::exception& error) {
    Outcome outcome;
    outcome.complaints.push_back(error.what());
    return outcome;
  }
}

void runCases(const std::string& name, const std::vector<FaultCase>& cases, int ranksAtOnce,
              const std::function<void(const FaultCase&, const Outcome&)>& look) {
  std::mutex mutex;
  std::condition_variable changed;
  int running = 0;
  std::int64_t slowest = 0, destroy = 0, waited = 0;
  std::vector<std::thread> threads;
  const std::int64_t begin = nowNs();
  for (const FaultCase& one : cases) {
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return running == 0 || running + one.layout.ranks() <= ranksAtOnce; });
      running += one.layout.ranks();
    }
    threads.emplace_back([&] {
      const Outcome outcome = runCase(one);
      std::lock_guard lock(mutex);
      running -= one.layout.ranks();
      changed.notify_all();
      std::string all;
      for (const std::string& complaint : outcome.complaints) all += "\n  " + complaint;
      if (!all.empty()) ADD_FAILURE() << one.describe() << ":" << all << "\n  said: " << outcome.said.substr(0, 4000);
      slowest = std::max(slowest, outcome.slowestMs);
      destroy = std::max(destroy, outcome.slowestDestroyMs);
      waited = std::max(waited, outcome.waitedForCoreMs);
      if (look) look(one, outcome);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%s: %zu cases in %.1f s; slowest answer %.2f s, slowest destroy %.2f s, longest wait for cores %.2f s\n",
              name.c_str(), cases.size(), static_cast<double>(nowNs() - begin) / 1e9,
              static_cast<double>(slowest) / 1e3, static_cast<double>(destroy) / 1e3,
              static_cast<double>(waited) / 1e3);
}

}  // namespace fusco::fault
