#include "nccl/program.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace fusco::test {

void ok(ncclResult_t result, const std::string& what) {
  if (result != ncclSuccess)
    throw std::runtime_error(what + ": " + std::to_string(static_cast<int>(result)) + " " + ncclGetLastError(nullptr));
}

void* findExtra(const char* name) {
  void* const found = dlsym(RTLD_DEFAULT, name);
  require(found != nullptr, std::string(name) + " is not there: is libfusco loaded?");
  return found;
}

ncclUniqueId Rank::id(int k) const {
  if (rank == 0 && board->made[k] == 0) {
    OK(ncclGetUniqueId(&board->ids[k]));
    board->made[k] = 1;
  }
  while (board->made[k] == 0) usleep(100);
  return board->ids[k];
}

ncclComm_t Rank::connect(int k) const {
  ncclComm_t comm = nullptr;
  OK(ncclCommInitRank(&comm, ranks, id(k), rank));
  return comm;
}

int runRanks(int ranks, const std::function<void(const Rank&)>& body, int seconds) {
  void* const memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return ranks;
  auto* const board = new (memory) Board{};
  std::vector<pid_t> children;
  for (int r = 0; r < ranks; ++r) {
    const pid_t child = fork();
    if (child == 0) {
      int status = 0;
      try {
        body(Rank{r, ranks, board});
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", r, error.what());
        status = 1;
      }
      std::exit(status);
    }
    if (child < 0) break;
    children.push_back(child);
  }
  int failed = ranks - static_cast<int>(children.size());
  const std::time_t end = std::time(nullptr) + seconds;
  for (std::size_t left = children.size(); left > 0;) {
    int status = 0;
    const pid_t ended = waitpid(-1, &status, WNOHANG);
    if (ended > 0) {
      failed += status != 0 ? 1 : 0;
      std::erase(children, ended);
      --left;
    } else if (std::time(nullptr) > end) {
      std::fprintf(stderr, "%zu ranks did not end within %d s\n", left, seconds);
      for (const pid_t child : children) kill(child, SIGKILL);
      for (const pid_t child : children) waitpid(child, &status, 0);
      failed += static_cast<int>(left);
      break;
    } else {
      usleep(500);
    }
  }
  munmap(memory, sizeof(Board));
  return failed;
}

}  // namespace fusco::test

using namespace fusco::test;

// program SCENARIO RANKS [SEED [GROUPS [THREADS]]]: the exit status is the number of ranks that failed.
int main(int count, char** arguments) {
  if (count < 3) return 100;
  const std::string scenario = arguments[1];
  const int ranks = std::atoi(arguments[2]);
  const auto number = [&](int i, long otherwise) { return count > i ? std::atol(arguments[i]) : otherwise; };
  const auto seed = static_cast<std::uint64_t>(number(3, 1));
  const auto groups = static_cast<int>(number(4, 100)), threads = static_cast<int>(number(5, 1));
  if (scenario == "random")
    return runRanks(
        ranks, [&](const Rank& self) { randomGroups(self, seed, groups, threads); }, 100);
  if (scenario == "collectives") return runRanks(ranks, collectives);
  if (scenario == "operations") return runRanks(ranks, operations);
  if (scenario == "one-thread") return runRanks(1, [&](const Rank&) { oneThreadForAll(ranks); });
  if (scenario == "communicators") return runRanks(ranks, communicators);
  if (scenario == "misuse") return runRanks(ranks, misuse);
  if (scenario == "abort") return runRanks(ranks, abortWhileWaiting);
  if (scenario == "one-missing") return runRanks(ranks, oneMissing);
  if (scenario == "passed-on") return runRanks(ranks, passedOn);
  if (scenario == "answers") {
    answers();
    return 0;
  }
  return 101;
}
