// What connects a rank with ranks that it shares no memory with: the tree over all ranks, and on first use a posted
// link for each peer, channel and path. One reactor's thread serves all of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/handle.h"
#include "comm/record.h"
#include "comm/switchboard.h"
#include "comm/tree.h"
#include "plan/topology.h"
#include "transport/tcp/link.h"
#include "transport/tcp/reactor.h"
#include "transport/verbs/verbs.h"

namespace fusco::comm {

class Network {
 public:
  struct Ways {
    std::function<void(const News& news)> hear;  // from the reactor's thread
    std::function<void()> ringBell;              // this rank's
  };
  struct LinkShape {
    std::size_t slotBytes;
    int slots;
    int channels;  // of each path
  };

  // One listener for each of the record's addresses. `topology` has to outlive this. Begins to connect the tree.
  Network(const std::vector<Record>& records, int rank, const plan::Topology& topology, const std::uint8_t key[32],
          std::vector<UniqueFd> listeners, LinkShape shape, Ways ways);
  ~Network();

  // Waits until the tree is connected; `check` is asked meanwhile. Throws Error(remoteError) that names who is missing.
  void join(Deadline deadline, const std::function<void()>& check);
  Tree& tree() { return *tree_; }
  // This rank's NICs: from now on others may make links by queue pairs with it. Before they can know that it has any.
  void offer(std::unique_ptr<transport::VerbsNics> nics);
  // Which ranks this one reaches by queue pairs; all others by TCP. Before the first link is asked for.
  void useQueuePairs(std::vector<bool> peers);
  transport::Reactor& reactor() { return reactor_; }

  // `channel` counts the channels of all paths.
  transport::PostedLink& link(int peer, int channel);
  // Whether this process has no descriptors left for its connections.
  bool starves() const { return starves_.load(std::memory_order_acquire); }
  // Throws the Error(systemError) that says so.
  [[noreturn]] void failStarving() const;
  // A link whose connection has ended, of a peer that is not `excused`: the peer, and what happened, to be put behind
  // its name; -1 if none. `orderly`: it was closed between two slices, as who leaves does it.
  int brokenLink(const std::function<bool(int peer)>& excused, std::string* how, bool* orderly) const;
  std::size_t memoryBytes() const;
  // Before a window's memory goes back.
  void forgetWindow(std::uint32_t id);
  // Windows of other ranks of this node, as they are mapped here.
  void knowShared(const void* address, std::size_t bytes);
  void forgetShared(const void* address);

 private:
  // A stream of a link is connected by whoever needs it first. Where both do, the lower rank's call counts.
  enum class Stage { none, calling, connected };
  struct Line {
    std::unique_ptr<transport::NetworkLink> link;
    Purpose::Kind kind = Purpose::link;
    std::vector<Stage> stages;         // of each stream
    std::string failure;               // it could not be connected
    transport::PostedLink::Sent sent;  // when it was looked at last
    double slowSeconds = 0;            // for how long it has been slow, of late
    double slowBytes = 0;              // that went meanwhile
    bool slowTold = false;
  };
  static constexpr int kStreams = 1;

  Line& lineTo(int peer, int channel, Purpose::Kind kind);
  void open(int peer, int channel);
  void callStream(int peer, int channel, int stream);
  bool judge(const Purpose& purpose);
  void take(const Purpose& purpose, UniqueFd socket);
  void callParent();
  void lookAtPace();
  const Record& own() const { return records_[static_cast<std::size_t>(rank_)]; }
  const Record& other(int rank) const { return records_[static_cast<std::size_t>(rank)]; }

  const std::vector<Record> records_;
  const int rank_;
  const plan::Topology& topology_;
  const LinkShape shape_;
  const Ways ways_;
  transport::Reactor reactor_;
  std::unique_ptr<transport::VerbsNics> nics_;
  std::vector<bool> byQueuePair_;
  mutable std::mutex mutex_;
  std::map<std::pair<int, int>, Line> lines_;  // by peer and channel
  std::string parentFailure_;                  // what came of the last call to the parent
  bool callParent_ = false;
  std::atomic<bool> starves_{false};
  std::uint64_t paceTimer_ = 0;
  std::int64_t paceNs_ = 0;
  TreeShape treeShape_;
  std::unique_ptr<Tree> tree_;
  std::unique_ptr<Switchboard> switchboard_;
};

}  // namespace fusco::comm
