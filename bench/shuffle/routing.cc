#include "shuffle/routing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "shuffle/pattern.h"

namespace fusco::bench {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("routing: " + what); }

}  // namespace

std::uint64_t mix(std::uint64_t value) { return mixed(value); }

std::uint64_t Random::next() {
  std::uint64_t result = mix(state_);
  state_ += 0x9e3779b97f4a7c15u;
  return result;
}

std::uint64_t Random::below(std::uint64_t bound) {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64);
}

double Random::unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

int firstExpertOf(int rank, int ranks, int experts) {
  return rank * (experts / ranks) + std::min(rank, experts % ranks);
}

int rankOfExpert(int expert, int ranks, int experts) {
  int small = experts / ranks, larger = experts % ranks;
  if (expert < larger * (small + 1)) return expert / (small + 1);
  return larger + (expert - larger * (small + 1)) / small;
}

int nodeOfRank(int rank, int ranks, int nodes) {
  return static_cast<int>(static_cast<std::int64_t>(rank) * nodes / ranks);
}

RoutingSource::RoutingSource(const RoutingOptions& options)
    : options_(options), topk_(options.topk), experts_(options.experts) {
  const std::string& text = options.text;
  if (text == "uniform") {
  } else if (text == "single-node" || text == "other-node") {
    kind_ = Kind::singleNode;
    otherNode_ = text == "other-node";
    if (otherNode_ && options_.nodes < 2) refuse("other-node wants several nodes");
    for (int node = 0; node < options_.nodes; ++node) {
      int held = 0;
      for (int rank = 0; rank < options_.ranks; ++rank)
        if (nodeOfRank(rank, options_.ranks, options_.nodes) == node)
          held += firstExpertOf(rank + 1, options_.ranks, experts_) - firstExpertOf(rank, options_.ranks, experts_);
      if (held < topk_) refuse(fmt::format("{}: node {} holds {} experts, fewer than top-{}", text, node, held, topk_));
    }
  } else if (text == "imbalanced") {
    imbalanced_ = true;
    remark_ = "tokens of a rank scaled by 1.75 (first of its node) to 0.25 (last), uniform experts";
  } else if (text == "masked") {
    kind_ = Kind::masked;
    remark_ = "uniform, but of every eighth token nothing and of the others one slot in four is not routed (-1)";
  } else if (text == "one-expert") {
    kind_ = Kind::oneExpert;
    remark_ = "all slots of all tokens name one expert";
  } else if (text.rfind("zipf:", 0) == 0) {
    char* end = nullptr;
    double exponent = std::strtod(text.c_str() + 5, &end);
    if (end == text.c_str() + 5 || *end != 0 || !(exponent >= 0 && exponent <= 10))
      refuse("zipf wants an exponent from 0 to 10, as in zipf:1.2");
    std::vector<double> weights(static_cast<std::size_t>(experts_));
    for (int i = 0; i < experts_; ++i) weights[i] = std::pow(i + 1.0, -exponent);
    // Which experts are popular is drawn from the seed: they would all lie on the first rank otherwise.
    Random random(mix(options_.seed) ^ 0x5a1bf);
    for (int i = experts_ - 1; i > 0; --i)
      std::swap(weights[i], weights[random.below(static_cast<std::uint64_t>(i) + 1)]);
    setPopularity(weights);
  } else if (text.rfind("counts:", 0) == 0) {
    readCounts(text.substr(7));
  } else if (text.rfind("trace:", 0) == 0) {
    readTrace(text.substr(6));
  } else {
    refuse("'" + text +
           "' is not one of uniform, single-node, other-node, imbalanced, masked, one-expert, zipf:S, "
           "counts:FILE#MODEL/SET/LAYER, trace:FILE");
  }
  if (kind_ != Kind::trace && kind_ != Kind::oneExpert && topk_ > experts_)
    refuse(fmt::format("top-{} of {} experts: a token cannot have so many different ones", topk_, experts_));
  if (experts_ < options_.ranks)
    refuse(fmt::format("{} experts for {} ranks: each rank needs one at least", experts_, options_.ranks));
}

void RoutingSource::setPopularity(const std::vector<double>& weights) {
  kind_ = Kind::weighted;
  popularity_ = weights;
  cumulative_.resize(weights.size());
  double sum = 0;
  int usable = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    sum += weights[i];
    usable += weights[i] > 0;
    cumulative_[i] = sum;
  }
  if (usable < topk_) refuse(fmt::format("only {} experts are ever used, fewer than top-{}", usable, topk_));
}

std::int64_t RoutingSource::tokensOf(std::int64_t tokens, int rank) const {
  if (!imbalanced_) return tokens;
  int node = nodeOfRank(rank, options_.ranks, options_.nodes), index = 0, size = 0;
  for (int r = 0; r < options_.ranks; ++r) {
    if (nodeOfRank(r, options_.ranks, options_.nodes) != node) continue;
    index += r < rank;
    ++size;
  }
  double weight = size == 1 ? 1.0 : 1.75 - 1.5 * index / (size - 1);
  return std::llround(static_cast<double>(tokens) * weight);
}

void RoutingSource::drawUniform(Random& random, int first, int count, std::int32_t* ids) const {
  for (int k = 0; k < topk_;) {
    auto id = static_cast<std::int32_t>(first + static_cast<int>(random.below(static_cast<std::uint64_t>(count))));
    if (std::find(ids, ids + k, id) == ids + k) ids[k++] = id;
  }
}

void RoutingSource::drawWeighted(Random& random, std::int32_t* ids) const {
  for (int k = 0; k < topk_; ++k) {
    // Draw from the rest: an expert that the token already has is drawn again; after many tries exactly.
    for (int attempt = 0;; ++attempt) {
      std::int32_t id = 0;
      if (attempt < 64) {
        double at = random.unit() * cumulative_.back();
        id = static_cast<std::int32_t>(std::upper_bound(cumulative_.begin(), cumulative_.end(), at) -
                                       cumulative_.begin());
        id = std::min(id, static_cast<std::int32_t>(experts_ - 1));
      } else {
        double left = 0;
        for (int e = 0; e < experts_; ++e)
          if (std::find(ids, ids + k, e) == ids + k) left += popularity_[e];
        double at = random.unit() * left;
        for (int e = 0; e < experts_; ++e) {
          if (std::find(ids, ids + k, e) != ids + k || popularity_[e] <= 0) continue;
          id = e;
          at -= popularity_[e];
          if (at < 0) break;
        }
      }
      if (popularity_[id] > 0 && std::find(ids, ids + k, id) == ids + k) {
        ids[k] = id;
        break;
      }
    }
  }
}

Routing RoutingSource::make(std::int64_t tokens, int rank) const {
  Routing routing;
  routing.tokens = tokensOf(tokens, rank);
  std::size_t slots = static_cast<std::size_t>(routing.tokens) * static_cast<std::size_t>(topk_);
  routing.ids.resize(slots);
  routing.weights.resize(slots);
  Random random(mix(mix(options_.seed) + static_cast<std::uint64_t>(rank) * 0x10001));
  std::int64_t before = 0;
  for (int r = 0; r < rank; ++r) before += tokensOf(tokens, r);
  std::size_t recorded = trace_.size() / static_cast<std::size_t>(topk_);

  // Experts of a node are contiguous, since its ranks are.
  std::vector<int> nodeStart(static_cast<std::size_t>(options_.nodes) + 1, experts_);
  for (int r = options_.ranks - 1; r >= 0; --r)
    nodeStart[nodeOfRank(r, options_.ranks, options_.nodes)] = firstExpertOf(r, options_.ranks, experts_);

  for (std::int64_t t = 0; t < routing.tokens; ++t) {
    std::int32_t* ids = routing.ids.data() + t * topk_;
    switch (kind_) {
      case Kind::uniform:
        drawUniform(random, 0, experts_, ids);
        break;
      case Kind::singleNode: {
        auto node = random.below(static_cast<std::uint64_t>(options_.nodes - (otherNode_ ? 1 : 0)));
        if (otherNode_ && static_cast<int>(node) >= nodeOfRank(rank, options_.ranks, options_.nodes)) ++node;
        drawUniform(random, nodeStart[node], nodeStart[node + 1] - nodeStart[node], ids);
        break;
      }
      case Kind::weighted:
        drawWeighted(random, ids);
        break;
      case Kind::masked:
        drawUniform(random, 0, experts_, ids);
        for (int k = 0; k < topk_; ++k)
          if (t % 8 == 7 || random.below(4) == 0) ids[k] = -1;
        break;
      case Kind::oneExpert:
        std::fill_n(ids, topk_, experts_ / 2);
        break;
      case Kind::trace: {
        std::size_t row = static_cast<std::size_t>(before + t) % recorded;
        std::copy_n(trace_.begin() + static_cast<std::ptrdiff_t>(row * topk_), topk_, ids);
        break;
      }
    }
    float* weights = routing.weights.data() + t * topk_;
    float sum = 0;
    for (int k = 0; k < topk_; ++k) sum += weights[k] = static_cast<float>(0.05 + random.unit());
    for (int k = 0; k < topk_; ++k) weights[k] /= sum;
  }
  return routing;
}

}  // namespace fusco::bench
