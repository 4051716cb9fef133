// Whole shuffles with ranks as processes, against the naive oracle: rows go through windows, by process_vm, or staged,
// on one node and on emulated nodes, one operation at a time and two at once.
#include <gtest/gtest.h>

#include "shuffle/case.h"
#include "shuffle/ranks.h"

namespace fusco::test {
namespace {

enum class Memory { window, isPrivate, either };

void runWorld(const World& world, Memory memory, std::int64_t cases, bool two = false) {
  const Cases some(two ? 2 * cases : cases, 500 + world.ranks);
  const auto caseOf = [&](std::int64_t i) {
    Case c = randomCase(some.seed(i), world.ranks);
    if (memory != Memory::either) c.privateMemory = memory == Memory::isPrivate;
    return c;
  };
  const std::vector<std::string> wrong = runRanks(
      world,
      [&](Rank& self) {
        fuscoComm_t comm = self.connect();
        for (std::int64_t i = 0; i < some.count; i += two ? 2 : 1) {
          const std::string text =
              two ? runTwo(caseOf(i), caseOf(i + 1), comm, self.rank()) : runRank(caseOf(i), comm, self.rank());
          if (!text.empty()) {
            fuscoCommAbort(comm);
            throw std::runtime_error(text);
          }
        }
        FUSCO_OK(fuscoCommFinalize(comm));
        FUSCO_OK(fuscoCommDestroy(comm));
      },
      static_cast<int>(100 + some.count / 4));
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

const World kTwo{"two", 2, 1, {}, true, 16384};
const World kThree{"three", 3, 1, {}, true, 16384};
const World kTwoByTwo{"two processes of two threads", 4, 2, {}, true, 16384};

World staged(World world) {
  world.processVm = false;
  return world;
}
World spread(World world, std::vector<int> nodes, std::int64_t sliceBytes = 16384) {
  world.ranks = static_cast<int>(nodes.size());
  world.nodes = std::move(nodes);
  world.sliceBytes = sliceBytes;
  return world;
}

TEST(ShuffleProcesses, windows) { runWorld(kTwo, Memory::window, 150); }
TEST(ShuffleProcesses, threeRanks) { runWorld(kThree, Memory::either, 150); }
TEST(ShuffleProcesses, privateByProcessVm) { runWorld(kTwo, Memory::isPrivate, 150); }
TEST(ShuffleProcesses, privateStaged) { runWorld(staged(kTwo), Memory::isPrivate, 150); }
TEST(ShuffleProcesses, threeRanksStaged) { runWorld(staged(kThree), Memory::either, 100); }
TEST(ShuffleProcesses, processesOfThreads) { runWorld(kTwoByTwo, Memory::either, 100); }
TEST(ShuffleProcesses, processesOfThreadsStaged) { runWorld(staged(kTwoByTwo), Memory::isPrivate, 100); }
TEST(ShuffleProcesses, twoNodesOfOne) { runWorld(spread(kTwo, {0, 1}), Memory::either, 150); }
TEST(ShuffleProcesses, twoNodesOfTwo) { runWorld(spread(kTwo, {0, 0, 1, 1}), Memory::either, 100); }
TEST(ShuffleProcesses, twoNodesOfTwoStaged) { runWorld(staged(spread(kTwo, {0, 0, 1, 1})), Memory::isPrivate, 100); }
TEST(ShuffleProcesses, nodesAcrossProcesses) { runWorld(spread(kTwoByTwo, {0, 1, 0, 1}), Memory::either, 100); }
TEST(ShuffleProcesses, smallSlices) { runWorld(spread(kTwo, {0, 1, 1}, 4096), Memory::isPrivate, 100); }

TEST(ShuffleMicroBatches, threads) { runWorld({"three threads", 3, 3, {}, true, 16384}, Memory::either, 100, true); }
TEST(ShuffleMicroBatches, threadsOnTwoNodes) {
  runWorld({"threads on nodes", 3, 3, {0, 1, 1}, true, 8192}, Memory::either, 100, true);
}
TEST(ShuffleMicroBatches, windows) { runWorld(kTwo, Memory::window, 100, true); }
TEST(ShuffleMicroBatches, privateByProcessVm) { runWorld(kTwo, Memory::isPrivate, 75, true); }
TEST(ShuffleMicroBatches, privateStaged) { runWorld(staged(kTwo), Memory::isPrivate, 75, true); }
TEST(ShuffleMicroBatches, twoNodesOfTwo) { runWorld(spread(kTwo, {0, 0, 1, 1}), Memory::either, 75, true); }

}  // namespace
}  // namespace fusco::test
