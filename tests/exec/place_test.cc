#include <deque>

#include "cases.h"

namespace fusco::exec {
namespace {

struct Case {
  std::size_t rowBytes, stride, sourceStride, skew, ranks, mostEntries, tokens;
  bool packed, skipDuplicates, streaming, sameSkew, missingRank;
};

// Places by the definition, one byte at a time.
void naivePlace(const PlaceArgs& args) {
  for (std::size_t c = args.begin; c < args.end; ++c)
    for (std::uint32_t e = args.copies[c].firstEntry; e < args.copies[c + 1].firstEntry; ++e) {
      const plan::Entry entry = args.entries[e];
      if (args.skipDuplicates && (entry.slot & plan::kDuplicate)) continue;
      if (args.bases[entry.rank] == nullptr) continue;
      const std::size_t row = args.packed ? c - args.begin : args.copies[c].token;
      for (std::size_t i = 0; i < args.rowBytes; ++i)
        args.bases[entry.rank][entry.row * args.destinationStride + i] = args.source[row * args.sourceStride + i];
    }
}

void check(const Case& shape, std::mt19937& random) {
  const Copies copies = randomCopies(shape.tokens, shape.ranks, shape.mostEntries, random);
  Memory source(shape.tokens * shape.sourceStride, random() % 64);
  randomize(source, random);
  PlaceArgs args;
  args.source = source.data();
  args.sourceStride = shape.sourceStride;
  args.packed = shape.packed;
  args.copies = copies.copies.data();
  args.entries = copies.entries.data();
  args.begin = random() % shape.tokens;
  args.end = shape.tokens - random() % (shape.tokens - args.begin + 1);
  args.destinationStride = shape.stride;
  args.rowBytes = shape.rowBytes;
  args.skipDuplicates = shape.skipDuplicates;
  args.streaming = shape.streaming;

  auto run = [&](auto place, std::deque<Memory>& out) {
    std::vector<std::byte*> bases;
    for (std::size_t rank = 0; rank < shape.ranks; ++rank) {
      out.emplace_back(copies.rowsPerRank * shape.stride + 1, shape.skew + (shape.sameSkew ? 0 : 13 * rank));
      bases.push_back(shape.missingRank && rank == 0 ? nullptr : out.back().data());
    }
    args.bases = bases.data();
    place(args);
  };
  std::deque<Memory> expected;
  run(naivePlace, expected);
  for (Executor* executor : executors()) {
    std::deque<Memory> out;
    run(
        [&](const PlaceArgs& a) {
          executor->place(a);
          executor->fence();
        },
        out);
    for (std::size_t rank = 0; rank < shape.ranks; ++rank) {
      ASSERT_TRUE(out[rank].sameAs(expected[rank])) << executor->name() << " rank " << rank;
      ASSERT_TRUE(out[rank].marginsIntact()) << executor->name() << " rank " << rank;
    }
  }
}

TEST(Place, RandomShapesAreExact) {
  for (std::uint32_t seed = 0; seed < 600; ++seed) {
    std::mt19937 random(seed);
    Case shape{};
    shape.rowBytes =
        pick(random, {0, 1, 7, 63, 64, 65, 511, 512, 513, 1000, 1024, 4096, 7168, 14336, 33000, random() % 3000});
    shape.stride = shape.rowBytes + pick(random, {0, 0, 1, 48, 64});
    shape.sourceStride = shape.rowBytes + pick(random, {0, 0, 2, 64});
    shape.skew = pick(random, {0, 0, 1, 16, 32, 63});
    shape.ranks = 1 + random() % 5;
    shape.mostEntries = pick(random, {1, 2, 8, 10});
    shape.tokens = 1 + random() % 12;
    shape.packed = random() % 2;
    shape.skipDuplicates = random() % 2;
    shape.streaming = random() % 4 != 0;
    shape.sameSkew = random() % 2;
    shape.missingRank = random() % 4 == 0;
    SCOPED_TRACE("seed " + std::to_string(seed) + ", row bytes " + std::to_string(shape.rowBytes));
    check(shape, random);
    if (HasFatalFailure()) return;
  }
}

TEST(Place, MorePlacesThanAreWrittenTogether) {
  std::mt19937 random(1);
  for (std::size_t rowBytes : {100, 2048})
    check({rowBytes, rowBytes, rowBytes, 0, 3, 300, 4, false, false, true, true, false}, random);
}

TEST(Place, RowsLargerThanTheFirstLevelCache) {
  std::mt19937 random(2);
  for (bool sameSkew : {true, false})
    check({1 << 20, 1 << 20, 1 << 20, 8, 2, 3, 3, false, false, true, sameSkew, false}, random);
}

TEST(Place, AnEmptyRangeWritesNothing) {
  const plan::Copy end{0, 0};
  PlaceArgs args;
  args.copies = &end;
  args.rowBytes = 64;
  for (Executor* executor : executors()) EXPECT_NO_THROW(executor->place(args)) << executor->name();
}

}  // namespace
}  // namespace fusco::exec
