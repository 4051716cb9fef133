// A communicator's view of its ranks: who is where, control memory, windows, one link per peer, liveness. Made once by
// a bootstrap; nothing here knows what is shuffled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "comm/gpu_place.h"
#include "plan/topology.h"
#include "transport/gpu_memory.h"
#include "transport/transport.h"

namespace fusco::comm {

// How ranks of different nodes reach each other; the choices of FUSCO_NET in the order of the table.
enum class Net : int {
  automatic = 0,  // by shared memory where they have a domain in common, else by queue pairs or TCP
  tcp = 1,
  sharedMemory = 2,
  verbs = 3,
};

struct FabricConfig {
  int rank = 0;
  int ranks = 1;
  int nodeId = -1;     // divides the ranks of a host further; -1: one node
  GpuPlace gpu;        // divides them too, where GPUs do not reach each other's memory
  std::string hostId;  // divides a machine into hosts that share no memory
  Net net = Net::automatic;
  int lanesPerNode = 1;
  std::size_t controlBytes = 0;    // of each rank's control memory
  std::size_t slotBytes = 262144;  // of posted links
  int slots = 4;
  bool allowProcessVm = true;
  std::int64_t initTimeoutMs = 300000;
  std::shared_ptr<transport::GpuMemory> gpuMemory;  // for slots of queue pairs; null: in host memory
  std::string settings;  // that must be the same on all ranks, as text; ranks that differ are told both
};

// The unique id: magic, version, 32 random bytes, an address. Opens the meeting place in this process (a thread serves
// it until all ranks have met or the time-out has passed).
void makeUniqueId(char id[128]);

// The same on all ranks that call it as often, with the same FUSCO_COMM_KEY: rank 0 opens the meeting place at
// host:port when it connects. `job` is not secret.
void agreeOnUniqueId(const std::string& hostAndPort, const std::string& job, char id[128]);

class Fabric {
 public:
  // Collective. Throws Error: remoteError naming who is missing, invalidUsage with both values, systemError.
  static std::unique_ptr<Fabric> connect(const FabricConfig& config, const char id[128]);
  virtual ~Fabric() = default;  // local and bounded; tells the peers that this rank has left

  virtual int rank() const = 0;
  virtual int ranks() const = 0;
  virtual const plan::Topology& topology() const = 0;
  virtual std::string describeRank(int rank) const = 0;  // "rank 3 (host:pid)"

  // Control memory of a rank of this rank's own node (itself included): controlBytes, zeroed at the start, 64-byte
  // aligned, the same bytes for everyone who asks. The engine keeps its ready and done words there.
  virtual std::byte* control(int rank) = 0;

  // A doorbell per rank. Who changes what another rank waits for rings it (any rank with which there is control memory;
  // posted links ring by themselves). A waiter reads bell(), checks its condition, and sleeps only while the bell has
  // that value. Cheap when nobody sleeps: no system call.
  virtual void ring(int rank) = 0;
  virtual std::uint32_t bell() const = 0;
  // Returns when the bell differs from `seen` or after at most `microseconds`.
  virtual void sleep(std::uint32_t seen, std::int64_t microseconds) = 0;

  // Tells how peers can reach [address, address + bytes). A window is exported to all ranks of the own node on first
  // use.
  virtual transport::MemoryRef describe(const void* address, std::size_t bytes) = 0;
  // The address at which this rank reaches a peer's memory (own node), or null when there is none (private memory of
  // another process, then vmRead/vmWrite if processVm()). Ranks of the same process reach everything.
  virtual std::byte* reach(int rank, const transport::MemoryRef& memory) = 0;
  // Whether private memory of all ranks of the node may be read and written with process_vm_*; decided by all together.
  virtual bool processVm() const = 0;
  // True when every rank of the node is a thread of one process.
  virtual bool oneProcess() const = 0;
  // Moves bytes between this rank's memory and a peer's private memory; both lists have the same total.
  virtual void vmWrite(int rank, std::span<const transport::Segment> local,
                       std::span<const transport::Segment> remote) = 0;
  virtual void vmRead(int rank, std::span<const transport::Segment> local,
                      std::span<const transport::Segment> remote) = 0;

  // Posted link to a rank of another node; made on first use by either side. Channels 0 and 1 belong to the operation
  // slots, 2 to point-to-point; 3 is free. Each of the topology's paths to that rank is a link of its own.
  static constexpr int kChannels = 4;
  virtual transport::PostedLink& link(int rank, int channel, int path = 0) = 0;

  // For set-up and split only: collective over all ranks, blocking.
  virtual void allGather(const void* mine, std::size_t bytes, void* all, std::int64_t timeoutMs) = 0;

  // Throws remoteError when a peer died, left or aborted, or this rank was aborted. Cheap (reads a word; looks at
  // processes at most every 50 ms).
  virtual void check() = 0;
  // The same for a rank that waits for some ranks only: it needs no others, who may have left in order.
  virtual void checkAwaited(const std::function<bool(int rank)>& /*awaited*/) { check(); }
  // The same for a rank that waits for nobody: peers that have left in order are no error. Any thread.
  virtual void checkPeers() {}
  // What this rank has told its peers has left it. A call returns only then, since nobody looks after it until the
  // next.
  virtual bool settled() { return true; }
  // Around whatever may touch memory of peers of this domain. moveBegins() throws once one of them has aborted, so that
  // a rank whose operation has failed can wait until nobody touches its caller's memory any more: abort(), then
  // awaitMoves(), which is bounded.
  virtual void moveBegins() {}
  virtual void moveEnds() {}
  virtual void awaitMoves() {}
  // Wakes every rank; their check() throws with this reason.
  virtual void abort(const std::string& reason) = 0;
  // Bytes of memory that this fabric holds at the moment.
  virtual std::size_t memoryBytes() const = 0;
};

// Shareable memory of this process (memfd), zeroed. Known to every Fabric of the process.
void* windowAllocate(std::size_t bytes);
// Returns false if `pointer` is no window's start.
bool windowFree(void* pointer);
// Whether all of [address, address+bytes) lies in one window.
bool windowContains(const void* address, std::size_t bytes);

}  // namespace fusco::comm
