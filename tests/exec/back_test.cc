#include <cmath>
#include <deque>

#include "base/status.h"
#include "cases.h"
#include "exec/host_numbers.h"

namespace fusco::exec {
namespace {

struct Outcome {
  std::deque<Memory> rows;
  std::vector<float> dots;
};

struct Back {
  Copies copies;
  std::deque<Memory> inputs;
  std::vector<float> weights;
  std::vector<const std::byte*> experts;
  std::size_t ranks = 0, elements = 0, skew = 0;
  bool missingRank = false;
  BackArgs args;
};

void fillNumbers(Memory& memory, std::size_t stride, std::size_t rows, std::size_t elements, RowType type,
                 std::mt19937& random) {
  std::uniform_real_distribution<float> value(-2, 2);
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t i = 0; i < elements; ++i) storeElement(memory.data() + r * stride, i, type, value(random));
}

void build(Back& back, std::mt19937& random, bool anyBits) {
  const RowType types[] = {RowType::bf16, RowType::f16, RowType::f32};
  const std::size_t tokens = 1 + random() % 6;
  back.ranks = 1 + random() % 3;
  back.elements = pick(random, {1, 7, 31, 33, 64, 500, 1000, 7168, random() % 600});
  back.copies = randomCopies(tokens, back.ranks, 8, random);
  back.skew = pick(random, {0, 0, 2, 1, 32});
  back.missingRank = random() % 4 == 0;
  BackArgs& args = back.args;
  args.type = types[random() % 3];
  PlaceArgs& place = args.place;
  place.rowBytes = back.elements * elementBytes(args.type);
  place.sourceStride = place.destinationStride = args.expertStride = place.rowBytes + pick(random, {0, 4});
  place.packed = random() % 2;
  place.skipDuplicates = random() % 2;
  place.streaming = random() % 3 != 0;
  place.copies = back.copies.copies.data();
  place.entries = back.copies.entries.data();
  place.end = tokens;
  auto input = [&](std::size_t rows) {
    Memory& memory = back.inputs.emplace_back(rows * place.sourceStride, 2 * random());
    if (anyBits)
      randomize(memory, random);
    else
      fillNumbers(memory, place.sourceStride, rows, back.elements, args.type, random);
    return memory.data();
  };
  place.source = input(tokens);
  for (std::size_t rank = 0; rank < back.ranks; ++rank) back.experts.push_back(input(back.copies.rowsPerRank));
  args.expertBases = back.experts.data();
  std::uniform_real_distribution<float> weight(-1, 1);
  for (std::size_t e = 0; e < back.copies.entries.size(); ++e) back.weights.push_back(weight(random));
  args.weights = random() % 4 == 0 ? nullptr : back.weights.data();
}

Outcome run(Executor& executor, const Back& back) {
  Outcome out;
  std::vector<std::byte*> bases;
  for (std::size_t rank = 0; rank < back.ranks; ++rank) {
    out.rows.emplace_back(back.copies.rowsPerRank * back.args.place.destinationStride, back.skew);
    bases.push_back(back.missingRank && rank == 0 ? nullptr : out.rows.back().data());
  }
  out.dots.assign(back.copies.entries.size() + 1, -77.0f);
  BackArgs args = back.args;
  args.place.bases = bases.data();
  args.dots = out.dots.data();
  executor.back(args);
  executor.fence();
  return out;
}

// Against float64: each row element one product and one rounding, each dot product within the bound of a FP32 sum.
TEST(Back, WithinTheBoundOfTheFloat64Oracle) {
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    Back back;
    build(back, random, false);
    const PlaceArgs& place = back.args.place;
    const double unit = back.args.type == RowType::bf16 ? 0x1p-8 : back.args.type == RowType::f16 ? 0x1p-11 : 0x1p-24;
    for (Executor* executor : executors()) {
      Outcome out = run(*executor, back);
      for (std::size_t c = 0; c < place.end; ++c)
        for (std::uint32_t e = place.copies[c].firstEntry; e < place.copies[c + 1].firstEntry; ++e) {
          const plan::Entry entry = place.entries[e];
          const std::byte* gradient = place.source + (place.packed ? c : place.copies[c].token) * place.sourceStride;
          const std::byte* expert = back.experts[entry.rank] + entry.row * back.args.expertStride;
          const std::byte* actual = out.rows[entry.rank].data() + entry.row * place.destinationStride;
          if (place.skipDuplicates && (entry.slot & plan::kDuplicate)) {
            ASSERT_EQ(out.dots[e], -77.0f);
            continue;
          }
          double exact = 0, size = 0;
          for (std::size_t i = 0; i < back.elements; ++i) {
            const double g = loadElement(gradient, i, back.args.type);
            exact += g * loadElement(expert, i, back.args.type);
            size += std::fabs(g * loadElement(expert, i, back.args.type));
            if (back.missingRank && entry.rank == 0) continue;
            const double scaled = g * (back.args.weights == nullptr ? 1.0f : back.weights[e]);
            ASSERT_LE(std::fabs(loadElement(actual, i, back.args.type) - scaled),
                      (unit + 0x1p-23) * std::fabs(scaled) + 0x1p-24)
                << executor->name() << " seed " << seed << " element " << i;
          }
          ASSERT_LE(std::fabs(out.dots[e] - exact), (back.elements / 32 + 8) * 0x1p-24 * size)
              << executor->name() << " seed " << seed << " entry " << e;
        }
      ASSERT_EQ(out.dots.back(), -77.0f);
    }
  }
}

TEST(Back, EveryExecutorGivesTheSameBits) {
  for (std::uint32_t seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    Back back;
    build(back, random, seed % 2 == 0);
    const Outcome expected = run(*executors()[0], back);
    for (Executor* executor : executors()) {
      const Outcome out = run(*executor, back);
      ASSERT_EQ(std::memcmp(out.dots.data(), expected.dots.data(), out.dots.size() * sizeof(float)), 0)
          << executor->name() << " seed " << seed;
      for (std::size_t rank = 0; rank < back.ranks; ++rank) {
        ASSERT_TRUE(out.rows[rank].sameAs(expected.rows[rank])) << executor->name() << " seed " << seed;
        ASSERT_TRUE(out.rows[rank].marginsIntact()) << executor->name() << " seed " << seed;
      }
    }
  }
}

TEST(Back, RefusesHalfElementsAndBytes) {
  BackArgs args;
  args.place.rowBytes = 3;
  for (Executor* executor : executors()) EXPECT_THROW(executor->back(args), Error) << executor->name();
  args.type = RowType::bytes;
  for (Executor* executor : executors()) EXPECT_THROW(executor->back(args), Error) << executor->name();
}

}  // namespace
}  // namespace fusco::exec
