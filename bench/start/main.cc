// How long ranks need to start, and what they hold: so many processes join a communicator, shuffle once (checked row by
// row), and leave. In an emulated cluster (bench/cluster) each rank enters the network namespace of its node.
//
//   start_perf --nodes 2 --ranks-per-node 4
//   bench/cluster --nodes 8 --ranks-per-node 8 -- start_perf --nodes 8 --ranks-per-node 8
#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "flags.h"
#include "fusco/fusco.h"

namespace {

constexpr int kMostRanks = 4096, kMostRounds = 64;
constexpr int kTokens = 8, kWords = 16;

struct Options {
  int nodes = 1, ranksPerNode = 2, rounds = 3;
  int timeoutS = 120;
  int ranks() const { return nodes * ranksPerNode; }
};

struct Times {
  double initMs, shuffleMs, leaveMs;
};

struct RankPage {
  Times rounds[kMostRounds];
  int descriptors, threads;  // with the communicator, after the shuffle
  char error[512];           // empty: all is well
};

struct Page {
  fuscoUniqueId id;
  std::atomic<int> ready{0};    // the round whose id is there
  std::atomic<int> waiting{0};  // ranks that are about to join, of all rounds
  RankPage ranks[kMostRanks];
};

double msSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

int entriesOf(const char* path) {
  DIR* directory = opendir(path);
  int count = 0;
  while (directory != nullptr && readdir(directory) != nullptr) ++count;
  if (directory != nullptr) closedir(directory);
  return count - 2;
}

void ok(fuscoResult_t result) {
  if (result != fuscoSuccess) throw std::runtime_error(fuscoGetLastError(nullptr));
}

// Token t of rank r goes to expert (r + t) % E and to the one behind it; a row is its rank and token, over and over.
void shuffle(fuscoComm_t comm, int rank, int ranks) {
  const int experts = 2 * ranks;
  std::vector<std::int64_t> ids;
  std::vector<std::uint32_t> in(kTokens * kWords);
  for (int t = 0; t < kTokens; ++t) {
    ids.push_back((rank * 3 + t * 5) % experts);
    ids.push_back((rank * 3 + t * 5 + 1) % experts);
    for (int w = 0; w < kWords; ++w)
      in[static_cast<std::size_t>(t * kWords + w)] = static_cast<std::uint32_t>(rank << 8 | t);
  }
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  config.expertIds = ids.data();
  config.tokens = kTokens;
  config.topk = 2;
  config.experts = experts;
  fuscoPlan_t plan = nullptr;
  ok(fuscoPlanCreate(&plan, &config, comm, nullptr));
  std::vector<std::uint32_t> expected;
  for (int expert = 2 * rank; expert < 2 * rank + 2; ++expert) {
    for (int source = 0; source < ranks; ++source) {
      for (int t = 0; t < kTokens; ++t) {
        for (int slot = 0; slot < 2; ++slot) {
          if ((source * 3 + t * 5 + slot) % experts != expert) continue;
          expected.insert(expected.end(), kWords, static_cast<std::uint32_t>(source << 8 | t));
        }
      }
    }
  }
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  ok(fuscoPlanGetInfo(plan, &info));
  std::vector<std::uint32_t> out(static_cast<std::size_t>(info.receiveRows) * kWords);
  ok(fuscoDispatch(plan, in.data(), out.data(), kWords * 4, nullptr));
  if (out != expected) throw std::runtime_error("rows are wrong");
  std::vector<float> rows(out.size(), 0.5f), sums(kTokens * kWords);
  ok(fuscoCombine(plan, rows.data(), sums.data(), kWords, fuscoFloat32, nullptr));
  if (std::any_of(sums.begin(), sums.end(), [](float sum) { return sum != 1.0f; }))
    throw std::runtime_error("sums are wrong");
  ok(fuscoPlanDestroy(plan));
}

void enterNode(int node) {
  const char* prefix = std::getenv("CLUSTER_NETNS");
  if (prefix == nullptr) {
    // Hosts that are made up; between them TCP over loopback.
    setenv("FUSCO_HOSTID", fmt::format("start{}", node).c_str(), 1);
    setenv("FUSCO_SOCKET_IFNAME", "lo", 0);
    return;
  }
  const int space = open(fmt::format("/run/netns/{}{}", prefix, node).c_str(), O_RDONLY | O_CLOEXEC);
  if (space < 0 || setns(space, CLONE_NEWNET) != 0) throw std::runtime_error("cannot enter the namespace of a node");
  close(space);
}

void runRank(const Options& options, Page& page, int rank) {
  RankPage& mine = page.ranks[rank];
  enterNode(rank / options.ranksPerNode);
  setenv("FUSCO_DEVICE", "host", 0);
  for (int round = 1; round <= options.rounds; ++round) {
    if (rank == 0) {
      // All are there before the clock starts: how long processes take to start is not what is asked.
      ok(fuscoGetUniqueId(&page.id));
      while (page.waiting.load() < round * (options.ranks() - 1))
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      page.ready.store(round);
    } else {
      ++page.waiting;
      while (page.ready.load() < round) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    Times& times = mine.rounds[round - 1];
    auto begin = std::chrono::steady_clock::now();
    fuscoComm_t comm = nullptr;
    ok(fuscoCommInitRank(&comm, options.ranks(), page.id, rank));
    times.initMs = msSince(begin);
    begin = std::chrono::steady_clock::now();
    shuffle(comm, rank, options.ranks());
    times.shuffleMs = msSince(begin);
    mine.descriptors = entriesOf("/proc/self/fd");
    mine.threads = entriesOf("/proc/self/task");
    ok(fuscoCommFinalize(comm));
    begin = std::chrono::steady_clock::now();
    ok(fuscoCommDestroy(comm));
    times.leaveMs = msSince(begin);
  }
}

int run(const Options& options) {
  void* at = mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::runtime_error("no memory");
  Page& page = *new (at) Page;
  std::vector<pid_t> pids;
  for (int rank = 0; rank < options.ranks(); ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      alarm(static_cast<unsigned>(options.timeoutS));
      try {
        runRank(options, page, rank);
      } catch (const std::exception& error) {
        std::snprintf(page.ranks[rank].error, sizeof(page.ranks[rank].error), "%s", error.what());
      }
      _exit(page.ranks[rank].error[0] == 0 ? 0 : 1);
    }
    pids.push_back(pid);
  }
  bool failed = false;
  for (std::size_t rank = 0; rank < pids.size(); ++rank) {
    int status = 0;
    waitpid(pids[rank], &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
    failed = true;
    fmt::print(stderr, "rank {}: {}\n", rank,
               page.ranks[rank].error[0] != 0 ? page.ranks[rank].error : fmt::format("ended with status {}", status));
  }
  if (failed) return 1;
  // In each round the slowest rank counts.
  const auto median = [&](double Times::*member) {
    std::vector<double> slowest(static_cast<std::size_t>(options.rounds));
    for (std::size_t round = 0; round < slowest.size(); ++round) {
      for (int rank = 0; rank < options.ranks(); ++rank)
        slowest[round] = std::max(slowest[round], page.ranks[rank].rounds[round].*member);
    }
    std::sort(slowest.begin(), slowest.end());
    return slowest[slowest.size() / 2];
  };
  int least = page.ranks[0].descriptors, most = least, threads = 0;
  for (int rank = 0; rank < options.ranks(); ++rank) {
    least = std::min(least, page.ranks[rank].descriptors);
    most = std::max(most, page.ranks[rank].descriptors);
    threads = std::max(threads, page.ranks[rank].threads);
  }
  fmt::print("| {} | {} x {} | {:.1f} | {:.1f} | {:.1f} | {} to {} | {} |\n", options.ranks(), options.nodes,
             options.ranksPerNode, median(&Times::initMs), median(&Times::shuffleMs), median(&Times::leaveMs), least,
             most, threads);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  bool header = false;
  fusco::bench::Flags flags(
      "start_perf",
      "Starts ranks as processes, shuffles once, exactly, and stops; the slowest rank's times, median of the rounds; "
      "descriptors and threads of a rank");
  flags.add("--nodes", options.nodes, "nodes; without an emulated cluster, hosts that are made up, over loopback");
  flags.add("--ranks-per-node", options.ranksPerNode);
  flags.add("--rounds", options.rounds, "communicators one after the other").within(1, kMostRounds);
  flags.add("--timeout", options.timeoutS, "seconds");
  flags.add("--header", header, "with the table's head");
  int exitCode = 0;
  if (!flags.parse({arguments, arguments + count}, &exitCode)) return exitCode;
  if (options.nodes < 1 || options.ranksPerNode < 1 || options.ranks() > kMostRanks) {
    fmt::print(stderr, "1 to {} ranks\n", kMostRanks);
    return 2;
  }
  if (header) {
    fmt::print(
        "| ranks | nodes x ranks | init (ms) | first shuffle (ms) | destroy (ms) | descriptors of a rank | its threads "
        "|\n"
        "|---|---|---|---|---|---|---|\n");
  }
  try {
    return run(options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "start_perf: {}\n", error.what());
    return 1;
  }
}
