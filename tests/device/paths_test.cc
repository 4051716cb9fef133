// GPUs that cannot reach each other's memory make nodes by themselves, and shuffles between these are right. With
// FUSCO_P2P_DISABLE=1 no GPU reaches any other, and the same cases hold.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "device/stand_in.h"

namespace fusco::test {
namespace {

struct Machine {
  const char* name;
  std::vector<int> gpus;                 // by rank
  std::set<std::pair<int, int>> noPath;  // from, to
  std::vector<int> nodes;                // that follow
  std::vector<int> given = {};           // nodeId by rank

  int nodeId(int rank) const { return given.empty() ? FUSCO_UNSET : given[static_cast<std::size_t>(rank)]; }
  // Numbered by first appearance.
  std::vector<int> wanted() const {
    const char* const disabled = std::getenv("FUSCO_P2P_DISABLE");
    if (disabled == nullptr || disabled[0] != '1') return nodes;
    std::map<std::pair<int, int>, int> known;
    std::vector<int> all;
    for (int rank = 0; rank < static_cast<int>(gpus.size()); ++rank) {
      const std::pair key(nodeId(rank), gpus[static_cast<std::size_t>(rank)]);
      all.push_back(known.emplace(key, static_cast<int>(known.size())).first->second);
    }
    return all;
  }
};

void PrintTo(const Machine& machine, std::ostream* out) { *out << machine.name; }

std::vector<int> nodesOf(fuscoComm_t comm, int ranks) {
  std::vector<int> nodes(static_cast<std::size_t>(ranks), -1);
  for (int rank = 0; rank < ranks; ++rank) FUSCO_OK(fuscoCommNode(comm, rank, &nodes[static_cast<std::size_t>(rank)]));
  return nodes;
}

std::string shuffles(fuscoComm_t comm, int rank, int ranks, std::int64_t cases) {
  const Cases some(cases, ranks);
  StandInSpace space;
  std::string text;
  for (std::int64_t i = 0; i < some.count && text.empty(); ++i)
    text = runRank(randomCase(some.seed(i), ranks), comm, rank, space);
  return text;
}

// Every second rank, the last first: nodes stay what they were, numbered anew.
std::string split(fuscoComm_t comm, int rank, const std::vector<int>& nodes) {
  fuscoComm_t child = nullptr;
  FUSCO_OK(fuscoCommSplit(comm, rank % 2, -rank, &child, nullptr));
  std::map<int, int> known;
  std::vector<int> wanted;
  for (int r = static_cast<int>(nodes.size()) - 1; r >= 0; --r) {
    if (r % 2 != rank % 2) continue;
    const int node = nodes[static_cast<std::size_t>(r)];
    wanted.push_back(known.emplace(node, static_cast<int>(known.size())).first->second);
  }
  int self = -1;
  FUSCO_OK(fuscoCommUserRank(child, &self));
  const int ranks = static_cast<int>(wanted.size());
  std::string text = nodesOf(child, ranks) == wanted ? "" : "a split has other nodes";
  // What ranks of one node plan by is not in the stand-in.
  if (text.empty() && known.size() > 1) text = shuffles(child, self, ranks, 2);
  FUSCO_OK(text.empty() ? fuscoCommDestroy(child) : fuscoCommAbort(child));
  return text;
}

class DevicePaths : public ::testing::TestWithParam<Machine> {
 protected:
  ~DevicePaths() override { sayNoPath({}); }
};

TEST_P(DevicePaths, makeNodes) {
  const Machine& machine = GetParam();
  const int ranks = static_cast<int>(machine.gpus.size());
  sayNoPath(machine.noPath);
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess) << fuscoGetLastError(nullptr);
  std::vector<std::string> wrong(machine.gpus.size());
  std::vector<std::vector<int>> nodes(machine.gpus.size());
  runThreads(ranks, [&](int rank) {
    const auto at = static_cast<std::size_t>(rank);
    useGpu(machine.gpus[at]);
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    config.nodeId = machine.nodeId(rank);
    config.operationTimeoutMs = 20000;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, ranks, id, rank, &config));
    try {
      nodes[at] = nodesOf(comm, ranks);
      if (nodes[at] == machine.wanted()) wrong[at] = shuffles(comm, rank, ranks, 6);
      if (nodes[at] == machine.wanted() && wrong[at].empty() && ranks > 3) wrong[at] = split(comm, rank, nodes[at]);
      fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
      FUSCO_OK(fuscoCommGetStatistics(comm, &statistics));
      if (wrong[at].empty() && statistics.wireSlices == 0) wrong[at] = "nothing went by slices";
    } catch (const std::exception& e) {
      wrong[at] = e.what();
    }
    if (!wrong[at].empty()) {
      fuscoCommAbort(comm);
      return;
    }
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  for (const std::vector<int>& seen : nodes) EXPECT_EQ(seen, machine.wanted());
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

INSTANTIATE_TEST_SUITE_P(
    Machines, DevicePaths,
    ::testing::Values(Machine{"one_way_is_none", {0, 1}, {{0, 1}}, {0, 1}},
                      Machine{"pairs", {0, 1, 2, 3}, {{0, 2}, {2, 0}, {0, 3}, {3, 1}, {1, 2}}, {0, 0, 1, 1}},
                      Machine{"shared_gpus", {0, 1, 0, 1}, {{1, 0}}, {0, 1, 0, 1}},
                      Machine{"given_nodes", {0, 1, 0, 0}, {{0, 1}, {1, 0}}, {0, 1, 0, 2}, {5, 5, 5, 7}}));

}  // namespace
}  // namespace fusco::test
