// Routing maps out of thin air, the same from the same seed on any machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fusco::bench {

struct RoutingKind {
  bool imbalanced = false;  // tokens of a node's rank i scaled by a weight that falls linearly from 1.75 to 0.25
  double zipf = 0;          // experts drawn with probability ~ 1 / place^zipf, places dealt out at random; 0: uniform
};

// "uniform", "imbalanced" or "zipf:S"; throws std::invalid_argument otherwise.
RoutingKind parseRouting(const std::string& text);

// Tokens of the rank with this index among the `size` ranks of its node.
std::int64_t tokensOf(RoutingKind kind, std::int64_t tokens, int localIndex, int size);

// Draws K different experts for each token. topk <= experts.
class RoutingSource {
 public:
  RoutingSource(RoutingKind kind, int topk, int experts);
  std::vector<std::int64_t> draw(std::int64_t tokens, std::uint64_t seed) const;  // [tokens, topk]

 private:
  int topk_;
  std::vector<double> cumulated_;       // by place; empty: uniform
  std::vector<std::int32_t> expertAt_;  // by place
};

}  // namespace fusco::bench
