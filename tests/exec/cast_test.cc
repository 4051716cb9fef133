#include <cmath>
#include <deque>

#include "base/status.h"
#include "cases.h"
#include "exec/host_numbers.h"

namespace fusco::exec {
namespace {

double e4m3Value(std::byte code) {
  const int bits = static_cast<int>(code), exponent = (bits >> 3) & 15, mantissa = bits & 7;
  if ((bits & 0x7f) == 0x7f) return std::nan("");
  const double size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return bits & 0x80 ? -size : size;
}

struct Cast {
  Copies copies;
  std::deque<Memory> source;
  std::size_t ranks = 0, skew = 0;
  CastArgs args;
};

struct Outcome {
  std::deque<Memory> rows, scales;
};

void build(Cast& cast, std::mt19937& random, bool anyBits) {
  const std::size_t tokens = 1 + random() % 5;
  cast.ranks = 1 + random() % 3;
  cast.copies = randomCopies(tokens, cast.ranks, 8, random);
  cast.skew = pick(random, {0, 0, 1, 16});
  CastArgs& args = cast.args;
  args.elements = pick(random, {0, 128, 384, 1024, 7168, 8192, 8320});
  args.scaleStride = args.elements / kScaleGroup * sizeof(float) + pick(random, {0, 4});
  PlaceArgs& place = args.place;
  place.sourceStride = 2 * args.elements + pick(random, {0, 2, 64});
  place.destinationStride = args.elements + pick(random, {0, 1, 64});
  place.packed = random() % 2;
  place.skipDuplicates = random() % 2;
  place.streaming = random() % 3 != 0;
  place.copies = cast.copies.copies.data();
  place.entries = cast.copies.entries.data();
  place.end = tokens;
  Memory& source = cast.source.emplace_back(tokens * place.sourceStride, 2 * random());
  randomize(source, random);
  std::uniform_real_distribution<float> value(-1, 1);
  if (!anyBits)
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t i = 0; i < args.elements; ++i) {
        const float size =
            std::ldexp(1.0f, static_cast<int>((i / kScaleGroup) % 40) - 25);  // some groups below the floor
        storeElement(source.data() + t * place.sourceStride, i, RowType::bf16, value(random) * size);
      }
  place.source = source.data();
}

Outcome run(Executor& executor, const Cast& cast) {
  Outcome out;
  std::vector<std::byte*> bases, scales;
  for (std::size_t rank = 0; rank < cast.ranks; ++rank) {
    bases.push_back(
        out.rows.emplace_back(cast.copies.rowsPerRank * cast.args.place.destinationStride, cast.skew).data());
    scales.push_back(out.scales.emplace_back(cast.copies.rowsPerRank * cast.args.scaleStride, 4 * cast.skew).data());
  }
  CastArgs args = cast.args;
  args.place.bases = bases.data();
  args.scaleBases = scales.data();
  executor.cast(args);
  executor.fence();
  return out;
}

// Code times scale is within half a step of the element: 1/16 of it, or half of the smallest step.
TEST(Cast, CodesTimesScalesGiveTheRowsBack) {
  for (std::uint32_t seed = 0; seed < 120; ++seed) {
    std::mt19937 random(seed);
    Cast cast;
    build(cast, random, false);
    const PlaceArgs& place = cast.args.place;
    for (Executor* executor : executors()) {
      Outcome out = run(*executor, cast);
      for (std::size_t c = 0; c < place.end; ++c)
        for (std::uint32_t e = place.copies[c].firstEntry; e < place.copies[c + 1].firstEntry; ++e) {
          const plan::Entry entry = place.entries[e];
          if (place.skipDuplicates && (entry.slot & plan::kDuplicate)) continue;
          const std::byte* row = place.source + (place.packed ? c : place.copies[c].token) * place.sourceStride;
          const std::byte* codes = out.rows[entry.rank].data() + entry.row * place.destinationStride;
          const std::byte* scales = out.scales[entry.rank].data() + entry.row * cast.args.scaleStride;
          for (std::size_t group = 0; group < cast.args.elements / kScaleGroup; ++group) {
            float largest = 1e-4f;
            for (std::size_t i = 0; i < kScaleGroup; ++i)
              largest = std::max(largest, std::fabs(loadElement(row, group * kScaleGroup + i, RowType::bf16)));
            const float scale = loadElement(scales, group, RowType::f32);
            ASSERT_EQ(scale, largest / 448.0f) << executor->name() << " seed " << seed << " group " << group;
            for (std::size_t i = group * kScaleGroup; i < (group + 1) * kScaleGroup; ++i) {
              const double x = loadElement(row, i, RowType::bf16), value = e4m3Value(codes[i]) * scale;
              ASSERT_LE(std::fabs(value - x), std::max(std::fabs(x) / 16, scale * 0x1p-10) * (1 + 1e-6))
                  << executor->name() << " seed " << seed << " element " << i;
            }
          }
        }
    }
  }
}

TEST(Cast, EveryExecutorGivesTheSameBitsAndOnlyThere) {
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    Cast cast;
    build(cast, random, seed % 2 == 0);
    const Outcome expected = run(*executors()[0], cast);
    for (Executor* executor : executors()) {
      const Outcome out = run(*executor, cast);
      for (std::size_t rank = 0; rank < cast.ranks; ++rank) {
        ASSERT_TRUE(out.rows[rank].sameAs(expected.rows[rank])) << executor->name() << " seed " << seed;
        ASSERT_TRUE(out.scales[rank].sameAs(expected.scales[rank])) << executor->name() << " seed " << seed;
        ASSERT_TRUE(out.rows[rank].marginsIntact() && out.scales[rank].marginsIntact()) << executor->name();
      }
    }
  }
}

TEST(Cast, NanStaysAndInfinitySaturates) {
  std::uint16_t row[kScaleGroup] = {};
  row[0] = 0x7fc0;  // NaN
  row[1] = 0x7f80;  // infinity
  row[2] = 0xff80;
  row[3] = 0x4000;  // 2, the largest finite element
  const plan::Copy copies[] = {{0, 0}, {0, 1}};
  const plan::Entry entry{0, 0, 0};
  for (Executor* executor : executors()) {
    std::byte codes[kScaleGroup];
    float scale = 0;
    std::byte* bases[] = {codes};
    std::byte* scaleBases[] = {reinterpret_cast<std::byte*>(&scale)};
    CastArgs args;
    args.place = {.source = reinterpret_cast<const std::byte*>(row),
                  .copies = copies,
                  .entries = &entry,
                  .begin = 0,
                  .end = 1,
                  .bases = bases};
    args.elements = kScaleGroup;
    args.scaleBases = scaleBases;
    executor->cast(args);
    EXPECT_EQ(codes[0], std::byte{0x7f}) << executor->name();
    EXPECT_EQ(codes[1], std::byte{0x7e}) << executor->name();
    EXPECT_EQ(codes[2], std::byte{0xfe}) << executor->name();
    EXPECT_EQ(codes[3], std::byte{0x7e}) << executor->name();
    EXPECT_EQ(codes[4], std::byte{0}) << executor->name();
    EXPECT_EQ(scale, 2.0f / 448.0f) << executor->name();
  }
}

TEST(Cast, RefusesRowsThatAreNoWholeGroups) {
  CastArgs args;
  args.elements = 130;
  for (Executor* executor : executors()) EXPECT_THROW(executor->cast(args), Error) << executor->name();
}

}  // namespace
}  // namespace fusco::exec
