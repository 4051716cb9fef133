// Faults in every phase, on every layout. Each test is a kind of fault; its cases run side by side. FUSCO_TEST_SEED
// makes other choices of victims and moments (docs/faults.md says how to run many rounds).
#include <gtest/gtest.h>

#include "fault/choose.h"
#include "fault/connections.h"

namespace fusco::fault {
namespace {

std::vector<FaultCase> everywhere(Fault fault, std::int64_t limitMs) {
  std::vector<FaultCase> cases;
  for (const Layout& layout : {kNode, kTwo, kFour}) {
    for (const FaultCase& one : eachPhase(fault, layout, limitMs)) cases.push_back(one);
  }
  return cases;
}

TEST(Faults, Killed) { runCases("SIGKILL", everywhere(Fault::kill, 2000), kRanksAtOnce); }

// The first rank of a machine to come speaks for the others. It dies when it has heard that all are there, and before
// the others have: they, too, have to find out who it was.
TEST(Faults, KilledWithTheAnswerOfItsMachine) {
  std::vector<FaultCase> cases;
  for (const Layout& layout : {kTwo, kFour}) {
    FaultCase one = eachPhase(Fault::kill, layout, 2000, {"bootstrap"}).front();
    one.point = "answer";
    one.number = 0;
    one.victim = layout.ranks() - 1;
    one.after = layout.ranks() - 2;
    cases.push_back(one);
  }
  runCases("SIGKILL with the answer", cases, kRanksAtOnce, [](const FaultCase& one, const Outcome& outcome) {
    EXPECT_NE(outcome.firstText.find("rank " + std::to_string(one.victim) + " ("), std::string::npos)
        << one.describe() << ": " << outcome.firstText;
  });
}

TEST(Faults, ExitWithoutDestroy) { runCases("exit", everywhere(Fault::exit, 2000), kRanksAtOnce); }

// Five seconds are no error.
TEST(Faults, StoppedAndContinued) { runCases("SIGSTOP for 5 s", everywhere(Fault::stop, 0), 2 * kRanksAtOnce); }

TEST(Faults, Forked) { runCases("fork", everywhere(Fault::fork, 0), kRanksAtOnce); }

TEST(Faults, ConnectionsReset) {
  std::string why;
  if (!canReset(&why)) GTEST_SKIP() << "connections cannot be reset from outside here: " << why;
  std::vector<FaultCase> cases;
  for (const Layout& layout : {kTwo, kFour}) {
    for (FaultCase one : eachPhase(Fault::reset, layout, 2000)) {
      if (one.phase == "bootstrap") {
        atAnotherMachine(one);
        // It has met, and waits for nobody; before the tree is there it has no connection.
      } else if (one.phase == "connect") {
        one.point = "connect";
        one.number = 2;
      } else if (one.phase == "destroy") {
        one.number = 0;
      }
      cases.push_back(one);
    }
  }
  runCases("reset", cases, kRanksAtOnce);
}

FaultCase shortOfDescriptors(FaultCase one, int room) {
  one.room = room;
  one.maySucceed = true;
  return one;
}

// At least so many have to run out of them.
void runShort(const char* title, const std::vector<FaultCase>& cases, int least) {
  int told = 0;
  runCases(title, cases, kRanksAtOnce,
           [&](const FaultCase&, const Outcome& outcome) { told += outcome.slowestMs > 0; });
  EXPECT_GE(told, least) << "too few cases ran out of descriptors for the test to mean anything";
}

// Less and less room: nothing at all, some descriptors of the set-up, those of links.
TEST(Faults, DescriptorsShort) {
  std::vector<FaultCase> cases;
  for (const Layout& layout : {kNode, kTwo}) {
    for (const FaultCase& phase : eachPhase(Fault::descriptors, layout, 5000)) {
      for (const int room : {0, 1, 3, 7}) cases.push_back(shortOfDescriptors(phase, room));
    }
  }
  runShort("descriptors short", cases, 5);
}

// As many as init needs and a few more: links are what fails, by calls of one's own or those of others.
TEST(Faults, DescriptorsForLinksShort) {
  FaultCase connect = eachPhase(Fault::descriptors, kTwo, 5000, {"connect"}).front();
  connect.number = 0;
  std::vector<FaultCase> cases;
  for (const int room : {4, 5, 6, 7, 8, 9}) cases.push_back(shortOfDescriptors(connect, room));
  runShort("descriptors for links short", cases, 2);
}

TEST(Faults, SharedMemoryShort) {
  std::vector<FaultCase> cases;
  for (const Layout& layout : {kNode, kTwo}) {
    for (FaultCase one : eachPhase(Fault::memory, layout, 5000)) {
      one.maySucceed = true;
      cases.push_back(one);
    }
  }
  runCases("shared memory short", cases, kRanksAtOnce);
}

}  // namespace
}  // namespace fusco::fault
