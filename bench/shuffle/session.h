// What the coordinator, its ranks and the peer program share: one memory file with commands, barriers, times and the
// limit's windows. Ranks sleep in it (futex) whenever it is another implementation's turn.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusco::bench {

constexpr int kMaxRanks = 128;
constexpr int kOwnGroup = 0;   // ranks that run fusco and the limit
constexpr int kPeerGroup = 1;  // ranks of the MPI peer program
constexpr int kGroups = 2;

enum class Step : std::uint32_t { prepare, check, run, release, quit };
const char* nameOf(Step step);

// Nanoseconds of one rank by stage, and bytes given to a wire.
struct Stages {
  std::uint64_t plan = 0, extract = 0, wire = 0, place = 0, sum = 0, wait = 0;
  std::uint64_t wireBytes = 0;
};
Stages operator-(const Stages& a, const Stages& b);
Stages operator+(const Stages& a, const Stages& b);

// An end of the wire alone by queue pairs.
struct WireEnd {
  std::uint8_t gid[16];
  std::uint32_t key, localId, mtu;
  std::uint64_t address;
  std::uint32_t pairs[kMaxRanks];  // number of the queue pair for each rank
};

struct RankState {
  std::uint32_t failed;
  std::uint64_t wrong;
  std::uint16_t port;  // where it listens, for the wire alone
  WireEnd wire;
  Stages stages;
  char text[768];
};

struct GroupState {
  std::atomic<std::uint32_t> sequence;  // grows by one with each command; ranks sleep on it
  std::atomic<std::uint32_t> done;      // ranks that have carried it out; the coordinator sleeps on it
  std::atomic<std::uint32_t> joined;
  std::atomic<std::uint32_t> arrived, generation;  // the barrier
  Step step;
  std::uint32_t caseIndex, warmup, iterations;
  char impl[64];
  RankState ranks[kMaxRanks];
};

struct SessionHeader {
  std::uint64_t magic;
  std::uint64_t totalBytes, timesOffset, dataOffset;
  std::uint64_t windowBytes, outputBytes;  // a rank's two regions for the limit
  std::uint32_t ranks, iterations;
  std::int32_t coordinator;              // its process id
  std::atomic<std::uint32_t> abandoned;  // nobody waits for anybody any more
  std::atomic<std::uint32_t> idReady;    // the unique id below has been written
  char id[128];
  char peerVersion[256];
  std::uint32_t wordBytes;
  char words[16384];  // the command line, each word closed by a 0
  GroupState groups[kGroups];
};

struct Span {
  std::int64_t begin, end;  // CLOCK_MONOTONIC, nanoseconds
};
std::int64_t nowNs();

// Thrown where a rank waited and the run had been given up meanwhile.
class Abandoned : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Session {
 public:
  static Session create(const std::vector<std::string>& words, int ranks, int iterations, std::uint64_t windowBytes,
                        std::uint64_t outputBytes);
  static Session attach(const std::string& path);
  Session(Session&& other) noexcept;
  Session& operator=(Session&&) = delete;
  ~Session();

  SessionHeader& header() { return *header_; }
  GroupState& group(int group) { return header_->groups[group]; }
  Span* times(int group, int rank);           // [iterations]
  std::byte* window(int rank);                // windowBytes: rows in expert order
  std::byte* output(int rank);                // outputBytes: rows by token
  std::string path() const { return path_; }  // for another process of the same user
  std::vector<std::string> words() const;

  // All ranks of a group meet.
  void meet(int group);
  // Sleeps until the group's sequence differs from `seen` and returns it.
  std::uint32_t waitForCommand(int group, std::uint32_t seen);
  void reportDone(int group);
  // Coordinator: the command to all ranks of a group.
  void command(int group, Step step, std::uint32_t caseIndex, const std::string& impl, int warmup, int iterations);
  // Coordinator: sleeps up to `ms`; true when all ranks have reported.
  bool waitDone(int group, int ms);
  void abandon();

 private:
  Session() = default;
  void throwIfAbandoned();

  SessionHeader* header_ = nullptr;
  std::size_t bytes_ = 0;
  int file_ = -1;
  std::string path_;
};

}  // namespace fusco::bench
