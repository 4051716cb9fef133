// Ranks for tests of the whole library: forked processes of one or more threads each. The parent makes no call of the
// library, so that a rank may crash, hang or be killed without taking the test along.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "fusco/fusco.h"
#include "patience.h"

namespace fusco::test {

// How the ranks of a test are spread, and how they may reach each other's private memory.
struct World {
  const char* name = "";
  int ranks = 2;
  int threadsPerProcess = 1;  // ranks of one process, in rank order
  std::vector<int> nodes;     // by rank; empty: one node
  bool processVm = true;
  std::int64_t sliceBytes = 16384;

  int nodeOf(int rank) const { return nodes.empty() ? 0 : nodes[static_cast<std::size_t>(rank)]; }
  bool multiNode() const { return !nodes.empty() && nodes.front() != nodes.back(); }
  bool oneProcess() const { return threadsPerProcess >= ranks; }
};

struct SharedBoard;

// One rank's end of a test.
class Rank {
 public:
  Rank(const World& world, int rank, SharedBoard* board) : world_(world), board_(board), rank_(rank) {}
  int rank() const { return rank_; }
  int ranks() const { return world_.ranks; }
  const World& world() const { return world_; }

  // The communicator settings that the world asks for.
  fuscoConfig_t config() const;
  // The test's k-th id, made by rank 0. Collective.
  fuscoUniqueId id(int k = 0);
  // A communicator of all ranks, by id k. Throws what the library says.
  fuscoComm_t connect(int k = 0);
  fuscoComm_t connect(int k, const fuscoConfig_t& config);
  // Waits for all ranks that are still there, with no help of the library.
  void barrier();
  // Words that all ranks share, zero at the start.
  std::atomic<std::uint64_t>& word(int i);
  pid_t pidOf(int rank) const;

 private:
  const World& world_;
  SharedBoard* board_;
  int rank_;
};

// Runs body on every rank. One text per rank: empty, what it threw, how its process ended, or that it did not end
// within `seconds` (it is killed then). A rank that is to be killed by the test says "killed by signal 9".
std::vector<std::string> runRanks(const World& world, const std::function<void(Rank&)>& body,
                                  int seconds = kWorldSeconds);

// Throws std::runtime_error(text) unless `condition`.
void require(bool condition, const std::string& text);
#define REQUIRE(condition) \
  ((condition) ? void() : ::fusco::test::require(false, #condition " at line " + std::to_string(__LINE__)))

// The library's text for this thread after a call that must give `code`; throws when it gave another.
std::string expectCode(fuscoResult_t got, fuscoResult_t code, const char* what);
#define EXPECT_CODE(call, code) ::fusco::test::expectCode((call), (code), #call)
void requireContains(const std::string& text, const std::string& part);

}  // namespace fusco::test
