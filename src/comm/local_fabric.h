// The fabric: ranks that are threads of one process, processes of one machine, or on several machines. Those of one
// domain (record.h) share memory; with the others a Network connects them.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/status.h"
#include "comm/fabric.h"
#include "comm/local_group.h"
#include "comm/network.h"
#include "comm/record.h"
#include "transport/local/mesh.h"
#include "transport/local/rank_memory.h"
#include "transport/local/ring.h"
#include "transport/local/window.h"

namespace fusco::comm {

class LocalFabric final : public Fabric {
 public:
  LocalFabric(const FabricConfig& config, const UniqueId& id);
  ~LocalFabric() override;

  int rank() const override { return config_.rank; }
  int ranks() const override { return config_.ranks; }
  const plan::Topology& topology() const override { return *topology_; }
  std::string describeRank(int rank) const override;

  std::byte* control(int rank) override;
  void ring(int rank) override { headers_[rank]->ring(); }  // of a rank in this domain
  std::uint32_t bell() const override { return headers_[config_.rank]->bell.load(std::memory_order_seq_cst); }
  void sleep(std::uint32_t seen, std::int64_t microseconds) override;

  transport::MemoryRef describe(const void* address, std::size_t bytes) override;
  std::byte* reach(int rank, const transport::MemoryRef& memory) override;
  bool processVm() const override { return processVm_; }
  bool oneProcess() const override { return oneProcess_; }
  void vmWrite(int rank, std::span<const transport::Segment> local,
               std::span<const transport::Segment> remote) override;
  void vmRead(int rank, std::span<const transport::Segment> local, std::span<const transport::Segment> remote) override;

  transport::PostedLink& link(int rank, int channel, int path) override;
  void allGather(const void* mine, std::size_t bytes, void* all, std::int64_t timeoutMs) override;

  void check() override;
  void checkAwaited(const std::function<bool(int rank)>& awaited) override;
  void checkPeers() override;
  bool settled() override;
  void abort(const std::string& reason) override;
  void moveBegins() override;
  void moveEnds() override { headers_[config_.rank]->moving.store(0, std::memory_order_release); }
  void awaitMoves() override;
  std::size_t memoryBytes() const override;

  // A window of this process has been freed: peers that know it let go of it. Returns whether any do.
  bool forgetWindow(std::uint32_t id);
  // The process exits while this fabric lives: peers are told, nothing else happens.
  void exiting();

 private:
  // How long a rank that has learned of a window waits for the window itself.
  static constexpr std::int64_t kWindowMessageMs = 10000;

  struct Import {
    transport::SharedMemory memory;
    bool populated = false;
  };

  // Set-up, in this order.
  void prepare(const UniqueId& id);
  void meetAll(const UniqueId& id);
  void arrange(const std::vector<Record>& records);
  std::vector<transport::MeshMember> membersOf(const std::vector<Record>& records);
  void connectMesh(const UniqueId& id, std::vector<transport::MeshMember> members, Deadline deadline);
  void openNics();
  void vote(const std::vector<Record>& records);
  void chooseMedia(const std::vector<std::uint8_t>& votes);
  void listen();
  void startNetwork(const UniqueId& id, const std::vector<Record>& records);
  void joinNetwork(Deadline deadline);
  void checkDuringInit();
  void tellMeetingPlace(const UniqueId& id, const Error& error);
  void tellOthers(const std::string& reason);
  bool byNetwork(int rank) const;
  void release();

  void refuseChild(const char* what) const;
  void say(transport::Presence presence);
  void onMessage(int rank, const transport::MeshMessage& message, UniqueFd descriptor);
  void exportWindow(const std::shared_ptr<transport::Window>& window);
  void look(std::unique_lock<std::mutex>& lock);
  void alarmed(const std::function<bool(int rank)>& awaited = [](int) { return true; });
  void tellOfEnds();
  void lookForStopped();
  void lookAtLinks();
  void hear(const News& news);
  transport::Presence presenceOf(int rank) const;
  void gatherByNetwork(const std::byte* mine, std::size_t bytes, std::byte* all, Deadline deadline,
                       std::int64_t timeoutMs);
  void gatherRound(const std::byte* mine, std::size_t bytes, std::size_t whole, std::byte* all, std::size_t stride,
                   Deadline deadline, std::int64_t timeoutMs);
  std::shared_ptr<transport::RingMemory> openRing(int rank, int channel);
  std::shared_ptr<transport::RingMemory> arrivedRing(int rank, int channel);
  void moveVm(int rank, bool write, std::span<const transport::Segment> local,
              std::span<const transport::Segment> remote);

  const FabricConfig config_;
  const unsigned forks_;
  std::int64_t spinMicroseconds_ = 0;
  bool processVm_ = false;
  bool oneProcess_ = false;
  std::uint8_t nicVote_ = 0;  // which kind of RDMA port this rank offers
  std::string nicFailure_;    // why none
  bool entered_ = false;      // in the list of the process's fabrics
  std::uint64_t probeWord_ = 0;
  Record record_{};
  UniqueFd listener_;
  std::optional<plan::Topology> topology_;
  std::shared_ptr<LocalGroup> group_;
  std::shared_ptr<transport::RankMemory> memory_;
  std::shared_ptr<Inbox> inbox_;
  std::vector<std::string> names_;
  std::vector<transport::RankHeader*> headers_;  // null for ranks of other domains
  std::vector<LocalMember> locals_;              // by rank; none for those of other processes

  mutable std::mutex mutex_;  // the mesh, imports, exports, links
  std::unique_ptr<transport::Mesh> mesh_;
  std::unordered_set<std::uint32_t> exported_;
  std::vector<std::unordered_map<std::uint32_t, Import>> imports_;
  std::vector<std::vector<std::unique_ptr<transport::RingLink>>> links_;  // [rank][path * kChannels + channel]
  // Mail that a link has looked at; belongs to the links' user.
  std::vector<std::vector<std::uint32_t>> mailSeen_;
  std::uint64_t gatherRound_ = 0;

  std::atomic<std::int64_t> lastLookNs_ = 0;
  std::atomic<std::int64_t> farewellSeenNs_ = 0;  // or when the bell last rang after that
  std::atomic<std::uint32_t> farewellBell_ = 0;
  std::atomic<int> firstLeft_ = -1;
  std::atomic<bool> failed_ = false;  // a peer is dead
  struct Stopped {
    std::int64_t sinceNs = 0;
    bool told = false;
  };
  std::vector<Stopped> stopped_;  // under mutex_; by rank
  std::int64_t lookedForStoppedNs_ = 0;
  std::string failure_;  // under mutex_, set once

  // Where some ranks are reached by TCP.
  std::vector<UniqueFd> networkListeners_;
  std::vector<std::atomic<std::uint32_t>> remotePresence_;  // Presence, as the network tells it
  mutable std::mutex newsMutex_;
  std::string newsOfDeath_;  // the first
  std::atomic<bool> deathTold_ = false;
  std::atomic<std::int64_t> brokenLinkNs_ = 0;
  std::unique_ptr<Network> network_;  // at last made, and first to end: its thread uses all of the above
};

}  // namespace fusco::comm
