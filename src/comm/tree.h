// A tree over all ranks of a communicator that lies on several machines: an edge is a TCP connection, with a heartbeat
// each second. What one rank tells reaches all (who left or died, an abort's reason), and gathers go up and down it.
// The lowest rank of each machine has the machine's other ranks for children; these lowest ranks form a tree of eight
// children each. No rank is connected to all.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/handle.h"
#include "comm/frames.h"
#include "transport/tcp/reactor.h"

namespace fusco::comm {

struct TreeShape {
  static constexpr int kBranches = 8;
  int parent = -1;  // of rank 0 none
  std::vector<int> children;
};
TreeShape treeShape(int rank, std::span<const std::uint64_t> domains);

struct News {
  enum Kind : std::uint32_t { aborted = 1, left = 2, exited = 3, died = 4 };
  Kind kind;
  std::int32_t rank;
  std::string text;  // aborted: the reason; died: how, to be put behind the rank's name
};

class Tree {
 public:
  struct Ways {
    std::function<void(const News& news)> hear;   // from the reactor's thread, without locks
    std::function<void()> ringBell;               // a gather has gone on
    std::function<std::string(int rank)> nameOf;  // for messages
  };
  struct Patience {
    std::int64_t beatMs = 1000;
    std::int64_t stallMs = 3000;  // without a beat: a warning
    int silentKernelMs = 8000;    // nothing acknowledged for so long: cut
  };

  Tree(transport::Reactor& reactor, int rank, int ranks, TreeShape shape, Ways ways, Patience patience);
  Tree(transport::Reactor& reactor, int rank, int ranks, TreeShape shape, Ways ways)
      : Tree(reactor, rank, ranks, std::move(shape), std::move(ways), Patience{}) {}
  ~Tree();

  // The proved connection with the parent or a child. Ignored if there is one, or it is neither.
  void attach(int peer, UniqueFd socket);
  bool wants(int peer) const;
  // The neighbours that are not connected yet.
  std::vector<int> missing() const;

  // Tells all other ranks, and not this one.
  void tell(const News& news);
  // Gives what was told at most so long to leave.
  void flush(std::int64_t milliseconds);

  // One chunk of a gather, of the same size on all ranks; `whole` is compared. Rounds begin in order.
  void contribute(std::string_view chunk, std::uint64_t whole);
  // True once all have contributed to the round begun last: their chunks in rank order; throws Error(invalidUsage) when
  // `whole` differs.
  bool gathered(std::string* all);
  // Ranks of this one's subtree that have not contributed yet.
  std::vector<int> late() const;

 private:
  static constexpr std::uint64_t kRoundsApart = 64;
  enum class Kind : std::uint32_t { beat = 1, news = 2, up = 3, down = 4 };
  struct Edge {
    int peer = -1;
    UniqueFd socket;
    Frames frames{std::size_t{8} << 20};
    bool open = false;
    bool farewell = false;  // it has said that it leaves
    bool stalled = false;
    std::int64_t heardNs = 0;
  };
  struct UpHead {
    std::uint64_t round, whole;
    std::int32_t rank, padding;
  };
  struct DownHead {
    std::uint64_t round;
    std::int32_t rank, other;  // -1: all went well; else the two differ in `whole`
    std::uint64_t whole, otherWhole;
  };
  struct Round {
    std::vector<bool> come;
    int count = 0;
    bool failed = false;
    int first = -1;
    std::uint64_t whole = 0;
    std::string all;
  };

  bool isRank(std::int32_t rank) const { return rank >= 0 && rank < ranks_; }
  // Ranks are at most a round apart; a few more do not matter, a neighbour with damaged memory must not fill this
  // one's.
  bool isNear(std::uint64_t round) const { return round - round_ + kRoundsApart <= 2 * kRoundsApart; }
  Edge* edgeTo(int peer);
  void onReady(Edge* edge);
  void beat();
  void send(Edge* edge, Kind kind, std::initializer_list<std::string_view> parts);
  void pass(const News& news, const Edge* from);
  void hear(Edge* edge, std::uint32_t kind, std::string_view body, std::vector<News>* news);
  void takeUp(const UpHead& head, std::string_view chunk);
  void sendDown(std::uint64_t round);
  void takeDown(const DownHead& head, std::string_view all);
  void fall(Edge* edge, int error, std::vector<News>* news);

  transport::Reactor& reactor_;
  const int rank_, ranks_;
  const TreeShape shape_;
  const Ways ways_;
  const Patience patience_;
  mutable std::mutex mutex_;
  std::vector<Edge> edges_;  // parent first
  std::uint64_t timer_ = 0;
  std::int64_t beatNs_ = 0;
  bool abortPassed_ = false;

  std::uint64_t round_ = 0;                // begun last by this rank
  std::size_t chunkBytes_ = 0;             // of its own part of that
  std::map<std::uint64_t, Round> rounds_;  // what has come from the subtree
  std::uint64_t downRound_ = 0;
  std::string down_;
  std::map<std::uint64_t, DownHead> disagreements_;  // by round
};

}  // namespace fusco::comm
