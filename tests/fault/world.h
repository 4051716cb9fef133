// One fault case: starts its ranks as processes, does the fault, and holds what comes of it against what the library
// promises (docs/faults.md).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "fault/board.h"

namespace fusco::fault {

// Where the ranks are. Nodes are machines that share nothing: hosts made up by FUSCO_HOSTID, connected by loopback, or
// the namespaces of an emulated cluster.
struct Layout {
  const char* name;
  int nodes;
  int ranksPerNode;
  int ranks() const { return nodes * ranksPerNode; }
};

struct Place {
  std::string cluster;  // prefix of the namespaces; empty: hosts on loopback
  int lane = 0;         // of the cluster: a case has one for itself
};

struct FaultCase {
  Fault fault;
  std::string phase;
  std::string point;
  int number = 0;
  Layout layout;
  int victim = 0;
  int held = -1;
  int after = -1;
  int room = 0;
  std::uint64_t seed = 0;
  Place place;
  std::int64_t limitMs = 0;  // within which who is left must know; 0: it must succeed
  bool maySucceed = false;   // or be done before anybody could know
  std::string describe() const;
};

struct Outcome {
  std::vector<std::string> complaints;
  std::int64_t slowestMs = 0;  // of those who are left, from the fault to their answer
  std::int64_t slowestDestroyMs = 0;
  std::int64_t waitedForCoreMs = 0;  // by their threads meanwhile
  std::string firstText;             // of an answer
  std::string said;                  // on standard error, by all
};

Outcome runCase(const FaultCase& one);

// Runs all, as many side by side as `ranksAtOnce` allows, reports what is wrong to gtest, and prints a line of numbers.
// `look` sees each outcome.
void runCases(const std::string& name, const std::vector<FaultCase>& cases, int ranksAtOnce,
              const std::function<void(const FaultCase&, const Outcome&)>& look = {});

}  // namespace fusco::fault
