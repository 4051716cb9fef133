// Many ranks start, shuffle exactly and stop (bench/start).
#include <gtest/gtest.h>

#include "bench/program.h"

namespace {

constexpr int kCannot = 77;

TEST(Start, OnHostsThatAreMadeUp) {
  const Said said = say(START_PERF " --nodes 2 --ranks-per-node 2 --rounds 2 --timeout 60");
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_NE(said.text.find("| 4 | 2 x 2 |"), std::string::npos) << said.text;
}

TEST(Start, SixtyFourRanksOnEightNodes) {
  const Said said = say(CLUSTER " --nodes 8 --ranks-per-node 8 --timeout 110 -- " START_PERF
                                " --nodes 8 --ranks-per-node 8 --rounds 1 --timeout 100");
  if (said.code == kCannot) GTEST_SKIP() << said.text;
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_NE(said.text.find("| 64 | 8 x 8 |"), std::string::npos) << said.text;
}

}  // namespace
