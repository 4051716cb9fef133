#include "comm/islands.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "base/bus_id.h"

namespace fusco::comm {
namespace {

using Matrix = std::vector<std::vector<bool>>;  // [from][to]

std::uint32_t idOf(int gpu) { return busId(0, static_cast<unsigned>(gpu), 0); }

Record recordOf(const GpuPlace& gpu, int nodeId = -1, std::uint64_t domain = 1) {
  Record record{};
  record.domain = domain;
  record.nodeId = nodeId;
  record.gpu = gpu;
  return record;
}

// What a rank on `gpu` says of a machine.
Record recordOf(int gpu, const Matrix& path, int nodeId = -1, std::uint64_t domain = 1) {
  std::vector<std::uint32_t> without;
  for (int other = 0; other < static_cast<int>(path.size()); ++other) {
    if (other != gpu && !path[static_cast<std::size_t>(gpu)][static_cast<std::size_t>(other)])
      without.push_back(idOf(other));
  }
  return recordOf(gpuPlace(idOf(gpu), without), nodeId, domain);
}

Matrix all(int gpus, bool path) {
  return Matrix(static_cast<std::size_t>(gpus), std::vector<bool>(static_cast<std::size_t>(gpus), path));
}
void cut(Matrix& path, int from, int to) { path[static_cast<std::size_t>(from)][static_cast<std::size_t>(to)] = false; }

std::vector<int> nodesOf(const Matrix& path, const std::vector<int>& gpus, const std::vector<int>& nodeIds = {}) {
  std::vector<Record> records;
  for (std::size_t r = 0; r < gpus.size(); ++r) {
    records.push_back(recordOf(gpus[r], path, nodeIds.empty() ? -1 : nodeIds[r]));
    records.back().rank = static_cast<int>(r);
  }
  return comm::nodesOf(records);
}

using Nodes = std::vector<int>;

TEST(Islands, ranksOfTheHostAreByDomainAndNodeId) {
  EXPECT_EQ(comm::nodesOf({recordOf({}), recordOf({}), recordOf({}, -1, 2), recordOf({}, 3), recordOf({})}),
            (Nodes{0, 0, 1, 2, 0}));
}

TEST(Islands, gpusThatReachEachOtherAreOneNode) {
  EXPECT_EQ(nodesOf(all(8, true), {0, 1, 2, 3, 4, 5, 6, 7}), Nodes(8, 0));
  EXPECT_EQ(nodesOf(all(8, true), {7, 7, 0}), Nodes(3, 0));
}

TEST(Islands, withoutPathsRanksOfAGpuStayTogether) {
  EXPECT_EQ(nodesOf(all(3, false), {0, 1, 0, 2, 1}), (Nodes{0, 1, 0, 2, 1}));
  const GpuPlace one{idOf(1), {GpuPlace::kAllOthers}}, other{idOf(2), {GpuPlace::kAllOthers}};
  EXPECT_EQ(comm::nodesOf({recordOf(one), recordOf(other), recordOf(one)}), (Nodes{0, 1, 0}));
  // One that is to reach nobody is reached by nobody.
  EXPECT_EQ(comm::nodesOf({recordOf(0, all(3, true)), recordOf(2, all(3, true)), recordOf(one)}), (Nodes{0, 0, 1}));
}

TEST(Islands, halvesOfAMachineAreTwoNodes) {
  Matrix path = all(4, true);
  for (const int one : {0, 1}) {
    for (const int other : {2, 3}) {
      cut(path, one, other);
      cut(path, other, one);
    }
  }
  EXPECT_EQ(nodesOf(path, {0, 1, 2, 3}), (Nodes{0, 0, 1, 1}));
  EXPECT_EQ(nodesOf(path, {0, 2, 1, 3}), (Nodes{0, 1, 0, 1}));
  EXPECT_EQ(nodesOf(path, {0, 1, 2, 3}, {0, 1, 0, 1}), (Nodes{0, 1, 2, 3}));
}

TEST(Islands, oneWayIsNone) {
  Matrix path = all(2, true);
  cut(path, 0, 1);
  EXPECT_EQ(nodesOf(path, {0, 1}), (Nodes{0, 1}));
  EXPECT_EQ(nodesOf(path, {1, 0}), (Nodes{0, 1}));
}

// 0 - 1 - 2: the middle one goes with who comes first.
TEST(Islands, allOfANodeReachEachOther) {
  Matrix path = all(3, true);
  cut(path, 0, 2);
  EXPECT_EQ(nodesOf(path, {0, 1, 2}), (Nodes{0, 0, 1}));
  EXPECT_EQ(nodesOf(path, {2, 1, 0}), (Nodes{0, 0, 1}));
  EXPECT_EQ(nodesOf(path, {0, 2, 1}), (Nodes{0, 1, 0}));
}

// Ranks on one GPU may have asked differently: what any of them has found counts.
TEST(Islands, whoKnowsMoreIsHeard) {
  Matrix cautious = all(2, true);
  cut(cautious, 0, 1);
  const Record knows = recordOf(0, cautious), doesNot = recordOf(0, all(2, true)), other = recordOf(1, all(2, true));
  EXPECT_EQ(comm::nodesOf({doesNot, other, knows}), (Nodes{0, 0, 1}));
  EXPECT_EQ(comm::nodesOf({doesNot, knows, other}), (Nodes{0, 0, 1}));
}

TEST(Islands, moreGpusThanARecordHoldsAreAll) {
  for (const int others : {15, 16, 17, 40}) {
    Matrix path = all(others + 2, true);
    for (int other = 1; other <= others; ++other) {
      cut(path, 0, other);
      cut(path, other, 0);
    }
    // The last one can be reached, but there may be no room to say so.
    EXPECT_EQ(nodesOf(path, {0, others + 1}), others > 16 ? (Nodes{0, 1}) : (Nodes{0, 0})) << others;
    EXPECT_EQ(nodesOf(path, {0, 5, 0}), (Nodes{0, 1, 0}));
  }
}

// What a rank says is compared by one who knows nothing of the rule: all of a node reach each other, nobody begins a
// node who could have joined one before, numbers rise; and a split, in any order, keeps the nodes that it has parts of.
TEST(Islands, randomMachines) {
  for (unsigned seed = 0; seed < 400; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](int least, int most) { return std::uniform_int_distribution<int>(least, most)(random); };
    const int gpus = pick(1, 9), ranks = pick(1, 20), missing = pick(0, 60);
    Matrix path = all(gpus, true);
    for (int from = 0; from < gpus; ++from) {
      for (int to = 0; to < gpus; ++to) {
        if (pick(0, 99) < missing) cut(path, from, to);
      }
    }
    std::vector<int> of, ids;
    for (int r = 0; r < ranks; ++r) {
      of.push_back(pick(0, gpus - 1));
      ids.push_back(pick(-1, 1));
    }
    const auto reach = [&](int a, int b) {
      const auto one = static_cast<std::size_t>(of[static_cast<std::size_t>(a)]);
      const auto other = static_cast<std::size_t>(of[static_cast<std::size_t>(b)]);
      return one == other || (path[one][other] && path[other][one]);
    };
    const Nodes nodes = nodesOf(path, of, ids);
    int begun = 0;
    for (int r = 0; r < ranks; ++r) {
      const int node = nodes[static_cast<std::size_t>(r)];
      ASSERT_LE(node, begun) << seed;
      for (int n = 0; n <= node; ++n) {
        bool joins = n < begun;
        for (int before = 0; before < r && joins; ++before) {
          if (nodes[static_cast<std::size_t>(before)] != n) continue;
          joins = reach(before, r) && ids[static_cast<std::size_t>(before)] == ids[static_cast<std::size_t>(r)];
        }
        ASSERT_EQ(joins, n == node && node < begun) << seed << " rank " << r << " node " << n;
      }
      begun = std::max(begun, node + 1);
    }
    std::vector<int> order(static_cast<std::size_t>(ranks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    order.resize(static_cast<std::size_t>(pick(1, ranks)));
    std::map<int, int> known;
    Nodes wanted;
    std::vector<int> childOf, childIds;
    for (const int r : order) {
      const int node = nodes[static_cast<std::size_t>(r)];
      wanted.push_back(known.emplace(node, static_cast<int>(known.size())).first->second);
      childOf.push_back(of[static_cast<std::size_t>(r)]);
      childIds.push_back(node);
    }
    ASSERT_EQ(nodesOf(path, childOf, childIds), wanted) << seed;
  }
}

TEST(Islands, areTold) {
  const auto told = [](const std::vector<Record>& records) { return describeGpus(records, comm::nodesOf(records), 1); };
  const Matrix path = all(3, true);
  EXPECT_EQ(told({recordOf({}), recordOf({})}), "");
  EXPECT_EQ(told({recordOf(1, path), recordOf(1, path), recordOf(2, path, -1, 9)}), "");
  EXPECT_EQ(told({recordOf(1, path, 0), recordOf(2, path, 1)}), "");
  EXPECT_EQ(told({recordOf(2, path), recordOf(1, path)}),
            "GPUs 0000:01:00.0 0000:02:00.0 reach each other's memory: one node");
  Matrix apart = path;
  cut(apart, 1, 2);
  EXPECT_EQ(told({recordOf({}, -1, 7), recordOf(2, apart), recordOf(1, apart), recordOf(0, apart)}),
            "GPUs make 2 nodes of this machine (node 1: 0000:00:00.0 0000:02:00.0; node 2: 0000:01:00.0): there is no "
            "path between the memory of 0000:02:00.0 and that of 0000:01:00.0; the host carries rows between nodes");
  const GpuPlace alone{idOf(1), {GpuPlace::kAllOthers}};
  EXPECT_NE(told({recordOf(2, path), recordOf(alone)}).find("FUSCO_P2P_DISABLE"), std::string::npos);
}

TEST(BusIds, areNumbersAndText) {
  EXPECT_EQ(busIdText(busId(0, 0x1b, 0)), "0000:1b:00.0");
  EXPECT_EQ(busIdText(busId(0xd, 0xff, 31)), "000d:ff:1f.0");
  EXPECT_NE(busId(0, 0, 0), 0u);
  EXPECT_NE(busId(0xffff, 0xff, 31), busId(0xffff, 0xff, 30));
}

}  // namespace
}  // namespace fusco::comm
