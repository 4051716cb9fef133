// Faults of the network itself, in an emulated cluster (bench/cluster): each case has a lane of its own, whose cable it
// pulls or makes slow.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "fault/choose.h"

namespace fusco::fault {
namespace {

// Runs this test again inside of a cluster. True: this is the inside.
bool inCluster(int lanes) {
  if (std::getenv("CLUSTER_NETNS") != nullptr) return true;
  const ::testing::TestInfo& test = *::testing::UnitTest::GetInstance()->current_test_info();
  std::string command(CLUSTER);
  command += " --nodes 4 --ranks-per-node 2 --lanes " + std::to_string(lanes) + " --timeout 200 -- ";
  command.append(TEST_FAULT).append(" --gtest_filter=").append(test.test_suite_name()).append(".").append(test.name());
  command += " 2>&1";
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) {
    ADD_FAILURE() << "cannot start " << command;
    return false;
  }
  std::string said;
  char buffer[4096];
  for (std::size_t got; (got = std::fread(buffer, 1, sizeof(buffer), pipe)) > 0;) said.append(buffer, got);
  const int status = ::pclose(pipe);
  constexpr int kCannot = 77;
  if (WIFEXITED(status) && WEXITSTATUS(status) == kCannot) {
    [&] { GTEST_SKIP() << said; }();
    return false;
  }
  std::fputs(said.c_str(), stdout);
  EXPECT_EQ(status, 0) << "in the cluster the test has failed";
  return false;
}

std::vector<FaultCase> onLanes(std::vector<FaultCase> cases) {
  int lane = 0;
  for (FaultCase& one : cases) one.place = {std::getenv("CLUSTER_NETNS"), lane++};
  return cases;
}

// An error in time.
TEST(Links, Cut) {
  if (!inCluster(12)) return;
  std::vector<FaultCase> cases;
  for (const Layout& layout : {kTwo, kFour}) {
    for (FaultCase one : eachPhase(Fault::cut, layout, 10000)) {
      if (one.phase == "bootstrap") atAnotherMachine(one);
      cases.push_back(one);
    }
  }
  runCases("cut", onLanes(cases), 3 * kRanksAtOnce);
}

// Slow is not broken: all succeeds, and who sends rows by that cable says that it is slow. In destroy nothing goes any
// more that would take seconds.
TEST(Links, Slow) {
  if (!inCluster(12)) return;
  std::vector<FaultCase> cases;
  for (const Layout& layout : {kTwo, kFour}) {
    for (FaultCase one : eachPhase(Fault::slow, layout, 0)) {
      // At its later moments what a combine sends is on its way.
      if (one.phase == "combine") one.number = -1;
      cases.push_back(one);
    }
  }
  runCases("slow", onLanes(cases), 3 * kRanksAtOnce, [](const FaultCase& one, const Outcome& outcome) {
    if (one.phase == "destroy") return;
    EXPECT_NE(outcome.said.find(" slowly: "), std::string::npos) << one.describe() << ": " << outcome.said;
  });
}

}  // namespace
}  // namespace fusco::fault
