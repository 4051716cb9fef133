// A program written against NCCL, in host mode: linked with libfusco, and linked with another NCCL and preloaded.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "nccl/run.h"

namespace fusco::test {
namespace {

using testing::HasSubstr;
using testing::Not;

struct Way {
  const char* name;
  std::string settings, program;
};
void PrintTo(const Way& way, std::ostream* out) { *out << way.name; }

class Program : public testing::TestWithParam<Way> {
 protected:
  // Every rank must end well; what the statistics say is returned.
  static std::string expectWell(const std::string& arguments, const std::string& more = "") {
    const Way& way = GetParam();
    const Result result =
        run("FUSCO_DEVICE=host FUSCO_STATS=1 FUSCO_INIT_TIMEOUT_MS=30000 " + way.settings + " " + more,
            way.program + " " + arguments);
    EXPECT_EQ(result.status, 0) << arguments << "\n" << result.output;
    return result.output;
  }
};

long carriedCalls(const std::string& output) {
  long calls = 0;
  const std::string words = ": carried ";
  for (std::size_t at = 0; (at = output.find(words, at)) != std::string::npos;)
    calls += std::strtol(output.c_str() + (at += words.size()), nullptr, 10);
  return calls;
}

// Ranks, seed, groups, threads. Under sanitizers a quarter of the groups.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kFewerGroups = 4;
#else
constexpr int kFewerGroups = 1;
#endif
std::string shape(int ranks, int seed, int groups, int threads) {
  return "random " + std::to_string(ranks) + " " + std::to_string(seed) + " " + std::to_string(groups / kFewerGroups) +
         " " + std::to_string(threads);
}

TEST_P(Program, randomGroups) {
  long carried = 0;
  for (const std::string& one :
       {shape(2, 11, 1000, 2), shape(3, 12, 600, 1), shape(4, 13, 600, 2), shape(8, 14, 200, 1)})
    carried += carriedCalls(expectWell(one));
  EXPECT_GT(carried, 10000 / kFewerGroups);
}

// Windows of the library in place of the kernel's way into another process.
TEST_P(Program, randomGroupsStaged) { expectWell(shape(4, 15, 200, 1), "FUSCO_PROCESS_VM=0"); }

TEST_P(Program, collectives) {
  for (const char* ranks : {"1", "2", "3", "5"})
    EXPECT_THAT(expectWell(std::string("collectives ") + ranks), HasSubstr("collectives"));
}

TEST_P(Program, operationsOfNcclTests) {
  for (const char* ranks : {"1", "2", "4", "8"})
    EXPECT_GT(carriedCalls(expectWell(std::string("operations ") + ranks)), 100);
}

// Processes, threads of each, ranks of each thread.
TEST_P(Program, loopOfNcclTests) {
  for (const char* shape : {"4 1 1", "1 4 1 all", "1 1 4 all", "2 2 1 registered", "2 1 2", "1 2 2 registered"})
    EXPECT_GT(carriedCalls(expectWell(std::string("loop ") + shape)), 1000) << shape;
}

TEST_P(Program, oneThreadForAllRanks) {
  for (const char* ranks : {"1", "2", "5"}) expectWell(std::string("one-thread ") + ranks);
}

TEST_P(Program, communicatorsComeAndGo) {
  for (const char* ranks : {"2", "4"}) expectWell(std::string("communicators ") + ranks);
}

TEST_P(Program, misuseIsToldAndHarmless) {
  for (const char* ranks : {"2", "3"}) expectWell(std::string("misuse ") + ranks);
}

TEST_P(Program, abortEndsAGroupThatWaits) { expectWell("abort 4"); }

TEST_P(Program, oneRankMissing) { expectWell("one-missing 4", "FUSCO_INIT_TIMEOUT_MS=1500"); }

TEST_P(Program, aForkedChildTakesNothingAlong) { expectWell("forked-off 3"); }

TEST_P(Program, staticObjectsMayCallAtTheEnd) { expectWell("last-words 1"); }

std::string ownLibrary() { return FUSCO_NCCL_PROGRAMS "/nccl_program_relinked"; }

INSTANTIATE_TEST_SUITE_P(Relinked, Program, testing::Values(Way{"relinked", "", ownLibrary()}),
                         testing::PrintToStringParamName());

TEST(Fork, aChildWaitsForNoLock) {
  const Result result = run("FUSCO_DEVICE=host FUSCO_DEBUG=NONE", ownLibrary() + " forked-off-meanwhile 1");
  EXPECT_EQ(result.status, 0) << result.output;
}

// A sanitizer wants to be loaded before everything else: there preloading is left to the other builds.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
std::string otherLibrary() { return FUSCO_NCCL_PROGRAMS "/nccl_program_preloaded"; }

INSTANTIATE_TEST_SUITE_P(Preloaded, Program,
                         testing::Values(Way{"preloaded", "LD_PRELOAD=" FUSCO_NCCL_LIBRARY, otherLibrary()}),
                         testing::PrintToStringParamName());

// In front of another NCCL everything reaches it, once: also what that NCCL calls by its own public names.
TEST(PassedOn, everythingReachesTheRealLibraryOnce) {
  const Result result = run("FUSCO_STATS=1 LD_PRELOAD=" FUSCO_NCCL_LIBRARY, otherLibrary() + " passed-on 2");
  EXPECT_EQ(result.status, 0) << result.output;
  // Send, Recv and AlltoAll of the program; not the two that AlltoAll is made of.
  EXPECT_THAT(result.output, HasSubstr("carried 0 calls, 0 bytes sent; passed on 3 calls"));
  EXPECT_THAT(result.output, HasSubstr("moves no GPU memory"));
}

// The other order: the names are the other NCCL's, and libfusco is not asked.
TEST(PassedOn, nothingPassesWhereTheOtherLibraryComesFirst) {
  const Result result =
      run("FUSCO_STATS=1 LD_PRELOAD='" FUSCO_NCCL_DOUBLE " " FUSCO_NCCL_LIBRARY "'", otherLibrary() + " passed-on 2");
  EXPECT_EQ(result.status, 0) << result.output;
  EXPECT_EQ(result.output, "");
}

TEST(PassedOn, nothingIsDoneWhenTurnedOff) {
  const Result result = run("FUSCO_ENABLE=0 FUSCO_STATS=1 FUSCO_DEVICE=host LD_PRELOAD=" FUSCO_NCCL_LIBRARY,
                            otherLibrary() + " passed-on 2");
  EXPECT_EQ(result.status, 0) << result.output;
  EXPECT_THAT(result.output, Not(HasSubstr("stats")));
}

TEST(PassedOn, theVoteSaysNoWhenAskedForWhatIsNotThere) {
  const Result result =
      run("FUSCO_CARRY=all FUSCO_STATS=1 LD_PRELOAD=" FUSCO_NCCL_LIBRARY, otherLibrary() + " passed-on 4");
  EXPECT_EQ(result.status, 0) << result.output;
  EXPECT_THAT(result.output, HasSubstr("passed on to NCCL"));
  EXPECT_THAT(result.output, HasSubstr("moves no GPU memory"));
}

// Four ranks of which the last has no libfusco: the others wait 5 s for it, pass on, and nobody hangs.
TEST(PassedOn, oneRankWithoutLibfusco) {
  const Result result = run("FUSCO_CARRY=all FUSCO_STATS=1 FUSCO_TEST_ONE_WITHOUT=1 LD_PRELOAD=" FUSCO_NCCL_LIBRARY,
                            otherLibrary() + " passed-on 4");
  EXPECT_EQ(result.status, 0) << result.output;
  EXPECT_THAT(result.output, HasSubstr("rank 3 did not show up in time"));
}
#endif

}  // namespace
}  // namespace fusco::test
