#include "shuffle/harness.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "shuffle/routing.h"

namespace fusco::bench {
namespace {

constexpr int kPollMs = 50;
constexpr int kGraceMs = 3000;  // between the first failure and the end of the others
constexpr int kPeerStartSeconds = 60;

std::string howItEnded(int status) {
  if (WIFSIGNALED(status))
    return fmt::format("was ended by signal {} ({})", WTERMSIG(status), strsignal(WTERMSIG(status)));
  return fmt::format("left with exit code {}", WEXITSTATUS(status));
}

// The n-th of parts that / divides; the last one for all that follow.
std::string partOf(const std::string& text, int n) {
  std::size_t begin = 0, end = text.find('/');
  for (; n > 0 && end != std::string::npos; --n) {
    begin = end + 1;
    end = text.find('/', begin);
  }
  return text.substr(begin, end == std::string::npos ? end : end - begin);
}

const char* groupName(int group) { return group == kOwnGroup ? "rank" : "MPI peer rank"; }

}  // namespace

Harness::Harness(Session session, const Options& options) : session_(std::move(session)), options_(options) {}

Harness::~Harness() {
  for (int group = kGroups - 1; group >= 0; --group) end(group);
  if (peerLog_ >= 0) close(peerLog_);
}

// In the child, before any thread: the rank's place in an emulated cluster.
static void enterNode(const Options& options, int rank) {
  const int node = nodeOfRank(rank, options.ranks, options.nodes);
  if (options.net != "auto") setenv("FUSCO_NET", options.net.c_str(), 1);
  if (!options.hca.empty()) setenv("FUSCO_IB_HCA", partOf(options.hca, node).c_str(), 1);
  if (options.netns.empty()) return;
  const std::string name = fmt::format("{}{}", options.netns, node);
  const int space = open(("/run/netns/" + name).c_str(), O_RDONLY | O_CLOEXEC);
  if (space < 0 || setns(space, CLONE_NEWNET) != 0) {
    fmt::print(stderr, "shuffle_perf: rank {} cannot enter the network namespace {}: {}\n", rank, name,
               std::strerror(errno));
    _exit(1);
  }
  close(space);
  setenv("FUSCO_HOSTID", name.c_str(), 1);
}

void Harness::startRanks(const RankMain& rankMain, RankKind kind) {
  pid_t parent = getpid();
  std::fflush(nullptr);
  running_[kOwnGroup] = true;
  for (int rank = 0; rank < options_.ranks; ++rank) {
    if (kind == RankKind::threads) {
      if (!options_.netns.empty()) throw GroupFailure(kOwnGroup, "--netns wants ranks that are processes");
      if (options_.net != "auto") setenv("FUSCO_NET", options_.net.c_str(), 1);
      threads_.emplace_back([this, rankMain, rank] { rankMain(session_, rank); });
      continue;
    }
    pid_t pid = fork();
    if (pid < 0) throw GroupFailure(kOwnGroup, fmt::format("cannot start rank {}: {}", rank, std::strerror(errno)));
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(1);
      enterNode(options_, rank);
      int code = rankMain(session_, rank);
      std::fflush(nullptr);
      _exit(code);
    }
    children_.push_back({pid, kOwnGroup, fmt::format("rank {} (process {})", rank, pid)});
  }
  awaitJoined(kOwnGroup, options_.timeoutSeconds);
}

void Harness::startLaunched(const RankMain& rankMain) {
  running_[kOwnGroup] = true;
  threads_.emplace_back([this, rankMain] { rankMain(session_, 0); });
  awaitJoined(kOwnGroup, options_.timeoutSeconds);
}

std::string Harness::startPeers(const std::string& program) {
  if (!options_.netns.empty()) return "ranks in network namespaces are not started by mpirun here";
  std::string mpirun = findOnPath("mpirun");
  if (mpirun.empty()) return "no mpirun on PATH (Debian and Ubuntu: apt-get install openmpi-bin libopenmpi-dev)";
  if (access(program.c_str(), X_OK) != 0)
    return fmt::format("{} is not there (it is built where libopenmpi-dev is installed)", program);

  std::vector<std::string> words{mpirun, "-np", std::to_string(options_.ranks), "--oversubscribe"};
  if (geteuid() == 0) words.push_back("--allow-run-as-root");
  for (const char* word : {"--mca", "mpi_yield_when_idle", "1"}) words.push_back(word);
  if (options_.net == "tcp") {
    for (const char* word : {"--mca", "btl", "tcp,self", "--mca", "pml", "ob1"}) words.push_back(word);
  }
  words.push_back(program);
  words.push_back(session_.path());
  peerCommand_ = "mpirun";
  for (std::size_t i = 1; i < words.size(); ++i) peerCommand_ += " " + words[i];

  peerLog_ = memfd_create("peer-log", MFD_CLOEXEC);
  int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  pid_t parent = getpid();
  std::fflush(nullptr);
  pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);
    dup2(nothing, 0);
    dup2(peerLog_, 1);
    dup2(peerLog_, 2);
    execv(mpirun.c_str(), arguments.data());
    _exit(127);
  }
  close(nothing);
  if (pid < 0) return fmt::format("cannot start mpirun: {}", std::strerror(errno));
  children_.push_back({pid, kPeerGroup, fmt::format("mpirun (process {})", pid)});
  running_[kPeerGroup] = true;
  try {
    awaitJoined(kPeerGroup, kPeerStartSeconds);
  } catch (const GroupFailure& failure) {
    std::string reason = failure.what();
    end(kPeerGroup);
    return reason;
  }
  return "";
}

void Harness::awaitJoined(int group, int seconds) {
  for (std::int64_t until = nowNs() + seconds * 1000000000LL;;) {
    std::uint32_t joined = session_.group(group).joined.load();
    if (joined == session_.header().ranks) return;
    std::string death = someoneDied(group);
    if (!death.empty()) throw GroupFailure(group, death + " before all had come");
    if (nowNs() > until)
      throw GroupFailure(group, fmt::format("only {} of {} {}s have come within {} s", joined, session_.header().ranks,
                                            groupName(group), seconds));
    usleep(2000);
  }
}

std::string Harness::someoneDied(int group) {
  std::string first;
  for (auto child = children_.begin(); child != children_.end();) {
    int status = 0;
    if (child->group != group || waitpid(child->pid, &status, WNOHANG) != child->pid) {
      ++child;
      continue;
    }
    if (first.empty()) first = fmt::format("{} {}", child->who, howItEnded(status));
    child = children_.erase(child);
  }
  if (!first.empty() && group == kPeerGroup) first += peerLog();
  return first;
}

std::string Harness::peerLog() {
  char text[2048];
  off_t size = lseek(peerLog_, 0, SEEK_END);
  ssize_t got = pread(peerLog_, text, sizeof text,
                      size > static_cast<off_t>(sizeof text) ? size - static_cast<off_t>(sizeof text) : 0);
  if (got <= 0) return "";
  return "; its last words: " + std::string(text, static_cast<std::size_t>(got));
}

void Harness::order(int group, Step step, std::uint32_t caseIndex, const std::string& impl, int warmup,
                    int iterations) {
  session_.command(group, step, caseIndex, impl, warmup, iterations);
  auto doing = [&] { return fmt::format("while {} {}", nameOf(step), impl); };
  auto failure = [&]() -> std::string {
    std::string all;
    for (std::uint32_t r = 0; r < session_.header().ranks; ++r) {
      RankState& state = session_.group(group).ranks[r];
      if (state.failed != 0)
        all += fmt::format("{}{} {}: {}", all.empty() ? "" : "\n", groupName(group), r, state.text);
    }
    return all;
  };
  for (std::int64_t until = nowNs() + options_.timeoutSeconds * 1000000000LL, grace = 0;;) {
    bool done = session_.waitDone(group, kPollMs);
    std::string failed = failure();
    if (done && failed.empty()) return;
    if (done) throw GroupFailure(group, failed);
    std::string death = someoneDied(group);
    if (!death.empty()) throw GroupFailure(group, fmt::format("{} {}", death, doing()));
    if (!failed.empty()) {
      // The others wait for the one that failed; give them a moment to say so themselves.
      if (grace == 0) grace = nowNs() + kGraceMs * 1000000LL;
      if (nowNs() > grace) throw GroupFailure(group, fmt::format("{} ({}; the others still waited)", failed, doing()));
    }
    if (nowNs() > until)
      throw GroupFailure(
          group, fmt::format("{} of {} {}s were done {} after {} s (--timeout)", session_.group(group).done.load(),
                             session_.header().ranks, groupName(group), doing(), options_.timeoutSeconds));
  }
}

std::uint64_t Harness::wrong(int group) {
  std::uint64_t sum = 0;
  for (std::uint32_t r = 0; r < session_.header().ranks; ++r) sum += session_.group(group).ranks[r].wrong;
  return sum;
}

void Harness::end(int group) {
  if (!running_[group]) return;
  running_[group] = false;
  bool idle = session_.group(group).sequence.load() == 0 || session_.waitDone(group, 0);
  if (idle) session_.command(group, Step::quit, 0, "", 0, 0);
  // Ranks that hang in a call are not asked again.
  int patience = idle ? kGraceMs * 2 : 0;
  if (group == kOwnGroup && !threads_.empty()) {
    bool left = idle && session_.waitDone(group, patience);
    if (!left) {
      // Threads cannot be ended from outside: the program leaves with them.
      session_.abandon();
      std::fflush(nullptr);
      _exit(1);
    }
    endThreads();
  }
  for (std::int64_t until = nowNs() + patience * 1000000LL; nowNs() < until;) {
    if (std::none_of(children_.begin(), children_.end(), [&](const Child& c) { return c.group == group; })) return;
    someoneDied(group);
    usleep(2000);
  }
  for (int signal : {SIGTERM, SIGKILL}) {
    for (const Child& child : children_)
      if (child.group == group) kill(child.pid, signal);
    for (std::int64_t until = nowNs() + kGraceMs * 1000000LL; nowNs() < until;) {
      someoneDied(group);
      if (std::none_of(children_.begin(), children_.end(), [&](const Child& c) { return c.group == group; })) return;
      usleep(2000);
    }
  }
}

void Harness::endThreads() {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

std::string findOnPath(const std::string& name) {
  const char* path = std::getenv("PATH");
  for (const std::string& folder : splitList(path != nullptr ? path : "", ':')) {
    std::string file = folder + "/" + name;
    if (access(file.c_str(), X_OK) == 0) return file;
  }
  return "";
}

std::string programFolder() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
}

}  // namespace fusco::bench
