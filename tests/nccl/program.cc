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

bool hasCollectives() {
  static const bool has = std::getenv("FUSCO_TEST_NO_COLLECTIVES") == nullptr;
  return has;
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
