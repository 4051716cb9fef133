#include "shuffle/ranks.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "shuffle/case.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#endif

#if defined(__SANITIZE_THREAD__)
// A rank's process ends by _exit while its meeting place may still wait for latecomers. That threads end is tested
// where they are counted.
extern "C" __attribute__((visibility("default"), used)) const char* __tsan_default_options() {
  return "report_thread_leaks=0";
}
#endif

namespace fusco::test {

namespace {
constexpr int kMostRanks = 16;
constexpr int kIds = 16;
constexpr int kWords = 64;
constexpr std::size_t kTextBytes = 4096;

using Clock = std::chrono::steady_clock;
void nap() { std::this_thread::sleep_for(std::chrono::microseconds(100)); }
}  // namespace

// In memory that all processes of the test share.
struct SharedBoard {
  std::atomic<std::uint64_t> arrived[kMostRanks];
  std::atomic<int> ended[kMostRanks];
  std::atomic<int> idMade[kIds];
  fuscoUniqueId ids[kIds];
  std::atomic<std::uint64_t> words[kWords];
  std::atomic<pid_t> pids[kMostRanks];
  char texts[kMostRanks][kTextBytes];
};

fuscoConfig_t Rank::config() const {
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  if (!world_.nodes.empty()) config.nodeId = world_.nodeOf(rank_);
  config.sliceBytes = world_.sliceBytes;
  config.allowProcessVm = world_.processVm ? 1 : 0;
  config.initTimeoutMs = 30000;
  config.operationTimeoutMs = 30000;
  return config;
}

fuscoUniqueId Rank::id(int k) {
  if (rank_ == 0 && board_->idMade[k] == 0) {
    FUSCO_OK(fuscoGetUniqueId(&board_->ids[k]));
    board_->idMade[k] = 1;
  }
  while (board_->idMade[k] == 0) {
    require(board_->ended[0] == 0, "rank 0 is there to make id " + std::to_string(k));
    nap();
  }
  return board_->ids[k];
}

fuscoComm_t Rank::connect(int k) { return connect(k, config()); }

fuscoComm_t Rank::connect(int k, const fuscoConfig_t& config) {
  fuscoComm_t comm = nullptr;
  FUSCO_OK(fuscoCommInitRankConfig(&comm, world_.ranks, id(k), rank_, &config));
  return comm;
}

void Rank::barrier() {
  const std::uint64_t mine = ++board_->arrived[rank_];
  for (int r = 0; r < world_.ranks; ++r) {
    while (board_->arrived[r] < mine && board_->ended[r] == 0) nap();
  }
}

std::atomic<std::uint64_t>& Rank::word(int i) { return board_->words[i]; }
pid_t Rank::pidOf(int rank) const { return board_->pids[rank]; }

namespace {

void tell(SharedBoard* board, int rank, const std::string& text) {
  std::snprintf(board->texts[rank], kTextBytes, "%s", text.c_str());
  board->ended[rank] = 1;
}

void runOne(const World& world, int rank, SharedBoard* board, const std::function<void(Rank&)>& body) {
  board->pids[rank] = getpid();
  std::string text;
  try {
    Rank self(world, rank, board);
    body(self);
  } catch (const std::exception& e) {
    text = e.what();
    if (text.empty()) text = "an exception without text";
  }
  tell(board, rank, text);
}

[[noreturn]] void runProcess(const World& world, int first, int last, SharedBoard* board,
                             const std::function<void(Rank&)>& body) {
  if (last - first == 1) {
    runOne(world, first, board, body);
  } else {
    std::vector<std::thread> threads;
    for (int r = first; r < last; ++r) threads.emplace_back([&, r] { runOne(world, r, board, body); });
    for (std::thread& thread : threads) thread.join();
  }
  int status = 0;
#if defined(__SANITIZE_ADDRESS__)
  status = __lsan_do_recoverable_leak_check() != 0 ? 23 : 0;
#endif
  _exit(status);
}

}  // namespace

std::vector<std::string> runRanks(const World& world, const std::function<void(Rank&)>& body, int seconds) {
  if (world.ranks > kMostRanks) throw std::runtime_error("more ranks than the board has room for");
  void* memory = mmap(nullptr, sizeof(SharedBoard), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("mmap failed");
  auto* board = new (memory) SharedBoard{};
  struct Process {
    pid_t pid;
    int first, last;
    bool over;
  };
  std::vector<Process> processes;
  std::fflush(nullptr);
  for (int first = 0; first < world.ranks; first += world.threadsPerProcess) {
    const int last = std::min(world.ranks, first + world.threadsPerProcess);
    const pid_t pid = fork();
    if (pid < 0) throw std::runtime_error("fork failed");
    if (pid == 0) runProcess(world, first, last, board, body);
    processes.push_back({pid, first, last, false});
  }
  std::vector<std::string> ends(static_cast<std::size_t>(world.ranks));
  const auto deadline = Clock::now() + std::chrono::seconds(seconds);
  bool late = false;
  for (std::size_t open = processes.size(); open > 0;) {
    for (Process& process : processes) {
      int status = 0;
      if (process.over || waitpid(process.pid, &status, WNOHANG) != process.pid) continue;
      process.over = true;
      --open;
      std::string end;
      if (late && WIFSIGNALED(status)) {
        end = "did not end within " + std::to_string(seconds) + " s";
      } else if (WIFSIGNALED(status)) {
        end = "killed by signal " + std::to_string(WTERMSIG(status));
      } else if (WEXITSTATUS(status) != 0) {
        end = "ended with status " + std::to_string(WEXITSTATUS(status));
      }
      for (int r = process.first; r < process.last; ++r) {
        ends[static_cast<std::size_t>(r)] = end;
        if (!end.empty()) board->ended[r] = 1;
      }
    }
    if (open > 0 && Clock::now() > deadline && !late) {
      late = true;
      for (const Process& process : processes) {
        if (!process.over) kill(process.pid, SIGKILL);
      }
    }
    if (open > 0) nap();
  }
  std::vector<std::string> texts;
  for (int r = 0; r < world.ranks; ++r) {
    std::string text = board->texts[r];
    const std::string& end = ends[static_cast<std::size_t>(r)];
    if (!end.empty()) text += (text.empty() ? "" : "; then ") + end;
    texts.push_back(text);
  }
  munmap(memory, sizeof(SharedBoard));
  return texts;
}

void require(bool condition, const std::string& text) {
  if (!condition) throw std::runtime_error("not so: " + text);
}

std::string expectCode(fuscoResult_t got, fuscoResult_t code, const char* what) {
  const std::string text = fuscoGetLastError(nullptr);
  if (got != code) {
    throw std::runtime_error(std::string(what) + " gave " + std::to_string(got) + ", expected " + std::to_string(code) +
                             (got != fuscoSuccess ? ": " + text : ""));
  }
  if (code != fuscoSuccess && text.empty())
    throw std::runtime_error(std::string(what) + " gave an error without a text");
  return text;
}

void requireContains(const std::string& text, const std::string& part) {
  if (text.find(part) == std::string::npos) throw std::runtime_error("'" + text + "' does not say '" + part + "'");
}

}  // namespace fusco::test
