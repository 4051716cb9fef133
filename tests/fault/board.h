// What the processes of a fault case tell each other: a page that all of them have mapped. The world (world.h) makes
// the case and the fault, a rank (rank.cc) is a process of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>

namespace fusco::fault {

// Ends what a case is about: bytes of fixed size, so that they can lie in shared memory.
template <std::size_t room>
struct Text {
  char bytes[room] = {};
  void set(const std::string& text) {
    const std::size_t length = text.size() < room ? text.size() : room - 1;
    std::memcpy(bytes, text.data(), length);
    bytes[length] = 0;
  }
  std::string get() const { return std::string(bytes, strnlen(bytes, room)); }
};

enum class Fault : int {
  kill,         // SIGKILL
  stop,         // SIGSTOP, and SIGCONT five seconds later
  exit,         // exit() without destroy
  reset,        // its connections are reset
  cut,          // its node's cable is pulled
  slow,         // its node's cable becomes slow
  descriptors,  // no more descriptors for it
  memory,       // no more shared memory for it
  fork,         // it forks, and the child uses the communicator
};

struct CaseText {
  int ranks = 0;
  int nodes = 0;
  Fault fault = Fault::kill;
  int victim = 0;
  int held = -1;   // this rank begins only after the fault
  int after = -1;  // this rank begins only when the victim has met
  char point[16] = {};
  int number = 0;
  int room = 0;  // descriptors that the victim may still open
  std::uint64_t seed = 0;
};

struct RankPage {
  std::atomic<int> pid{0};
  std::atomic<int> joined{0};            // it has a communicator
  std::atomic<std::int64_t> endedNs{0};  // the attempt has ended, well or not
  std::atomic<int> failed{0};
  std::atomic<int> code{0};  // of the call that failed
  std::atomic<std::int64_t> destroyNs{0};
  std::atomic<std::int64_t> waitedForCoreNs{0};  // of all its threads, when the attempt ended
  std::atomic<int> over{0};                      // all is done, the second communicator included
  Text<2048> text;                               // of the call that failed
  Text<2048> complaint;                          // what this rank finds wrong
};

struct Board {
  static constexpr int kMostRanks = 8;
  CaseText what;
  char ids[2][128] = {};
  std::atomic<int> idReady[2] = {};
  std::atomic<int> taken[kMostRanks] = {};  // the meeting place knows of it
  std::atomic<int> atPoint{0};              // the victim has come to its point
  std::atomic<std::int64_t> faultNs{0};     // when it happened
  std::atomic<int> go{0};                   // the world has done its part
  std::atomic<int> recover{0};              // a second communicator of those who are left
  RankPage ranks[kMostRanks];
};

// Time that the threads of a process were ready to run and had no core, in nanoseconds.
std::int64_t waitedForCore(int pid);

}  // namespace fusco::fault
