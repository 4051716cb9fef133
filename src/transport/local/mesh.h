// One machine's ranks of a communicator, connected: a socket to each rank of another process, for descriptors and news;
// the memory in which ranks ring, raise alarms and gather; and a watch over their processes.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/handle.h"
#include "transport/local/rank_memory.h"

namespace fusco::transport {

struct MeshMessage {
  static constexpr std::uint64_t kMagic = 0x314853454d435546;  // "FUCMESH1"
  enum Kind : std::uint32_t { hello = 1, welcome = 2, window = 3, windowFreed = 4, ring = 5, failed = 6 };

  std::uint64_t magic = kMagic;
  std::uint32_t kind = 0;
  std::int32_t rank = -1;  // of the sender
  std::uint64_t id = 0;    // window id; channel of a ring
  std::uint64_t bytes = 0;
  std::uint8_t key[32] = {};  // hello only
};
static_assert(sizeof(MeshMessage) == 64);

struct MeshMember {
  std::string name;                   // "rank 3 (host:pid)"
  std::string socketName;             // where it listens
  std::shared_ptr<RankMemory> local;  // set for ranks of this process (this rank included)
  bool sameNode = false;
  bool remote = false;  // shares no memory with this rank: not connected, not watched
  pid_t pid = 0;        // as this process sees it, 0 if it cannot
};

class Mesh {
 public:
  // Called with each message that is no part of the set-up.
  using Handler = std::function<void(int rank, const MeshMessage& message, UniqueFd descriptor)>;

  // Connects to all ranks of other processes but the remote ones: to the lower ones by their listeners, from the higher
  // ones by `listener`. `controlBytes`: of each rank's memory. While it waits it asks `check`, which may throw. Throws
  // Error; then tells the ranks that may still wait for this one.
  Mesh(int rank, const std::uint8_t key[32], std::vector<MeshMember> members, UniqueFd listener,
       std::size_t controlBytes, Deadline deadline, Handler handler, const std::function<void()>& check);

  // For a rank that fails before it makes its mesh: tells those that would wait for it. The higher ones find it gone
  // when they call it. Needs one descriptor at a time.
  static void tellLower(int rank, const std::uint8_t key[32], const std::vector<MeshMember>& members);

  int ranks() const { return static_cast<int>(peers_.size()); }
  const std::string& name(int rank) const { return peers_[rank].member.name; }
  bool sameProcess(int rank) const { return peers_[rank].member.local != nullptr; }
  bool remote(int rank) const { return peers_[rank].member.remote; }
  bool sameNode(int rank) const { return peers_[rank].member.sameNode; }
  RankMemory& memory(int rank) const { return *peers_[rank].memory; }
  RankHeader& header(int rank) const { return peers_[rank].memory->header(); }
  pid_t pid(int rank) const { return peers_[rank].pid; }
  // Its process is known to have ended. Any thread.
  bool ended(int rank) const;

  // The rest is called by one thread at a time.

  // Queues a message; `descriptor` is duplicated if it cannot go at once. Never waits.
  void send(int rank, const MeshMessage& message, int descriptor = -1);
  // Sends what is queued as far as the peers take it. True: nothing is queued for `rank` (-1: for anyone).
  bool flush(int rank = -1);
  // Whether anything is. Any thread.
  bool queued() const { return queued_.load(std::memory_order_acquire) > 0; }
  // Hands over what has arrived from `rank`. False: its end is closed.
  bool drain(int rank);
  // Waits until a socket has something to read (or room, where something is queued), at most `milliseconds`.
  void wait(int milliseconds);
  // Takes in all that has arrived and looks at the processes: the first rank whose process has ended or whose socket is
  // closed without a farewell; -1 if none.
  int look();

 private:
  struct Queued {
    MeshMessage message;
    UniqueFd descriptor;
  };
  struct Peer {
    MeshMember member;
    std::shared_ptr<RankMemory> memory;
    UniqueFd socket;
    UniqueFd process;  // pidfd
    pid_t pid = 0;
    bool closed = false;
    std::deque<Queued> queue;
  };

  void connectLower(const std::uint8_t key[32], Deadline deadline);
  void meet(const std::uint8_t key[32], UniqueFd listener, Deadline deadline);
  [[noreturn]] void failGone(const Peer& peer, const std::string& what);
  void welcomeCaller(UniqueFd* socket, const MeshMessage& hello, UniqueFd memory);
  void adopt(Peer& peer, UniqueFd socket, UniqueFd memory);
  void watch(Peer& peer, pid_t pid);
  int findDead();
  std::string missing() const;
  bool saidFarewell(int rank) const;

  const int rank_;
  const std::size_t controlBytes_;
  std::vector<Peer> peers_;
  std::atomic<std::size_t> queued_{0};
  Handler handler_;
  const std::function<void()> check_;  // while it is set up
};

}  // namespace fusco::transport
