// Device mode in front of a double of libnccl, on host memory (on_host.cc): which communicators are carried, and that
// what is carried arrives.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "nccl/run.h"

namespace fusco::test {
namespace {

using testing::HasSubstr;
using testing::Not;

std::string expectWell(const std::string& arguments, const std::string& settings = "") {
  const Result result =
      run("FUSCO_STATS=1 FUSCO_TEST_NO_COLLECTIVES=1 FUSCO_NCCL_LIB=" FUSCO_NCCL_DOUBLE " " + settings,
          FUSCO_NCCL_PROGRAMS "/nccl_program_on_host " + arguments);
  EXPECT_EQ(result.status, 0) << arguments << "\n" << result.output;
  return result.output;
}

long sumOf(const std::string& output, const std::string& words) {
  long calls = 0;
  for (std::size_t at = 0; (at = output.find(words, at)) != std::string::npos;)
    calls += std::strtol(output.c_str() + (at += words.size()), nullptr, 10);
  return calls;
}

TEST(Device, CarriesCommunicatorsHoweverTheyCome) {
  for (const char* ranks : {"2", "4"}) {
    const std::string output = expectWell(std::string("carried ") + ranks);
    EXPECT_THAT(output, HasSubstr("its name begins with nccl"));
    EXPECT_THAT(output, HasSubstr("its CTA policy is zero"));
    EXPECT_GT(sumOf(output, ": carried "), 50);
    // Those that were captured, and they alone.
    EXPECT_EQ(sumOf(output, "passed on "), 2 * std::atol(ranks));
  }
}

TEST(Device, CarriesByName) {
  const std::string output = expectWell("carried-by-name 3", "FUSCO_CARRY=none");
  EXPECT_THAT(output, HasSubstr("not carried: FUSCO_CARRY=none"));
}

TEST(Device, NobodyWaitsForRanksOfOtherMachines) {
  expectWell("elsewhere 2");
  expectWell("elsewhere 4");
}

TEST(Device, NobodyWaitsWhereEveryRankMakesTheId) {
  const std::string output = expectWell("everyone-makes-the-id 3", "NCCL_COMM_ID=127.0.0.1:4711");
  EXPECT_THAT(output, HasSubstr("its id bears no mark of libfusco"));
}

TEST(Device, SettingsOfNcclForbidIt) {
  EXPECT_THAT(expectWell("not-carried 2", "NCCL_P2P_DISABLE=1"), HasSubstr("NCCL_P2P_DISABLE is 1"));
  EXPECT_THAT(expectWell("not-carried 2", "NCCL_CTA_POLICY='EFFICIENCY|ZERO'"), HasSubstr("NCCL_CTA_POLICY is"));
}

TEST(Device, AGroupThatNcclCannotSimulateStaysOpen) {
  EXPECT_EQ(sumOf(expectWell("no-simulation 2", "FUSCO_NCCL_LIB=" FUSCO_NCCL_OLD_DOUBLE), ": carried "), 4);
}

TEST(Device, TellsNcclsLastErrorBesideItsOwn) { expectWell("last-errors 2", "FUSCO_CARRY=none"); }

TEST(Device, CarriesRandomGroups) {
  EXPECT_GT(sumOf(expectWell("random 4 21 150 2"), ": carried "), 1000);
  EXPECT_GT(sumOf(expectWell("random 3 22 150 1"), ": carried "), 500);
}

TEST(Device, CarriesOperationsOfNcclTests) {
  for (const char* ranks : {"1", "2", "5"})
    EXPECT_GT(sumOf(expectWell(std::string("operations ") + ranks), ": carried "), 100);
}

TEST(Device, CarriesTheLoopOfNcclTests) {
  for (const char* shape : {"4 1 1", "1 3 1", "1 1 3 all", "2 1 2 registered", "2 2 1"})
    EXPECT_GT(sumOf(expectWell(std::string("loop ") + shape), ": carried "), 1000) << shape;
}

TEST(Device, OneThreadDrivesAllRanks) {
  for (const char* ranks : {"1", "4"}) {
    const std::string output = expectWell(std::string("one-thread ") + ranks);
    EXPECT_THAT(output, Not(HasSubstr("not carried")));
  }
}

// Sanitizers make threads in a way of their own.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(Device, LeavesToNcclWhatNoThreadCanVoteOn) {
  EXPECT_THAT(expectWell("short-of-threads 3"), HasSubstr("no thread was left for its vote"));
}
#endif

TEST(Device, AbortEndsAGroupThatWaits) { expectWell("abort 4"); }

}  // namespace
}  // namespace fusco::test
