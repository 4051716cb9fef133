// FUSCO_STATS=1: one line for each communicator at exit. A fall-back that nobody sees looks like success.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <deque>

#include "plugin/nccl/communicators.h"
#include "plugin/nccl/real.h"
#include "plugin/nccl/report.h"

namespace fusco::nccl {

namespace {

constexpr std::size_t kMostLines = 1024;

struct Lines {
  std::mutex mutex;
  std::deque<std::string> ended;
  std::uint64_t more = 0;
  std::map<std::uint64_t, const Communicator*> alive;
};
Lines& lines() {
  static auto& all = *new Lines;
  // A child prints at its end too.
  holdAtForks<[]() -> std::mutex& { return all.mutex; }>();
  return all;
}

std::string lineOf(const Communicator& c) {
  if (c.state == State::starting) return "communicator " + std::to_string(c.generation) + " was never ready";
  std::string text = "communicator " + std::to_string(c.generation) + ", rank " + std::to_string(c.rank) + " of " +
                     std::to_string(c.ranks) + ": carried " + std::to_string(c.carriedCalls) + " calls, " +
                     std::to_string(c.carriedBytes) + " bytes sent; passed on " + std::to_string(c.passedCalls) +
                     " calls";
  if (c.collectives > 0) text += "; " + std::to_string(c.collectives) + " collectives of host mode";
  if (!c.carried) text += "; not carried: " + c.reason;
  return text;
}

void print() {
  std::lock_guard lock(lines().mutex);
  std::string all;
  const std::string front = "fusco: " + std::to_string(getpid()) + " stats: ";
  for (const std::string& line : lines().ended) all += front + line + "\n";
  if (lines().more > 0) all += front + std::to_string(lines().more) + " more communicators\n";
  for (const auto& [generation, communicator] : lines().alive) all += front + lineOf(*communicator) + "\n";
  if (all.empty()) all = front + "no communicator was made through libfusco\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, all.data(), all.size());
}

std::atomic<bool> prepared{false};

bool wanted() {
  static const bool value = [] {
    if (mode() == Mode::off || setting("FUSCO_STATS") != "1") return false;
    std::atexit(&print);
    prepared = true;
    return true;
  }();
  return value;
}

// Nothing at load; and at the end only this, where torch is and has not called: a torch whose NCCL is linked in, and is
// not seen from outside, looks the same as one that works.
__attribute__((destructor)) void tellThatNobodyCalled() {
  if (prepared) return;
  void* const torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr || setting("FUSCO_STATS") != "1") return;
  const std::string text = "fusco: " + std::to_string(getpid()) +
                           " stats: libtorch_cuda.so is loaded and has made no communicator through libfusco: its NCCL "
                           "may be linked in, which nothing can be put in front of\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
}

}  // namespace

void beginStatistics(const Communicator& communicator) {
  if (!wanted()) return;
  std::lock_guard lock(lines().mutex);
  lines().alive[communicator.generation] = &communicator;
}

void endStatistics(const Communicator& communicator) {
  if (!wanted()) return;
  std::lock_guard lock(lines().mutex);
  if (lines().alive.erase(communicator.generation) == 0) return;
  if (lines().ended.size() < kMostLines) {
    lines().ended.push_back(lineOf(communicator));
  } else {
    ++lines().more;
  }
}

}  // namespace fusco::nccl
