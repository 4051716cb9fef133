#include "base/clock.h"

#include <gtest/gtest.h>

namespace fusco {
namespace {

TEST(Clock, NeverGoesBack) {
  std::int64_t last = nowNs();
  for (int i = 0; i < 1000; ++i) {
    const std::int64_t now = nowNs();
    ASSERT_GE(now, last);
    last = now;
  }
}

TEST(Deadline, NeverHasNoEnd) {
  const Deadline never = Deadline::never();
  EXPECT_TRUE(never.isNever());
  EXPECT_FALSE(never.passed());
  EXPECT_EQ(never.leftMs(), -1);
  EXPECT_EQ(never.leftNs(), Deadline::kNever);
}

TEST(Deadline, ZeroMillisecondsMeansNoLimit) {
  EXPECT_TRUE(Deadline::afterMs(0).isNever());
  EXPECT_TRUE(Deadline::afterMs(-1).isNever());
}

TEST(Deadline, HugeTimesDoNotOverflow) {
  EXPECT_TRUE(Deadline::afterNs(INT64_MAX).isNever());
  EXPECT_TRUE(Deadline::afterMs(INT64_MAX).isNever());
}

TEST(Deadline, PassesAndThenHasNothingLeft) {
  const Deadline past = Deadline::afterNs(0);
  EXPECT_TRUE(past.passed());
  EXPECT_EQ(past.leftNs(), 0);
  EXPECT_EQ(past.leftMs(), 0);
  const Deadline later = Deadline::afterMs(60'000);
  EXPECT_FALSE(later.passed());
  EXPECT_GT(later.leftMs(), 50'000);
  EXPECT_LE(later.leftMs(), 60'000);
}

TEST(Deadline, EarlierOfTwo) {
  EXPECT_TRUE(Deadline::never().earlier(Deadline::afterNs(0)).passed());
  EXPECT_FALSE(Deadline::never().earlier(Deadline::never()).passed());
}

}  // namespace
}  // namespace fusco
