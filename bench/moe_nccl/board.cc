#include "moe_nccl/board.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>

namespace fusco::bench::moe {

Board::Board(const Options& options) : options_(options) {
  const std::size_t states = options.states.size(), ranks = static_cast<std::size_t>(options.ranks);
  const std::size_t samples =
      states * ranks * static_cast<std::size_t>(options.rounds) * static_cast<std::size_t>(options.iterations);
  const std::size_t wrongAt = (sizeof(Head) + 63) / 64 * 64, samplesAt = wrongAt + (states * ranks + 8) * 8;
  bytes_ = samplesAt + samples * sizeof(Sample);
  void* const memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + std::strerror(errno));
  auto* const base = static_cast<std::byte*>(memory);
  head_ = new (base) Head{};
  wrong_ = reinterpret_cast<std::atomic<std::uint64_t>*>(base + wrongAt);
  samples_ = reinterpret_cast<Sample*>(base + samplesAt);
  pthread_barrierattr_t attributes;
  pthread_barrierattr_init(&attributes);
  pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&head_->barrier, &attributes, static_cast<unsigned>(options.ranks));
  pthread_barrierattr_destroy(&attributes);
}

Board::~Board() { munmap(head_, bytes_); }

void Board::meet() { pthread_barrier_wait(&head_->barrier); }

ncclUniqueId Board::id(int rank) {
  if (rank == 0) OK(ncclGetUniqueId(&head_->id));
  meet();
  return head_->id;
}

Sample& Board::sample(int rank, std::size_t state, int round, int iteration) {
  const auto at =
      (static_cast<std::size_t>(rank) * options_.states.size() + state) * static_cast<std::size_t>(options_.rounds) +
      static_cast<std::size_t>(round);
  return samples_[at * static_cast<std::size_t>(options_.iterations) + static_cast<std::size_t>(iteration)];
}

std::atomic<std::uint64_t>& Board::wrong(int rank, std::size_t state) {
  return wrong_[static_cast<std::size_t>(rank) * options_.states.size() + state];
}

bool Board::run(const std::function<void(int rank)>& body) {
  std::fflush(nullptr);
  const pid_t parent = getpid();
  std::vector<pid_t> children;
  bool well = true;
  for (int rank = 0; well && rank < options_.ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(1);
      int status = 0;
      try {
        body(rank);
      } catch (const std::exception& error) {
        fmt::print(stderr, "moe_nccl: rank {}: {}\n", rank, error.what());
        status = 1;
      }
      std::exit(status);
    }
    well = child > 0;
    if (well) children.push_back(child);
  }
  const std::time_t end = std::time(nullptr) + options_.timeoutSeconds;
  while (well && !children.empty()) {
    int status = 0;
    const pid_t ended = waitpid(-1, &status, WNOHANG);
    if (ended > 0) {
      std::erase(children, ended);
      well = status == 0;
    } else if (std::time(nullptr) > end) {
      fmt::print(stderr, "moe_nccl: {} ranks had not ended after {} s (--timeout)\n", children.size(),
                 options_.timeoutSeconds);
      well = false;
    } else {
      usleep(2000);
    }
  }
  if (!children.empty()) usleep(300000);  // they may have something to say
  for (const pid_t child : children) kill(child, SIGKILL);
  for (const pid_t child : children) waitpid(child, nullptr, 0);
  return well;
}

}  // namespace fusco::bench::moe
