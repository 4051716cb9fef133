// A communicator on a GPU: which ranks of the node share this rank's process and so launch together, what the GPU holds
// for the communicator, and how the memory of ranks in other processes is reached.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/control.h"
#include "engine/device/memory.h"
#include "exec/cuda.h"
#include "exec/cuda_peer.h"

namespace fusco::engine {

class DeviceOperation;
class Engine;

// Ranks of one process that launch together: on one GPU, or on several where all ranks of the node are in the process.
// The last one to come launches for all. Kernels of ranks that share a GPU never wait for each other; those on GPUs of
// their own may (docs/design.md).
class DeviceGroup : public std::enable_shared_from_this<DeviceGroup> {
 public:
  explicit DeviceGroup(int members) : members_(members) {}
  // Member `member` has come to the operation that channel `channel` is at. The last one launches for all of them; a
  // failure of the launch is kept by each operation.
  void arrive(int channel, int member, DeviceOperation& operation);
  // It will not come, or ends before the others have.
  void withdraw(int channel, int member, const DeviceOperation& operation);
  int members() const { return members_; }

 private:
  const int members_;
  std::mutex mutex_;
  std::vector<DeviceOperation*> waiting_[kOperationSlots + 1];
};

// Pinned words of launches that wait for other GPUs.
struct WaitWords {
  WaitWords();
  ~WaitWords();
  WaitWords(const WaitWords&) = delete;
  WaitWords& operator=(const WaitWords&) = delete;
  std::uint32_t* abort() const { return words_; }
  std::uint32_t* failed() const { return words_ + 1; }

 private:
  std::uint32_t* const words_;
};

class DeviceDomain {
 public:
  // Experts, and ranks in rank order, that are planned on the GPU at most.
  static constexpr int kMaxKeys = 4096;

  // GPU memory that each rank's domain takes.
  static std::size_t bytesOf(int ranks);

  // Collective. maxSms: multiprocessors that this rank's launches may take; 0: all.
  DeviceDomain(Engine& engine, int device, int maxSms, std::int64_t timeoutMs);
  ~DeviceDomain();
  DeviceDomain(const DeviceDomain&) = delete;
  DeviceDomain& operator=(const DeviceDomain&) = delete;

  int device() const { return device_; }
  int maxSms() const { return maxSms_; }
  DevicePool& pool() { return pool_; }
  DeviceGroup& group() { return *group_; }
  // Local indices of the ranks that launch together, rising; this rank is members()[member()].
  const std::vector<int>& members() const { return members_; }
  int member() const { return member_; }
  // All ranks of the node launch together: their barrier is the end of a launch, or events between the launches on
  // several GPUs.
  bool together() const { return together_; }
  // They are in several processes, each with the launches of one GPU, which is its own: these meet in kernels, and
  // streams wait there. Else ranks of several processes wait for each other's streams on the host.
  bool meetsOnGpu() const { return meetsOnGpu_; }
  bool waitsOnHost() const { return !together_ && !meetsOnGpu_; }
  // They do, and in one launch.
  bool oneLaunch() const { return oneLaunch_; }
  // Ranks with the same number share a launch; it is the local index of the first of them.
  int part() const { return part_; }
  int partOf(int localIndex) const { return peers_[static_cast<std::size_t>(localIndex)].part; }
  int parts() const;
  // Ranks of this one's launch, itself too.
  int sharing() const { return sharing_; }

  // Where a rank's planning counts lie, and the addresses of everyone's.
  kernels::PlanCounts* counts(int slot) const;
  const kernels::PlanCounts* const* allCounts(int slot) const;

  // What a peer needs to know of a tensor, and where this rank reaches it. `handle`: 64 bytes of two references.
  transport::MemoryRef describe(const void* pointer, std::size_t bytes, transport::MemoryRef* handle);
  std::byte* reach(int localIndex, const transport::MemoryRef& memory, const transport::MemoryRef* handle);
  bool sameProcess(int localIndex) const { return peers_[static_cast<std::size_t>(localIndex)].sameProcess; }

  // What is on `stream` comes after what others have launched before their meetings of this slot, and the other way
  // round. For one of the members that share a launch.
  void meet(int slot, exec::cuda::Stream stream) const;
  // The same, and routing maps of at most kernels::kMapIds ids come along; behind it a planner finds those of others:
  // `number` by local index, for PlanArgs::turn and turnBytes as setTurn sets them.
  void bringMaps(int slot, kernels::BringMapsArgs& args, exec::cuda::Stream stream) const;
  const std::byte* broughtMap(int slot, int number) const { return mapsAt(countsMemory_, slot, number); }
  void setTurn(int slot, kernels::PlanArgs& args) const;
  // The slot's memory serves one operation after the other, on whichever streams. Replays too, where processes meet on
  // GPUs; where all ranks are in one process the caller orders graphs and calls.
  exec::cuda::Order& slotOrder(int slot) const { return *slotOrders_[slot]; }
  // Before the communicator ends: whether all launches that wait for other processes end within so many milliseconds.
  bool ends(int withinMs) const;
  kernels::ArrivalWait meetingWait() const;
  // Operations have been captured: what they reach stays mapped.
  void keepMapped() { keepsMapped_ = true; }

  // Waits of one stream for another.
  exec::cuda::Event& event(int which) { return *events_[which]; }
  static constexpr int kEvents = 4;

  // Where launches wait for other GPUs while these work (kernels/across.h): a stream beside `stream`, behind what is on
  // it now, for those that send; and back. Multiprocessors that become free are given to it first.
  exec::cuda::Stream beside(exec::cuda::Stream stream, bool captured);
  void joinBeside(exec::cuda::Stream stream, bool captured);
  // Each launch has a GPU of its own.
  bool ownGpus() const { return ownGpus_; }
  // Whether launches may wait beside others: they have, or all are of this process and take so few multiprocessors of
  // the GPU that they share (FUSCO_GPU_APART=1) that there is room for all. Not so in a graph, which has its own order.
  bool mayWaitBeside(bool captured) const { return ownGpus_ || (haveRoom_ && !captured); }
  kernels::ArrivalWait arrivalWait() const;
  // Throws when a launch has given up; another domain's, whose words those are.
  void checkArrivals() const { checkArrivals(*waits_); }
  void checkArrivals(const WaitWords& waits) const;
  const std::shared_ptr<WaitWords>& waits() const { return waits_; }
  // No launch waits any longer.
  void endWaits();
  // Memory of an operation slot that other GPUs write to; grows. Arrivals are 0 while nobody uses them. Null: the GPU
  // has not got as much.
  std::uint32_t* arrivals(int slot, std::size_t words);
  std::byte* partials(int slot, std::size_t bytes);

  // Throws unless kernels of this rank's GPU reach it. `what`: "output"
  void checkPointer(const char* what, const void* pointer) const;
  // Throws where kernels cannot count the bytes of a row.
  void checkRowBytes(std::size_t rowBytes) const;

 private:
  // Grows; what was there stays, since a graph may use it.
  struct Landing {
    std::byte* memory = nullptr;
    std::size_t bytes = 0;
  };
  std::byte* landing(Landing& landing, std::size_t bytes);
  std::byte* mapsAt(std::byte* counts, int slot, int number) const;

  struct Peer {
    bool sameProcess;
    int device;
    int part;  // the first of the ranks of its process that share its launches
    std::uint64_t process[2];
  };
  // The start of an allocation of a peer in another process, or of pieces of virtual memory. Of those, which owners may
  // have unmapped long ago, 256 are kept, and more only as long as operations that have not ended may use them.
  bool mayUnmap() const;
  bool slotsEnded() const;
  std::byte* mapped(const Peer& peer, const exec::cuda::Handle& handle, std::uint64_t start, std::uint64_t bytes);

  Engine& engine_;
  const int device_;
  const int maxSms_;
  DevicePool pool_;
  std::vector<Peer> peers_;  // by local index
  std::vector<int> members_;
  int member_ = 0;
  bool together_ = false, oneLaunch_ = false, meetsOnGpu_ = false;
  int part_ = 0, sharing_ = 0;
  std::shared_ptr<DeviceGroup> group_;
  std::byte* countsMemory_ =
      nullptr;  // counts of each slot, addresses of each slot, words of its meetings, brought maps
  std::size_t countsBytes_ = 0;
  std::unique_ptr<exec::cuda::Event> events_[kEvents];
  std::unique_ptr<exec::cuda::Order> slotOrders_[kOperationSlots];
  bool keepsMapped_ = false;
  kernels::MeetArgs meetings_[kOperationSlots] = {};
  std::vector<std::byte*> countsOfOthers_;            // countsMemory_ of the first rank of each other part
  std::unique_ptr<exec::cuda::OwnStream> beside_[2];  // the second belongs to captures
  bool ownGpus_ = true, haveRoom_ = false;
  std::shared_ptr<WaitWords> waits_;
  Landing arrivals_[kOperationSlots], partials_[kOperationSlots];
  std::vector<std::byte*> outgrown_;
  std::size_t landingBytes_ = 0;
  bool saidNoMemory_ = false;
  std::mutex importMutex_;
  struct Import {
    std::unique_ptr<exec::cuda::Imported> memory;
    std::uint64_t used = 0;  // count of calls that have asked for any, at the last one for this
  };
  std::map<exec::cuda::Handle, Import> imports_;
  std::uint64_t asked_ = 0;
};

}  // namespace fusco::engine
