#include "moe_nccl/expert_host.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "shuffle/routing.h"

namespace fusco::bench::moe {

namespace {

constexpr int kTogether = 4;  // rows that share one reading of the matrices
constexpr int kLanes = 16;

float fromBf16(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
std::uint16_t toBf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MOE_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define MOE_CLONES
#endif

// y[r] += relu(dot(x[r], a)) * b, for each row.
MOE_CLONES void oneUnit(const float* x, float* y, const float* a, const float* b, std::int64_t hidden, int rows) {
  for (int r = 0; r < rows; ++r) {
    const float* const row = x + r * hidden;
    float lanes[kLanes] = {};
    std::int64_t j = 0;
    for (; j + kLanes <= hidden; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += row[j + lane] * a[j + lane];
    }
    float sum = 0;
    for (; j < hidden; ++j) sum += row[j] * a[j];
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    if (sum <= 0) continue;
    float* const out = y + r * hidden;
    for (std::int64_t i = 0; i < hidden; ++i) out[i] += sum * b[i];
  }
}

}  // namespace

float expertWeight(const Shape& shape, int expert, int which, int f, std::int64_t j) {
  const std::uint64_t bits =
      mix(mix(shape.seed * 2 + static_cast<std::uint64_t>(which)) + (static_cast<std::uint64_t>(expert) << 40) +
          (static_cast<std::uint64_t>(f) << 20) + static_cast<std::uint64_t>(j));
  const float unit = static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f;
  return unit * 2 / std::sqrt(static_cast<float>(which == 0 ? shape.hidden : shape.inner));
}

float expertScale(int expert) { return 0.5f + static_cast<float>(expert % 64) / 64; }

HostExperts::HostExperts(const Shape& shape) : shape_(shape) {
  for (int e = 0; e < shape.localExperts; ++e) {
    for (int f = 0; f < shape.inner; ++f) {
      for (std::int64_t j = 0; j < shape.hidden; ++j) {
        in_.push_back(expertWeight(shape, shape.firstExpert + e, 0, f, j));
        out_.push_back(expertWeight(shape, shape.firstExpert + e, 1, f, j));
      }
    }
  }
}

void HostExperts::run(const std::uint16_t* rows, std::uint16_t* results, const std::int64_t* starts) {
  const std::int64_t hidden = shape_.hidden;
  std::vector<float> x(static_cast<std::size_t>(kTogether * hidden)), y(x.size());
  for (int e = 0; e < shape_.localExperts; ++e) {
    const float scale = expertScale(shape_.firstExpert + e);
    for (std::int64_t first = starts[e]; first < starts[e + 1]; first += kTogether) {
      const int count = static_cast<int>(std::min<std::int64_t>(kTogether, starts[e + 1] - first));
      const std::int64_t elements = count * hidden;
      const std::uint16_t* const in = rows + first * hidden;
      for (std::int64_t i = 0; i < elements; ++i) x[static_cast<std::size_t>(i)] = fromBf16(in[i]);
      if (shape_.inner == 0) {
        for (std::size_t i = 0; i < static_cast<std::size_t>(elements); ++i) y[i] = x[i] * scale;
      } else {
        std::fill(y.begin(), y.end(), 0.0f);
        for (int f = 0; f < shape_.inner; ++f) {
          const auto at = static_cast<std::size_t>((static_cast<std::int64_t>(e) * shape_.inner + f) * hidden);
          oneUnit(x.data(), y.data(), &in_[at], &out_[at], hidden, count);
        }
      }
      std::uint16_t* const out = results + first * hidden;
      for (std::int64_t i = 0; i < elements; ++i) out[i] = toBf16(y[static_cast<std::size_t>(i)]);
    }
  }
}

}  // namespace fusco::bench::moe
