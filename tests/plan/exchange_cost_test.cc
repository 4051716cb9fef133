// The exchange's formula against a scan that is carried out, message by message.
#include "../../bench/plan/exchange_cost.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace fusco::bench {
namespace {

TEST(ExchangeCost, IsWhatAScanOverNodesSends) {
  for (int nodes = 1; nodes <= 40; ++nodes) {
    std::vector<std::int64_t> own(nodes), lower(nodes, 0), higher(nodes, 0);
    for (int node = 0; node < nodes; ++node) own[node] = 1 + node * node;
    int rounds = 0, mostSent = 0;
    std::vector<int> sent(nodes, 0);
    for (int distance = 1; distance < nodes; distance *= 2, ++rounds) {
      const std::vector<std::int64_t> lowerBefore = lower, higherBefore = higher;
      for (int node = 0; node < nodes; ++node) {
        if (node + distance < nodes) {
          lower[node + distance] += lowerBefore[node] + own[node];
          ++sent[node];
        }
        if (node - distance >= 0) {
          higher[node - distance] += higherBefore[node] + own[node];
          ++sent[node];
        }
      }
    }
    const std::int64_t all = std::accumulate(own.begin(), own.end(), std::int64_t{0});
    std::int64_t before = 0;
    for (int node = 0; node < nodes; ++node) {
      ASSERT_EQ(lower[node], before);
      ASSERT_EQ(lower[node] + own[node] + higher[node], all);
      before += own[node];
      mostSent = std::max(mostSent, sent[node]);
    }
    const ExchangeCost cost = exchangeCost(4 * nodes, nodes, 4, 256);
    EXPECT_EQ(cost.rounds, rounds) << nodes << " nodes";
    EXPECT_GE(cost.sentAcross, std::int64_t{mostSent} * (256 / 4) * 4);  // no rank sends more than the formula says
    EXPECT_EQ(cost.sentAcross, 2ll * rounds * (256 / 4) * 4);
  }
}

TEST(ExchangeCost, SlicesAreCutForTheSmallestNode) {
  EXPECT_EQ(exchangeCost(11, 2, 3, 10).sentAcross, 2 * 4 * 4);  // 10 keys in 3 slices of at most 4
  EXPECT_EQ(exchangeCost(8, 1, 8, 64).sentAcross, 0);
  EXPECT_EQ(exchangeCost(2048, 256, 8, 2048).sentAcross, 2 * 8 * 256 * 4);
  EXPECT_EQ(exchangeCost(2048, 256, 8, 2048).matrix, std::int64_t{16} << 20);
}

}  // namespace
}  // namespace fusco::bench
