#include <cmath>
#include <deque>
#include <limits>

#include "base/status.h"
#include "cases.h"
#include "exec/host_numbers.h"

namespace fusco::exec {
namespace {

constexpr RowType kTypes[] = {RowType::bf16, RowType::f16, RowType::f32};

struct Sum {
  std::vector<std::vector<std::byte>> rows;  // what terms and biases point into
  std::vector<Term> terms;
  std::vector<std::uint32_t> first{0};
  std::vector<const std::byte*> bias;
  SumArgs args;
};

const std::byte* addRow(Sum& sum, std::size_t elements, RowType type, std::mt19937& random, bool anyBits) {
  std::uniform_real_distribution<float> value(-4, 4);
  std::vector<std::byte> row(elements * elementBytes(type) + 2);
  std::byte* begin = row.data() + (random() % 2 == 0 ? 0 : 2);
  for (std::size_t i = 0; i < elements; ++i) storeElement(begin, i, type, value(random));
  if (anyBits)
    for (std::size_t i = 0; i < elements * elementBytes(type); ++i) begin[i] = static_cast<std::byte>(random());
  const std::size_t offset = static_cast<std::size_t>(begin - row.data());
  sum.rows.push_back(std::move(row));
  return sum.rows.back().data() + offset;
}

Sum randomSum(std::mt19937& random, bool anyBits) {
  Sum sum;
  std::uniform_real_distribution<float> weight(-1, 1);
  sum.args.elements = pick(random, {1, 3, 7, 31, 64, 128, 500, 1000, 7168, random() % 700});
  sum.args.rows = 1 + random() % 5;
  sum.args.outType = kTypes[random() % 3];
  sum.args.streaming = random() % 3 != 0;
  const bool mixed = random() % 2;
  for (std::size_t r = 0; r < sum.args.rows; ++r) {
    const std::size_t count = pick(random, {0, 1, 2, 8, 8, 11});
    for (std::size_t t = 0; t < count; ++t) {
      const RowType type = mixed ? kTypes[random() % 3] : sum.args.outType;
      const float w = random() % 8 == 0 ? 1.0f : weight(random);
      sum.terms.push_back({addRow(sum, sum.args.elements, type, random, anyBits), w, type});
    }
    sum.first.push_back(static_cast<std::uint32_t>(sum.terms.size()));
    sum.bias.push_back(random() % 2 ? addRow(sum, sum.args.elements, sum.args.outType, random, anyBits) : nullptr);
  }
  if (random() % 2) sum.args.bias = sum.bias.data();
  sum.args.terms = sum.terms.data();
  sum.args.first = sum.first.data();
  return sum;
}

// Unit roundoff of the result, and the smallest step of the type (for results in its subnormal range).
double roundoff(RowType type) { return type == RowType::bf16 ? 0x1p-8 : type == RowType::f16 ? 0x1p-11 : 0x1p-24; }
double smallestStep(RowType type) {
  return type == RowType::bf16 ? 0x1p-133 : type == RowType::f16 ? 0x1p-24 : 0x1p-149;
}

std::deque<Memory> run(Executor& executor, SumArgs args, std::size_t skew) {
  std::deque<Memory> out;
  std::vector<std::byte*> rows;
  for (std::size_t r = 0; r < args.rows; ++r) {
    out.emplace_back(args.elements * elementBytes(args.outType), skew + 2 * r);
    rows.push_back(out.back().data());
  }
  args.out = rows.data();
  executor.sum(args);
  executor.fence();
  return out;
}

void sameForAll(const Sum& sum, std::size_t skew, std::uint32_t seed) {
  const auto expected = run(*executors()[0], sum.args, skew);
  for (Executor* executor : executors()) {
    const auto out = run(*executor, sum.args, skew);
    for (std::size_t r = 0; r < sum.args.rows; ++r) {
      ASSERT_TRUE(out[r].sameAs(expected[r])) << executor->name() << " seed " << seed << " row " << r;
      ASSERT_TRUE(out[r].marginsIntact()) << executor->name() << " seed " << seed << " row " << r;
    }
  }
}

TEST(Sum, WithinTheBoundOfTheFloat64Oracle) {
  for (std::uint32_t seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const Sum sum = randomSum(random, false);
    const SumArgs& args = sum.args;
    for (Executor* executor : executors()) {
      auto out = run(*executor, args, pick(random, {0, 2, 32, 1}));
      for (std::size_t r = 0; r < args.rows; ++r)
        for (std::size_t i = 0; i < args.elements; ++i) {
          double exact = 0, size = 0;
          if (args.bias != nullptr && args.bias[r] != nullptr) {
            exact = loadElement(args.bias[r], i, args.outType);
            size = std::fabs(exact);
          }
          for (std::uint32_t t = args.first[r]; t < args.first[r + 1]; ++t) {
            const double product =
                static_cast<double>(args.terms[t].weight) * loadElement(args.terms[t].row, i, args.terms[t].type);
            exact += product;
            size += std::fabs(product);
          }
          const double slack = (args.first[r + 1] - args.first[r] + 1) * 0x1p-24;
          const double bound = (roundoff(args.outType) + slack) * size * (1 + slack) + smallestStep(args.outType);
          ASSERT_LE(std::fabs(loadElement(out[r].data(), i, args.outType) - exact), bound)
              << executor->name() << " seed " << seed << " row " << r << " element " << i;
        }
    }
  }
}

TEST(Sum, EveryExecutorGivesTheSameBits) {
  for (std::uint32_t seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    sameForAll(randomSum(random, false), random() % 64, seed);
    if (HasFatalFailure()) return;
  }
}

TEST(Sum, TheSameBitsForAnyInputWithInfinitiesAndNan) {
  for (std::uint32_t seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    sameForAll(randomSum(random, true), random() % 64, seed);
    if (HasFatalFailure()) return;
  }
}

// One term of weight 1 converts: all 65,536 values of a narrow type to each type, NaN to NaN.
TEST(Sum, ConvertsEveryNarrowValue) {
  std::vector<std::uint16_t> in(65536);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::uint16_t>(i);
  for (RowType from : {RowType::bf16, RowType::f16})
    for (RowType to : kTypes) {
      const Term term{in.data(), 1.0f, from};
      const std::uint32_t first[] = {0, 1};
      SumArgs args;
      args.terms = &term;
      args.first = first;
      args.rows = 1;
      args.elements = in.size();
      args.outType = to;
      for (Executor* executor : executors()) {
        auto out = run(*executor, args, 0);
        for (std::size_t i = 0; i < in.size(); ++i) {
          const float expected = loadElement(in.data(), i, from);
          const float actual = loadElement(out[0].data(), i, to);
          if (std::isnan(expected)) {
            ASSERT_TRUE(std::isnan(actual)) << executor->name() << " value " << i;
          } else if (from == to || to == RowType::f32) {
            ASSERT_EQ(actual, expected) << executor->name() << " value " << i;
          }
        }
      }
    }
}

// Ties go to the even neighbour: 1 + n/512 in BF16, whose step at 1 is 1/128, and 1 + n/4096 in FP16.
TEST(Sum, RoundsTiesToEven) {
  for (Executor* executor : executors())
    for (RowType type : {RowType::bf16, RowType::f16}) {
      const float step = type == RowType::bf16 ? 0x1p-7f : 0x1p-10f;
      std::vector<float> in(256);
      for (std::size_t i = 0; i < in.size(); ++i) in[i] = 1.0f + static_cast<float>(i) * step / 4;
      const Term term{in.data(), 1.0f, RowType::f32};
      const std::uint32_t first[] = {0, 1};
      SumArgs args;
      args.terms = &term;
      args.first = first;
      args.rows = 1;
      args.elements = in.size();
      args.outType = type;
      auto out = run(*executor, args, 0);
      for (std::size_t i = 0; i < in.size(); ++i) {
        const std::size_t quarters = i % 4, down = i / 4;
        const std::size_t steps = quarters < 2 ? down : quarters > 2 ? down + 1 : down + down % 2;
        ASSERT_EQ(loadElement(out[0].data(), i, type), 1.0f + static_cast<float>(steps) * step)
            << executor->name() << " quarters " << i;
      }
    }
}

TEST(Sum, NoTermsAndNoBiasGiveZeros) {
  const std::uint32_t first[] = {0, 0};
  SumArgs args;
  args.first = first;
  args.rows = 1;
  args.elements = 1000;
  for (Executor* executor : executors()) {
    auto out = run(*executor, args, 0);
    EXPECT_EQ(std::count(out[0].data(), out[0].data() + out[0].size(), std::byte{0}), 2000) << executor->name();
  }
}

TEST(Sum, RefusesRowsThatAreNoNumbers) {
  const std::uint32_t first[] = {0, 1};
  const std::uint16_t row[4] = {};
  std::uint16_t result[4];
  std::byte* out = reinterpret_cast<std::byte*>(result);
  const Term term{row, 1.0f, RowType::bytes};
  SumArgs args;
  args.out = &out;
  args.terms = &term;
  args.first = first;
  args.rows = 1;
  args.elements = 4;
  for (Executor* executor : executors()) EXPECT_THROW(executor->sum(args), Error) << executor->name();
  args.outType = RowType::bytes;
  args.rows = 0;
  for (Executor* executor : executors()) EXPECT_THROW(executor->sum(args), Error) << executor->name();
}

}  // namespace
}  // namespace fusco::exec
