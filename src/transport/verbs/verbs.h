// Links by RDMA over libibverbs, which is opened when it is first asked for. A build without its headers has no NICs,
// and says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "transport/gpu_memory.h"
#include "transport/network_link.h"
#include "transport/tcp/reactor.h"

namespace fusco::transport {

// A posted link over a reliable queue pair. A slice is written into the receiver's slot by RDMA WRITE, and announced by
// immediate data; credits come back as immediate data. Rows of windows are read by the NIC from where they lie. Set up
// over one socket, which stays open: its end is the link's.
class VerbsLink : public NetworkLink {
 public:
  // What the link has asked of the NIC so far.
  struct Counts {
    std::uint64_t workRequests = 0;   // posted, receives left out
    std::uint64_t posts = 0;          // calls that posted them
    std::uint64_t receives = 0;       // posted
    std::uint64_t sendsDone = 0;      // completions of sends that were signalled
    std::uint64_t arrivals = 0;       // completions of receives
    std::uint64_t notifications = 0;  // times that the NIC was asked to interrupt
    std::uint64_t events = 0;         // times that it did
    std::uint64_t bytesWritten = 0;   // of slices
    std::uint64_t bytesGathered = 0;  // of them, taken from where the rows lay
    std::uint64_t bytesPlaced = 0;    // of them, written to where the rows belong
    std::uint64_t bytesMirrored = 0;  // of them, taken from GPU memory
    std::uint64_t flushes = 0;        // before the GPU read what had arrived
  };
  virtual Counts counts() const = 0;
  // How many queue pairs it has had before: other ports took over so often.
  virtual int moves() const = 0;
  // For tests of what follows: the NIC refuses all further work of this queue pair; the peer's NIC does.
  virtual void breakQueuePair() = 0;
  virtual void spoilKey() = 0;
};

// The ports of this host that a rank uses.
class VerbsNics {
 public:
  // Opens the ports that are active and that the settings leave. Throws Error(systemError) that says what was looked at
  // where there is none.
  static std::unique_ptr<VerbsNics> open();
  // With a list of devices in place of the setting's.
  static std::unique_ptr<VerbsNics> open(const std::string& devices);
  virtual ~VerbsNics() = default;

  virtual int count() const = 0;
  // Whether as much memory can be registered with each of them. Throws Error(systemError) that says what to change.
  virtual void tryMemory(std::size_t bytes) = 0;
  // Payload slots of links that are made from now on lie in this GPU's memory, if it can be registered with each of
  // these NICs, and can be read after it was written; else they stay in host memory. Returns whether; `how` is told in
  // words, with what stands against the ways that were not taken.
  virtual bool useGpuMemory(std::shared_ptr<GpuMemory> gpu, std::string* how) = 0;
  virtual bool infiniband() const = 0;              // else RoCE; ports of both kinds are not mixed
  virtual std::string describe(int nic) const = 0;  // "rxe0 port 1"
  // The `turn`-th rank of a node takes this one: of those that are nearest to where this process may run, in turn.
  virtual int nearest(int turn) const = 0;
  // Events of ports, devices and queue pairs are attended to by the reactor from now on; links can be made. The reactor
  // must outlive this.
  virtual void serve(Reactor& reactor) = 0;
  // Before a window's memory goes back: it is no NIC's any more.
  virtual void forgetWindow(std::uint32_t id) = 0;
  // Windows of other ranks of this node: where they lie in this process, until they go.
  virtual void knowShared(const void* address, std::size_t bytes) = 0;
  virtual void forgetShared(const void* address) = 0;
  virtual std::unique_ptr<VerbsLink> link(int nic, NetworkLinkOptions options) = 0;
};

}  // namespace fusco::transport
