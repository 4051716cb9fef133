#include "shuffle/routing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>

#include "bench/json.h"

namespace fusco::bench {
namespace {

const std::string kData = DATA_FOLDER;

RoutingOptions options(const std::string& text, int ranks = 4, int nodes = 1, int topk = 8, int experts = 64) {
  return {text, ranks, nodes, topk, experts, false, false, 7};
}

std::vector<double> frequency(const RoutingSource& source, std::int64_t tokens, int ranks) {
  std::vector<double> count(static_cast<std::size_t>(source.experts()), 0);
  for (int rank = 0; rank < ranks; ++rank)
    for (std::int32_t id : source.make(tokens, rank).ids) count.at(static_cast<std::size_t>(id)) += 1;
  return count;
}

std::string refusal(const RoutingOptions& o) {
  try {
    RoutingSource source(o);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

class TempFile {
 public:
  explicit TempFile(const std::string& content)
      : path_(testing::TempDir() + "routing_" + std::to_string(getpid()) + ".jsonl") {
    std::ofstream(path_) << content;
  }
  ~TempFile() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(Routing, SameSpecificationSameMapOtherRanksAndSeedsDiffer) {
  for (const char* text : {"uniform", "single-node", "imbalanced", "zipf:1.2"}) {
    RoutingSource a(options(text, 4, 2)), b(options(text, 4, 2));
    EXPECT_EQ(a.make(50, 1).ids, b.make(50, 1).ids) << text;
    EXPECT_EQ(a.make(50, 1).weights, b.make(50, 1).weights) << text;
    EXPECT_NE(a.make(50, 0).ids, a.make(50, 2).ids) << text;
    RoutingOptions other = options(text, 4, 2);
    other.seed = 8;
    EXPECT_NE(a.make(50, 1).ids, RoutingSource(other).make(50, 1).ids) << text;
  }
}

TEST(Routing, TokensHaveDifferentExpertsAndWeightsThatAddUpToOne) {
  for (const char* text : {"uniform", "single-node", "imbalanced", "zipf:2"}) {
    RoutingSource source(options(text, 4, 2));
    Routing routing = source.make(200, 0);
    ASSERT_EQ(routing.ids.size(), static_cast<std::size_t>(routing.tokens) * 8);
    for (std::int64_t t = 0; t < routing.tokens; ++t) {
      std::set<std::int32_t> ids(routing.ids.begin() + t * 8, routing.ids.begin() + t * 8 + 8);
      EXPECT_EQ(ids.size(), 8u) << text << " token " << t;
      EXPECT_GE(*ids.begin(), 0);
      EXPECT_LT(*ids.rbegin(), 64);
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += routing.weights[static_cast<std::size_t>(t * 8 + k)];
      EXPECT_NEAR(sum, 1, 1e-5);
    }
  }
}

TEST(Routing, UniformUsesEveryExpertAlike) {
  RoutingSource source(options("uniform"));
  std::vector<double> count = frequency(source, 4000, 4);
  double mean = 16000.0 * 8 / 64;
  for (double c : count) EXPECT_NEAR(c, mean, 5 * std::sqrt(mean));
}

TEST(Routing, SingleNodeKeepsATokenOnOneNodeAndUsesAllNodes) {
  RoutingSource source(options("single-node", 6, 3, 4, 50));
  std::vector<int> used(3, 0);
  for (int rank = 0; rank < 6; ++rank) {
    Routing routing = source.make(300, rank);
    for (std::int64_t t = 0; t < 300; ++t) {
      std::set<int> nodes;
      for (int k = 0; k < 4; ++k)
        nodes.insert(nodeOfRank(rankOfExpert(routing.ids[static_cast<std::size_t>(t * 4 + k)], 6, 50), 6, 3));
      ASSERT_EQ(nodes.size(), 1u);
      ++used[static_cast<std::size_t>(*nodes.begin())];
    }
  }
  for (int n : used) EXPECT_NEAR(n, 600, 5 * std::sqrt(600));
}

TEST(Routing, OtherNodeLeavesOutTheOwn) {
  RoutingSource source(options("other-node", 6, 3, 4, 50));
  std::vector<int> used(3, 0);
  for (int rank = 0; rank < 6; ++rank) {
    Routing routing = source.make(300, rank);
    for (std::int64_t t = 0; t < 300; ++t) {
      std::set<int> nodes;
      for (int k = 0; k < 4; ++k)
        nodes.insert(nodeOfRank(rankOfExpert(routing.ids[static_cast<std::size_t>(t * 4 + k)], 6, 50), 6, 3));
      ASSERT_EQ(nodes.size(), 1u);
      ASSERT_EQ(nodes.count(nodeOfRank(rank, 6, 3)), 0u);
      ++used[static_cast<std::size_t>(*nodes.begin())];
    }
  }
  for (int n : used) EXPECT_NEAR(n, 600, 5 * std::sqrt(600));
  EXPECT_THAT(refusal(options("other-node", 4, 1)), testing::HasSubstr("several nodes"));
}

TEST(Routing, ImbalancedScalesTokensWithinEachNode) {
  RoutingSource source(options("imbalanced", 8, 2));
  std::vector<std::int64_t> tokens;
  for (int rank = 0; rank < 8; ++rank) tokens.push_back(source.tokensOf(1000, rank));
  EXPECT_THAT(tokens, testing::ElementsAre(1750, 1250, 750, 250, 1750, 1250, 750, 250));
  EXPECT_EQ(source.make(1000, 3).tokens, 250);
}

TEST(Routing, ZipfFollowsItsExponent) {
  // One expert a token: popularity is then exactly proportional to 1 / place^S.
  RoutingSource source(options("zipf:1.2", 4, 1, 1, 16));
  std::vector<double> count = frequency(source, 20000, 4);
  std::sort(count.rbegin(), count.rend());
  double sum = 0;
  for (int i = 1; i <= 16; ++i) sum += std::pow(i, -1.2);
  for (int i = 0; i < 4; ++i)
    EXPECT_NEAR(count[static_cast<std::size_t>(i)], 80000 * std::pow(i + 1, -1.2) / sum, 800) << i;
}

TEST(Routing, ZipfStaysFiniteWhenAlmostAllWeightIsOnOneExpert) {
  RoutingSource source(options("zipf:10", 2, 1, 8, 8));
  EXPECT_EQ(source.make(100, 0).ids.size(), 800u);
}

TEST(Routing, CountsFollowTheRecordedWeights) {
  RoutingOptions o = options("counts:" + kData + "/expert-counts.json#Mixtral-8x7B/c4/1", 2);
  RoutingSource source(o);
  EXPECT_EQ(source.experts(), 8);
  EXPECT_EQ(source.topk(), 2);
  EXPECT_THAT(source.remark(), testing::HasSubstr("which experts go together is lost"));
  std::vector<double> counts;
  const Json models = Json::ofFile(kData + "/expert-counts.json")["models"];
  for (const Json& count : models["Mixtral-8x7B"]["counts"]["c4"]["1"].items()) counts.push_back(count.number());
  std::vector<double> drawn = frequency(source, 20000, 2);
  auto order = [](const std::vector<double>& v) { return std::max_element(v.begin(), v.end()) - v.begin(); };
  EXPECT_EQ(order(drawn), order(counts));
}

TEST(Routing, TraceIsTakenAsRecordedAndRepeated) {
  std::vector<std::vector<double>> layer;
  for (const Json& token : Json::ofFile(kData + "/granite-3.0-1b.topk.json")["layers"][5].items()) {
    layer.emplace_back();
    for (const Json& id : token.items()) layer.back().push_back(id.number());
  }
  RoutingSource source(options("trace:" + kData + "/granite-3.0-1b.topk.json#5", 2));
  EXPECT_EQ(source.experts(), 32);
  EXPECT_EQ(source.topk(), 8);
  Routing second = source.make(150, 1);
  for (std::size_t t = 0; t < 150; ++t)
    for (std::size_t k = 0; k < 8; ++k) EXPECT_EQ(second.ids[t * 8 + k], layer[(150 + t) % layer.size()][k]);
}

TEST(Routing, JsonLinesOfRecorders) {
  TempFile file("{\"layer\": 0, \"topk_ids\": [[0, 3], [1, 2]]}\n\n{\"layer\": 1, \"topk_ids\": [4, -1]}\n[5, 0]\n");
  RoutingSource all(options("trace:" + file.path(), 1));
  EXPECT_EQ(all.experts(), 6);
  EXPECT_THAT(all.make(4, 0).ids, testing::ElementsAre(0, 3, 1, 2, 4, -1, 5, 0));
  RoutingOptions named = options("trace:" + file.path() + "#1", 1);
  EXPECT_THAT(RoutingSource(named).make(1, 0).ids, testing::ElementsAre(4, -1));
}

TEST(Routing, RefusesWhatMakesNoSense) {
  using testing::HasSubstr;
  EXPECT_THAT(refusal(options("nonsense")), HasSubstr("nonsense"));
  EXPECT_THAT(refusal(options("zipf:x")), HasSubstr("exponent"));
  EXPECT_THAT(refusal(options("uniform", 1, 1, 9, 8)), HasSubstr("top-9 of 8"));
  EXPECT_THAT(refusal(options("uniform", 4, 1, 1, 3)), HasSubstr("3 experts for 4 ranks"));
  EXPECT_THAT(refusal(options("single-node", 4, 4, 8, 16)), HasSubstr("fewer than top-8"));
  EXPECT_THAT(refusal(options("trace:/nowhere.json")), HasSubstr("/nowhere.json"));
  EXPECT_THAT(refusal(options("trace:" + kData + "/granite-3.0-1b.topk.json#24")), HasSubstr("layers 0 to 23"));
  EXPECT_THAT(refusal(options("counts:" + kData + "/expert-counts.json#OLMoE-1B-7B/nosuch/0")), HasSubstr("wikipedia"));
  RoutingOptions wrong = options("counts:" + kData + "/expert-counts.json#OLMoE-1B-7B/c4/0", 4, 1, 4);
  wrong.topkGiven = true;
  EXPECT_THAT(refusal(wrong), HasSubstr("top-8"));
  TempFile ragged("[1, 2]\n[1]\n");
  EXPECT_THAT(refusal(options("trace:" + ragged.path())), HasSubstr("line 2"));
}

TEST(Routing, ExpertsLieOnRanksInBlocks) {
  for (auto [experts, ranks] : {std::pair{7, 3}, {64, 4}, {10, 7}, {5, 5}})
    for (int e = 0; e < experts; ++e) {
      int rank = rankOfExpert(e, ranks, experts);
      EXPECT_GE(e, firstExpertOf(rank, ranks, experts));
      EXPECT_LT(e, firstExpertOf(rank + 1, ranks, experts));
    }
}

TEST(Routing, MaskedAndOneExpert) {
  const Routing masked = RoutingSource(options("masked", 2, 1, 4, 16)).make(64, 1);
  const auto none = std::count(masked.ids.begin(), masked.ids.end(), -1);
  EXPECT_GT(none, 64 * 4 / 8);
  EXPECT_LT(none, 64 * 4 / 2);
  for (int k = 0; k < 4; ++k) EXPECT_EQ(masked.ids[7 * 4 + k], -1);  // nothing of every eighth token
  // More slots than experts: they all name the same one.
  const Routing one = RoutingSource(options("one-expert", 2, 1, 32, 16)).make(3, 0);
  EXPECT_EQ(std::count(one.ids.begin(), one.ids.end(), 8), 3 * 32);
}

}  // namespace
}  // namespace fusco::bench
