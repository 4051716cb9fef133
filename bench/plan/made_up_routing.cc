#include "made_up_routing.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <stdexcept>

namespace fusco::bench {

RoutingKind parseRouting(const std::string& text) {
  if (text == "uniform") return {};
  if (text == "imbalanced") return {true, 0};
  if (text.rfind("zipf:", 0) == 0) {
    std::size_t used = 0;
    const std::string number = text.substr(5);
    double exponent = 0;
    try {
      exponent = std::stod(number, &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (used == number.size() && used > 0 && exponent > 0 && exponent < 10) return {false, exponent};
  }
  throw std::invalid_argument("routing '" + text + "'; give uniform, imbalanced or zipf:S with 0 < S < 10");
}

std::int64_t tokensOf(RoutingKind kind, std::int64_t tokens, int localIndex, int size) {
  if (!kind.imbalanced || size < 2) return tokens;
  return std::llround(static_cast<double>(tokens) * (1.75 - 1.5 * localIndex / (size - 1)));
}

RoutingSource::RoutingSource(RoutingKind kind, int topk, int experts) : topk_(topk), expertAt_(experts) {
  if (topk < 1 || topk > experts) throw std::invalid_argument("top-k must be between 1 and the number of experts");
  std::iota(expertAt_.begin(), expertAt_.end(), 0);
  if (kind.zipf == 0) return;
  std::mt19937_64 random(1);  // not std::shuffle: its result differs between libraries
  for (int i = experts - 1; i > 0; --i) std::swap(expertAt_[i], expertAt_[random() % (i + 1)]);
  double sum = 0;
  for (int place = 1; place <= experts; ++place) cumulated_.push_back(sum += std::pow(place, -kind.zipf));
}

std::vector<std::int64_t> RoutingSource::draw(std::int64_t tokens, std::uint64_t seed) const {
  std::mt19937_64 random(seed);
  const std::size_t experts = expertAt_.size();
  std::vector<std::int64_t> ids(tokens * topk_);
  std::vector<std::int64_t> takenBy(experts, -1);
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (int slot = 0; slot < topk_;) {
      std::size_t place = 0;
      if (cumulated_.empty()) {
        place = random() % experts;
      } else {
        const double u = static_cast<double>(random() >> 11) * 0x1p-53 * cumulated_.back();
        place = std::upper_bound(cumulated_.begin(), cumulated_.end(), u) - cumulated_.begin();
        place = std::min(place, experts - 1);
      }
      if (takenBy[place] == token) continue;
      takenBy[place] = token;
      ids[token * topk_ + slot++] = expertAt_[place];
    }
  }
  return ids;
}

}  // namespace fusco::bench
