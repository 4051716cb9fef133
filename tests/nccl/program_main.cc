#include <cstdlib>

#include "nccl/program.h"

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
  if (scenario == "carried") return runRanks(ranks, carriedCommunicators);
  if (scenario == "not-carried") return runRanks(ranks, notCarried);
  if (scenario == "elsewhere") return runRanks(ranks, elsewhere);
  if (scenario == "carried-by-name") return runRanks(ranks, carriedByName);
  if (scenario == "answers") {
    answers();
    return 0;
  }
  return 101;
}
