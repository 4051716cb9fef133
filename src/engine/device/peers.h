// How ranks reach each other's GPU memory and wait for each other's streams, pair by pair: what transfers need. Each
// rank has one stream of the library's own, its lane, on which all of its copies run and all of its events are
// recorded: an event that is recorded anew stands for all that came before on it, so that few events are enough.
//
// A rank waits only for what has already been recorded, and says so on the host before. So no order of calls can make
// streams wait for each other in a circle, whichever hardware queues they share.
//
// Where processes have GPUs of their own, kernels of one block stand for the events between these (kernels/meet.h):
// they are ten times as quick as CUDA's inter-process events, and can be captured. Each message counts once at both
// ends.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "engine/device/domain.h"
#include "exec/cuda_peer.h"

namespace fusco::engine {

// Memory of a process as its peers are told of it.
struct PeerMemory {
  transport::MemoryRef memory;        // kind none: there is none
  std::uint64_t allocationBytes = 0;  // of another process: the whole allocation, memory.offset is in it
  exec::cuda::Handle handle{};
};

// What peers of the same process use of a rank directly; lives as long as any of them.
class DeviceEnd : public std::enable_shared_from_this<DeviceEnd> {
 public:
  static constexpr int kEvents = 4;
  // betweenProcesses: events can be exported.
  DeviceEnd(int device, bool betweenProcesses);
  ~DeviceEnd();

  enum Kind : int { ready = 0, done = 1, capturedReady = 2, capturedDone = 3, kKinds = 4 };
  exec::cuda::SharedEvent& event(Kind kind, int index) { return *events_[kind][index]; }

  // The window for rows that peers cannot reach where they lie, and for those that leave before they are asked for.
  std::byte* staging = nullptr;

 private:
  const int device_;
  std::unique_ptr<exec::cuda::SharedEvent> events_[kKinds][kEvents];
};

class DevicePeers {
 public:
  static constexpr std::size_t kSlotBytes = 4 << 20;
  static constexpr int kSlots = 8;

  // Collective.
  DevicePeers(Engine& engine, DeviceDomain& domain, std::int64_t timeoutMs);
  ~DevicePeers();
  DevicePeers(const DevicePeers&) = delete;
  DevicePeers& operator=(const DevicePeers&) = delete;

  // Before waits are ended: until peers have fetched what was sent and nothing of this rank is under way, or seconds
  // have gone by.
  void leave();

  exec::cuda::Stream lane() const { return lane_->get(); }
  kernels::Budget budget() const { return {domain_.maxSms()}; }
  // Whether transfers between processes can be captured.
  bool capturesBetweenProcesses() const { return words_; }
  // All ranks are on this node, and no two in one process.
  bool eachCaptures() const { return words_ && ranksApart_; }
  // The next record is for this rank, too: once for each message that it will wait for.
  void recordFor(int localIndex, DeviceEnd::Kind kind);
  // All that peers are to wait for is on `stream` (the lane, or what is being captured). Returns which event it was.
  int record(DeviceEnd::Kind kind, exec::cuda::Stream stream);
  // What is put on the stream after the next record or settle comes after what the peer has recorded.
  void wait(int localIndex, DeviceEnd::Kind kind, int index, exec::cuda::Stream stream);
  void settle(bool captured, exec::cuda::Stream stream);
  // Around what is captured, which comes behind what was captured before, and in each replay behind what was replayed
  // before, on whichever streams.
  void beginCaptured(exec::cuda::Stream stream);
  void endCaptured(exec::cuda::Stream stream);
  // Streams that join the lane, or leave it.
  void join(exec::cuda::Stream from, exec::cuda::Stream to);

  // False where a peer in another process could not reach it.
  bool describe(const void* pointer, std::size_t bytes, bool sameProcess, PeerMemory& out);
  // Where a peer's memory is here: at least until the next forgetImports(), which gives up mappings that are too many
  // and waits for copies that are launched.
  std::byte* reach(int localIndex, const PeerMemory& memory);
  void forgetImports();

  // Slots of the window: one, or -1 when all are taken.
  int takeSlot();
  void freeSlot(int slot) { freeSlots_.push_back(slot); }
  std::byte* slot(int slot) { return end_->staging + static_cast<std::size_t>(slot) * slotBytes_; }
  std::size_t slotBytes() const { return slotBytes_; }

  // Sends that have been told and not been answered, by peer, oldest first.
  static constexpr int kInPlace = -1;  // the sender waits until its rows have been read
  static constexpr int kWithoutRows = -2;
  struct Pending {
    std::uint64_t sequence;
    int slot;             // of the window; or one of:
    std::uint64_t bytes;  // of the whole transfer
  };
  std::vector<std::vector<Pending>>& pending() { return pending_; }
  // Takes note of answers; counts those to transfers in place, whose readers `stream` then waits for. Throws where
  // sizes did not match.
  std::uint64_t takeAnswers(int rank, exec::cuda::Stream stream, bool captured);
  // Throws where a receiver has answered a send, which nobody waits for any more, that it expects another size.
  void hearComplaints() const;

 private:
  struct Peer {
    std::uint64_t process[2];
    bool sameProcess = true;
    std::shared_ptr<DeviceEnd> end;                                          // same process
    std::unique_ptr<exec::cuda::SharedEvent> events[2][DeviceEnd::kEvents];  // another one's: ready, done
    std::map<exec::cuda::Handle, std::unique_ptr<exec::cuda::Imported>> imports;
  };

  bool agree(bool mine, std::int64_t timeoutMs);
  void meetByWords(std::int64_t timeoutMs);
  const DoneCell& answerTo(int rank, const Pending& send) const;
  [[noreturn]] void complain(int rank, const Pending& send) const;

  Engine& engine_;
  DeviceDomain& domain_;
  std::unique_ptr<exec::cuda::OwnStream> lane_;
  std::unique_ptr<exec::cuda::Event> joining_;
  std::unique_ptr<exec::cuda::Order> captures_;
  std::shared_ptr<DeviceEnd> end_;
  std::vector<Peer> peers_;  // by local index
  bool eventsReach_ = true;  // else a rank lets its lane run empty before it tells
  int recorded_[DeviceEnd::kKinds] = {};
  // Between processes, by kernels instead of events.
  bool words_ = false, keepsMapped_ = false, left_ = false;
  bool localPeers_ = true;  // there are some that wait by events
  bool ranksApart_ = false;
  std::byte* wordMemory_ = nullptr;
  std::vector<std::unique_ptr<exec::cuda::Imported>> wordImports_;
  kernels::TellArgs telling_[DeviceEnd::kKinds] = {};
  kernels::AwaitArgs awaiting_[DeviceEnd::kKinds] = {};
  bool tells_[DeviceEnd::kKinds] = {}, awaits_[DeviceEnd::kKinds] = {};
  std::size_t slotBytes_ = kSlotBytes;
  int slots_ = kSlots;
  std::vector<int> freeSlots_;
  std::vector<std::vector<Pending>> pending_;                                       // by rank
  std::map<std::uint64_t, std::pair<std::uint64_t, exec::cuda::Handle>> exported_;  // by start: id, handle
  std::map<std::uint64_t, std::uint64_t> notExported_;                              // by start: id
};

}  // namespace fusco::engine
