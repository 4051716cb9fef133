#include "shuffle/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "shuffle/measure.h"

namespace fusco::bench {
namespace {

ParsedOptions parse(std::vector<std::string> words) {
  words.insert(words.begin(), "shuffle_perf");
  return parseOptions(words);
}

TEST(Options, Defaults) {
  ParsedOptions parsed = parse({});
  ASSERT_FALSE(parsed.leave);
  EXPECT_EQ(parsed.options.ranks, 2);
  EXPECT_EQ(parsed.options.hidden, 7168);
  EXPECT_EQ(casesOf(parsed.options).size(), 2u);
}

TEST(Options, SweepsMultiply) {
  Options o = parse({"--tokens", "128:1K:2", "--op", "dispatch,sendrecv", "-b", "1M", "-e", "16M", "-f", "4"}).options;
  EXPECT_THAT(valuesOf(o.tokens), testing::ElementsAre(128, 256, 512, 1024));
  EXPECT_THAT(valuesOf(o.bytes), testing::ElementsAre(1 << 20, 4 << 20, 16 << 20));
  EXPECT_EQ(casesOf(o).size(), 7u);
  EXPECT_EQ(parse({"-b", "1G"}).options.bytes.to, 1 << 30);
  EXPECT_THAT(valuesOf(parse({"--tokens", "0:2:2"}).options.tokens), testing::ElementsAre(0, 1, 2));
}

TEST(Options, RefusesWhatItDoesNotKnow) {
  for (std::vector<std::string> words :
       std::vector<std::vector<std::string>>{{"--op", "nonsense"},
                                             {"--dtype", "int13"},
                                             {"--dtype", "uint8"},
                                             {"--tokens", "8:4"},
                                             {"--tokens", "x"},
                                             {"--impl", "nccl"},
                                             {"--ranks", "2", "--nodes", "3"},
                                             {"--threads", "--processes"},
                                             {"--memory", "disk"},
                                             {"-e", "1M", "-b", "2M"},
                                             {"--sms", "8"},
                                             {"--graph"},
                                             {"--corrupt", "fusko"},
                                             {"--impl", "fusco", "--corrupt", "mpi-alltoallv"},
                                             {"--device", "cuda", "--op", "alltoallv"},
                                             {"--device", "cuda", "--impl", "mpi-alltoallv"},
                                             {"--device", "cuda", "--processes", "--scales"},
                                             {"--device", "cuda", "--nodes", "2"},
                                             {"--device", "cuda", "--sms", "many"},
                                             {"--such"}}) {
    ParsedOptions parsed = parse(words);
    EXPECT_TRUE(parsed.leave) << words[0];
    EXPECT_EQ(parsed.exitCode, 2) << words[0];
  }
}

TEST(Options, GpusHaveTheirOwn) {
  const Options o = parse({"--device", "cuda", "--sms", "8,0", "--tokens", "1:4:4", "--op", "dispatch"}).options;
  EXPECT_THAT(o.impls, testing::ElementsAre("fusco", "staged", "nccl"));
  EXPECT_EQ(o.kind, RankKind::threads);
  std::vector<std::pair<std::int64_t, int>> seen;
  for (const Case& which : casesOf(o)) seen.emplace_back(which.tokens, which.sms);
  EXPECT_THAT(seen,
              testing::ElementsAre(testing::Pair(1, 8), testing::Pair(1, 0), testing::Pair(4, 8), testing::Pair(4, 0)));
  EXPECT_EQ(parse({"--device", "cuda", "--processes"}).options.kind, RankKind::processes);
  EXPECT_THAT(parse({"--device", "cuda", "--impl", "limit"}).options.impls, testing::ElementsAre("limit"));
  EXPECT_EQ(parse({}).options.kind, RankKind::processes);
}

TEST(Options, HelpNamesEveryFlag) {
  testing::internal::CaptureStdout();
  ParsedOptions parsed = parse({"--help"});
  std::string text = testing::internal::GetCapturedStdout();
  EXPECT_TRUE(parsed.leave);
  EXPECT_EQ(parsed.exitCode, 0);
  for (const char* flag :
       {"-w",       "-n",        "-c",      "-J",     "-b",        "-e",      "-f",       "--ranks", "--nodes",
        "--tokens", "--hidden",  "--dtype", "--topk", "--experts", "--op",    "--memory", "--impl",  "--routing",
        "--device", "--balance", "--dedup", "--gpus", "--sms",     "--graph", "--scales"})
    EXPECT_THAT(text, testing::HasSubstr(flag));
}

TEST(Measure, Percentiles) {
  EXPECT_DOUBLE_EQ(percentile({3, 1, 2}, 0.5), 2);
  EXPECT_DOUBLE_EQ(percentile({1, 2, 3, 4}, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(percentile({5}, 0.99), 5);
  EXPECT_DOUBLE_EQ(percentile({}, 0.5), 0);
}

TEST(Measure, BytesOfTheBusiestRankAndTheirRemoteShare) {
  Options o = parse({"--ranks", "4", "--tokens", "100", "--hidden", "8", "--op", "dispatch,combine,alltoallv"}).options;
  RoutingSource source = makeRoutingSource(o);
  for (const Case& which : casesOf(o)) {
    CaseContext context = makeCase(o, isShuffle(which.op) ? &source : nullptr, which, 0);
    CaseSize size = sizeOf(context, o.impls);
    if (which.op == Op::dispatch) {
      EXPECT_EQ(size.bytes, context.map.busiestRows() * 16);
    } else if (which.op == Op::combine) {
      EXPECT_EQ(size.bytes, 100 * 8 * 16);
    }
    EXPECT_NEAR(size.remoteShare, 0.75, 0.1) << nameOf(which.op);
  }
}

}  // namespace
}  // namespace fusco::bench
