#include "moe_nccl/check.h"

#include <algorithm>
#include <cmath>

#include "moe_nccl/expert_host.h"
#include "shuffle/data.h"

namespace fusco::bench::moe {

namespace {

constexpr std::int64_t kTokens = 8;

// The experts' results for a token, added up with its weights; and the sum of their magnitudes.
void reference(const Shape& shape, const Routing& routing, std::int64_t token, std::vector<double>& sum,
               std::vector<double>& magnitude) {
  const auto hidden = static_cast<std::size_t>(shape.hidden);
  std::vector<std::byte> row(shape.rowBytes());
  fillRow(row.data(), tokenKey(shape.seed, shape.rank, token), 0, row.size(), Type::bf16);
  std::vector<double> x(hidden), result(hidden);
  for (std::size_t j = 0; j < hidden; ++j) x[j] = toDouble(&row[2 * j], Type::bf16);
  for (int k = 0; k < shape.topk; ++k) {
    const auto slot = static_cast<std::size_t>(token * shape.topk + k);
    const int expert = routing.ids[slot];
    if (expert < 0) continue;
    std::fill(result.begin(), result.end(), 0.0);
    for (int f = 0; f < shape.inner; ++f) {
      double dot = 0;
      for (std::size_t j = 0; j < hidden; ++j)
        dot += x[j] * static_cast<double>(expertWeight(shape, expert, 0, f, static_cast<std::int64_t>(j)));
      if (dot <= 0) continue;
      for (std::size_t j = 0; j < hidden; ++j)
        result[j] += dot * static_cast<double>(expertWeight(shape, expert, 1, f, static_cast<std::int64_t>(j)));
    }
    for (std::size_t j = 0; j < hidden; ++j) {
      const double value = shape.inner == 0 ? x[j] * static_cast<double>(expertScale(expert)) : result[j];
      sum[j] += static_cast<double>(routing.weights[slot]) * value;
      magnitude[j] += std::abs(static_cast<double>(routing.weights[slot]) * value);
    }
  }
}

}  // namespace

std::uint64_t wrongAgainstReference(const Shape& shape, const Routing& routing, const std::uint16_t* y) {
  std::uint64_t wrong = 0;
  const auto hidden = static_cast<std::size_t>(shape.hidden);
  const std::int64_t tokens = std::min(kTokens, shape.tokens);
  for (std::int64_t i = 0; i < tokens; ++i) {
    const std::int64_t token = tokens == 1 ? 0 : i * (shape.tokens - 1) / (tokens - 1);
    std::vector<double> sum(hidden), magnitude(hidden);
    reference(shape, routing, token, sum, magnitude);
    for (std::size_t j = 0; j < hidden; ++j) {
      const auto* const element = reinterpret_cast<const std::byte*>(y + static_cast<std::size_t>(token) * hidden + j);
      const double allowed = 2.2 * roundingUnit(Type::bf16) * magnitude[j] + 1e-5;
      // Not a number is wrong too.
      wrong += std::abs(toDouble(element, Type::bf16) - sum[j]) <= allowed ? 0 : 1;
    }
  }
  return wrong;
}

}  // namespace fusco::bench::moe
