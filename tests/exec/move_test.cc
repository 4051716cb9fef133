#include "cases.h"

namespace fusco::exec {
namespace {

std::vector<std::int64_t> shuffled(std::size_t rows, std::mt19937& random) {
  std::vector<std::int64_t> list(rows);
  for (std::size_t i = 0; i < rows; ++i) list[i] = static_cast<std::int64_t>(i);
  std::shuffle(list.begin(), list.end(), random);
  return list;
}

TEST(Move, ListsOnBothSidesAreExact) {
  for (std::uint32_t seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    MoveArgs args;
    args.rows = random() % 20;
    args.rowBytes = pick(random, {0, 1, 7, 64, 1000, 4096, 14336, random() % 2000});
    args.sourceStride = args.rowBytes + pick(random, {0, 0, 3});
    args.destinationStride = args.rowBytes + pick(random, {0, 0, 5, 64});
    args.streaming = random() % 2;
    const auto from = shuffled(args.rows, random), to = shuffled(args.rows, random);
    args.sourceRows = random() % 2 ? from.data() : nullptr;
    args.destinationRows = random() % 2 ? to.data() : nullptr;
    Memory source(args.rows * args.sourceStride, random() % 64);
    randomize(source, random);
    args.source = source.data();
    const std::size_t skew = random() % 64;
    Memory expected(args.rows * args.destinationStride, skew);
    for (std::size_t i = 0; i < args.rows; ++i)
      for (std::size_t b = 0; b < args.rowBytes; ++b)
        expected.data()[(args.destinationRows ? to[i] : i) * args.destinationStride + b] =
            source.data()[(args.sourceRows ? from[i] : i) * args.sourceStride + b];
    for (Executor* executor : executors()) {
      Memory out(args.rows * args.destinationStride, skew);
      args.destination = out.data();
      executor->move(args);
      executor->fence();
      ASSERT_TRUE(out.sameAs(expected)) << executor->name() << " seed " << seed;
      ASSERT_TRUE(out.marginsIntact()) << executor->name() << " seed " << seed;
    }
  }
}

TEST(Fill, ZerosExactlyTheBytesAsked) {
  for (Executor* executor : executors())
    for (std::size_t bytes : {0, 1, 7, 64, 1000, 100000, (1 << 20) + 77, 3 << 20})
      for (std::size_t skew : {0, 1, 33}) {
        Memory out(bytes, skew);
        executor->fill(out.data(), bytes);
        executor->fence();
        ASSERT_EQ(std::count(out.data(), out.data() + bytes, std::byte{0}), static_cast<std::ptrdiff_t>(bytes));
        ASSERT_TRUE(out.marginsIntact()) << executor->name() << " bytes " << bytes;
      }
}

TEST(HostExecutor, TheBestIsOneOfThoseTested) {
  EXPECT_EQ(&hostExecutor(), executors().back());
  EXPECT_STREQ(hostExecutor("scalar")->name(), "scalar");
  EXPECT_EQ(hostExecutor("no such executor"), nullptr);
}

}  // namespace
}  // namespace fusco::exec
