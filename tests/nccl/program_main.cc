#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "nccl/loop.h"

using namespace fusco::test;

namespace {

class HostMemory : public LoopMemory {
 public:
  void use(int) override {}
  std::uint8_t* allocate(std::size_t bytes) override { return new std::uint8_t[bytes]; }
  void release(void* memory) override { delete[] static_cast<std::uint8_t*>(memory); }
  void write(std::uint8_t* to, const std::vector<std::uint8_t>& bytes) override {
    if (!bytes.empty()) std::memcpy(to, bytes.data(), bytes.size());
  }
  std::vector<std::uint8_t> read(const std::uint8_t* from, std::size_t bytes) override { return {from, from + bytes}; }
  cudaStream_t makeStream() override { return nullptr; }
  std::vector<int> devices(int) override { return {}; }
  bool done(cudaStream_t) override { return true; }
  void capture(cudaStream_t) override { throw std::runtime_error("there are no graphs on the host"); }
  void* endCapture(cudaStream_t) override { return nullptr; }
  void launch(void*, cudaStream_t) override {}
  void releaseGraph(void*) override {}
};

}  // namespace

// program SCENARIO RANKS [SEED [GROUPS [THREADS]]]: the exit status is the number of ranks that failed.
// program loop PROCESSES THREADS RANKS_OF_A_THREAD [all | registered]
int main(int count, char** arguments) {
  if (count < 3) return 100;
  const std::string scenario = arguments[1];
  const int ranks = std::atoi(arguments[2]);
  const auto number = [&](int i, long otherwise) { return count > i ? std::atol(arguments[i]) : otherwise; };
  const auto seed = static_cast<std::uint64_t>(number(3, 1));
  const auto groups = static_cast<int>(number(4, 100)), threads = static_cast<int>(number(5, 1));
  if (scenario == "random")
    return runRanks(
        ranks, [&](const Rank& self) { randomGroups(self, seed, groups, threads); }, std::max(90, kWorldSeconds));
  if (scenario == "loop") {
    const std::string how = count > 5 ? arguments[5] : "";
    const LoopShape shape = loopShape(static_cast<int>(number(3, 1)), static_cast<int>(number(4, 1)), how);
    return runRanks(ranks, [&](const Rank& self) {
      HostMemory memory;
      const long checked = loop(self, shape, memory);
      require(checked >= 24, "only " + std::to_string(checked) + " operations were checked");
    });
  }
  if (scenario == "collectives") return runRanks(ranks, collectives);
  if (scenario == "operations") return runRanks(ranks, operations);
  if (scenario == "one-thread") return runRanks(1, [&](const Rank&) { oneThreadForAll(ranks); });
  if (scenario == "communicators") return runRanks(ranks, communicators);
  if (scenario == "misuse") return runRanks(ranks, misuse);
  if (scenario == "abort") return runRanks(ranks, abortWhileWaiting);
  if (scenario == "one-missing") return runRanks(ranks, oneMissing);
  if (scenario == "forked-off") return runRanks(ranks, forkedOff);
  if (scenario == "forked-off-meanwhile") return runRanks(ranks, [](const Rank&) { forkedOffMeanwhile(); });
  if (scenario == "last-words") return runRanks(ranks, [](const Rank&) { lastWords(); });
  if (scenario == "passed-on") return runRanks(ranks, passedOn);
  if (scenario == "carried") return runRanks(ranks, carriedCommunicators);
  if (scenario == "not-carried") return runRanks(ranks, notCarried);
  if (scenario == "no-simulation") return runRanks(ranks, noSimulation);
  if (scenario == "last-errors") return runRanks(ranks, lastErrors);
  if (scenario == "short-of-threads") return runRanks(1, [&](const Rank&) { shortOfThreads(ranks); });
  if (scenario == "elsewhere") return runRanks(ranks, elsewhere);
  if (scenario == "everyone-makes-the-id") return runRanks(ranks, everyoneMakesTheId);
  if (scenario == "carried-by-name") return runRanks(ranks, carriedByName);
  if (scenario == "answers") {
    answers();
    return 0;
  }
  return 101;
}
