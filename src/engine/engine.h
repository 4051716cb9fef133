// The engine of one communicator: the only room where plans, executors and links meet. Operations are submitted in the
// order that all ranks share; up to two are under way at a time. This is the host driver: whoever waits runs the steps,
// and for operations that were only started, the communicator's own thread does.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/status.h"
#include "comm/fabric.h"
#include "engine/balancer.h"
#include "engine/control.h"
#include "engine/operation.h"
#include "engine/plan_state.h"
#include "engine/statistics.h"
#include "engine/workspace.h"
#include "exec/cuda_executor.h"
#include "exec/executor.h"
#include "plan/planner.h"

namespace fusco::engine {

class DeviceDomain;
class DevicePeers;
class Watch;

struct EngineConfig {
  Allocator allocator;
  std::int64_t operationTimeoutMs = 300000;  // 0: no limit
  std::int64_t maxStagingBytes = 0;          // 0: no limit
  plan::Balance balance = plan::Balance::none;
};

// An operation in the queue of an engine.
struct Submission {
  std::unique_ptr<Operation> operation;
  bool begun = false;
  std::atomic<bool> finished{false};  // completed or failed; then error may be read
  std::int64_t deadlineNs = 0;        // 0: none
  std::int64_t movedNs = 0;           // when a step moved last
  std::int64_t warnNs = 0;            // when to say next that nothing does
  std::exception_ptr error;
};

class Engine {
 public:
  Engine(std::unique_ptr<comm::Fabric> fabric, const EngineConfig& config);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  comm::Fabric& fabric() { return *fabric_; }
  const plan::Topology& topology() const { return fabric_->topology(); }
  // Of the caller's rows: on the host, or on the GPU. Memory of the library is the host's: see hostExecutor().
  exec::Executor& executor() { return *executor_; }
  exec::Executor& hostExecutor() { return exec::hostExecutor(); }
  // Ranks on GPUs of several nodes: the host drives, with the plan in its memory, and the rows' executor is the GPU's.
  exec::CudaExecutor* deviceExecutor() const { return deviceExecutor_.get(); }
  // Before a passage leads to or from a slot: lets the GPU copy there by itself, where it can.
  void adoptSlots(const transport::PostedLink& link, const std::byte* slot);
  // Where a passage leads to, or from, for a payload in the acquired slot, or in that which peek() shows: there, or the
  // link's own place for it in GPU memory.
  std::byte* payloadOut(transport::PostedLink& link, std::byte* inSlot);
  const std::byte* payloadIn(transport::PostedLink& link, const std::byte* inSlot);
  Statistics& statistics() { return statistics_; }
  const EngineConfig& config() const { return config_; }
  Ledger& ledger() { return ledger_; }
  // Collective, before the first operation: operations run on this GPU from now on.
  void useDevice(int device, int maxSms, std::int64_t timeoutMs);
  // Each rank can capture its transfers by itself.
  bool capturesTransfers() const;
  DeviceDomain* device() const { return device_.get(); }  // null on the host
  DevicePeers& devicePeers() { return *devicePeers_; }    // on a GPU only
  Buffer buffer() { return Buffer(&config_.allocator, &ledger_); }

  // The ranks of this rank's node, by local index.
  int nodeRanks() const { return static_cast<int>(nodeRanks_.size()); }
  int nodeRank(int localIndex) const { return nodeRanks_[static_cast<std::size_t>(localIndex)]; }
  int localIndex() const { return localIndex_; }
  // Of the default flows; a plan has its own (PlanState::streams).
  const Streams& streams() const { return balancer_.plain()->streams; }
  Balancer& balancer() { return balancer_; }

  // Operation slots take turns, the same on all ranks. Called when an operation is made, in the common order.
  int takeSlot() { return static_cast<int>(slotsTaken_++ % kOperationSlots); }
  std::uint64_t nextSequence(int channel) { return sequences_[channel]++; }
  // A plan is known by the turn that it took, so that ranks agree again after a call that failed on all of them; with a
  // slot of its own, by its number among such plans.
  std::uint64_t turn() const { return slotsTaken_ - 1; }
  std::uint64_t nextPlanNumber() { return plans_++; }
  // Counts the transfers of an ordered pair with a peer.
  std::uint64_t nextTransfer(int peer, bool send) { return transfers_[send ? 1 : 0][static_cast<std::size_t>(peer)]++; }
  // The number that the next receive from a peer will have.
  std::uint64_t transfersSeen(int peer) const { return transfers_[0][static_cast<std::size_t>(peer)]; }
  WindowBuffer& listWindow() { return listWindow_; }
  // Library windows for tensors that peers cannot map: one for each slot and direction (0 out, 1 in).
  std::byte* staging(int slot, int direction, std::size_t bytes);
  // Counts that planning publishes; and the planner with its tables.
  WindowBuffer& countsWindow(int slot) { return countsWindow_[slot]; }
  plan::Planner& planner() { return *planner_; }
  // Scratch of this thread of execution (operations run one at a time under the engine's lock).
  Buffer& scratch(int which) { return scratch_[which]; }
  static constexpr int kScratches = 4;

  // Queues an operation. With `async` the communicator's thread carries it on.
  std::shared_ptr<Submission> submit(std::unique_ptr<Operation> operation, bool async = false);
  // Runs what can run, of any operation; true if anything moved. Any thread.
  bool progress();
  // Helps until it is finished; throws its error.
  void wait(const std::shared_ptr<Submission>& submission);
  // For a driver that waits for several engines: what to do when nothing moved.
  std::uint32_t bell() const { return fabric_->bell(); }
  void rest(std::uint32_t bell, std::int64_t microseconds = 20000);
  // Waits for the oldest operation that was started with `async`; throws its error, or invalidUsage when there is none.
  void finishOldest();
  void finishAll();
  int startedOperations();

  // For a driver that runs an operation stage by stage on a thread of its own (stream.h); all under the engine's lock.
  // An operation holds its channel from begin to the end of its last stage; tryBegin is false while another one does.
  bool tryBegin(Operation& operation);
  Outcome runStage(Operation& operation, int stage);
  // The operation has failed: its counts are cleared, the communicator is broken and the peers are told. Returns the
  // code.
  Code abandon(Operation& operation, std::exception_ptr error);

  // Throws the sticky error, if any.
  void checkUsable();
  // Also looks whether a send that was not waited for has been refused.
  Code asyncError();
  std::string asyncErrorText();
  // Any thread, also while another one is in a call. When it returns nobody touches the caller's tensors any more but
  // the calls that are under way in other threads until they return; it is bounded (2 s), so this holds only of ranks
  // that run.
  void abort(const std::string& reason);

 private:
  void runThread();
  bool advance(Submission& submission);
  void failOperation(Submission& submission, std::exception_ptr error);
  Code breakDown(std::exception_ptr error);
  void tellAborted(const std::string& reason);
  void dropOpen(const std::string& reason);
  void leaveDevice();
  void hearComplaints();

  std::unique_ptr<comm::Fabric> fabric_;
  EngineConfig config_;
  exec::Executor* executor_;
  Ledger ledger_;
  Statistics statistics_;
  std::vector<int> nodeRanks_;
  int localIndex_ = 0;
  Balancer balancer_;
  std::uint64_t slotsTaken_ = 0;
  std::uint64_t plans_ = 0;
  std::uint64_t sequences_[kControlChannels] = {};
  WindowBuffer staging_[kOperationSlots + 1][2];  // the last for transfers
  Buffer scratch_[kScratches];
  std::vector<std::uint64_t> transfers_[2];
  WindowBuffer countsWindow_[kOperationSlots];
  WindowBuffer listWindow_;
  std::unique_ptr<plan::Planner> planner_;
  std::unique_ptr<exec::CudaExecutor> deviceExecutor_;
  std::shared_ptr<DeviceDomain> device_;
  std::shared_ptr<DevicePeers> devicePeers_;
  std::unique_ptr<Watch> watch_;

  std::mutex mutex_;                  // operations, links and scratch
  bool channelHeld_[kChannels] = {};  // by an operation that is run stage by stage
  std::deque<std::shared_ptr<Submission>> queue_;
  std::deque<std::shared_ptr<Submission>> started_;

  std::atomic<bool> idleOnLinks_{false};  // what was waited for when nothing moved

  std::mutex errorMutex_;
  Code error_ = Code::success;
  std::string errorText_;

  std::thread thread_;  // made with the first started operation
  std::mutex threadMutex_;
  std::condition_variable threadWake_;
  std::atomic<int> asyncOpen_{0};
  bool stop_ = false;
};

// The formula of docs/concepts.md, "memory": what a communicator and one plan hold beyond the caller's tensors.
struct WorkspaceShape {
  PlanRequest request;  // ids are not read; of weights only whether there are any
  std::int64_t sliceBytes = 0;
  int slices = 0;
  int ranks = 1;
  int nodes = 1;  // with as many ranks each
  bool onGpu = false;
  std::size_t rowBytes = 0;
  std::int64_t privateRows = 0;
};
std::size_t workspaceBytes(const WorkspaceShape& shape);

}  // namespace fusco::engine
