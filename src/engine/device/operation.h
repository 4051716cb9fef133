// An operation of a communicator on a GPU: the ranks of the node meet on the host, tell each other where their memory
// is, and launch kernels on their streams. It is complete when it is launched; rows follow in the order of the streams.
//
// Ranks of one process and GPU launch together. Where these are not all of the node, GPUs wait for each other by events
// between their streams (one process) or in kernels (several), and the host never waits for a GPU. Only where processes
// share one does a rank let its stream run empty before it says ready, and before it says done.
#pragma once

#include <atomic>
#include <exception>
#include <string>
#include <vector>

#include "engine/device/domain.h"
#include "engine/engine.h"
#include "engine/meeting.h"
#include "engine/plan_state.h"

namespace fusco::engine {

class DeviceOperation : public Operation {
 public:
  DeviceOperation(OperationKind kind, Engine& engine, std::shared_ptr<PlanState> plan, exec::cuda::Stream stream);
  ~DeviceOperation() override;
  std::string describe() const override;
  int channel() const override { return slot_; }
  void giveUp() override;

  // Called for one of the members, under the group's lock; `all` by member. Launches for all of them.
  void launchTogether(const std::vector<DeviceOperation*>& all);
  void launched(std::exception_ptr error, bool bySelf);

  exec::cuda::Stream stream() const { return stream_; }
  PlanState& plan() { return *plan_; }

 protected:
  void takePlace() override;
  void reset() override;
  Outcome run(const Step& step) override;

  // Fills in what this rank tells the others. Where these do not launch together, what it launches on its stream comes
  // before all that they launch.
  virtual void announce(Meeting::Announcement& announcement) = 0;
  // Once all are ready: learn where everyone's memory is.
  virtual void bind() {}
  // On the current GPU, for all members that share a launch. Operations of one kind only come together.
  virtual void launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                         exec::cuda::Stream stream) = 0;
  // The same once more when all have ended what they launched first, where ranks are on several GPUs.
  virtual void launchRest(const std::vector<DeviceOperation*>&, const kernels::Budget&, exec::cuda::Stream) {}
  virtual bool hasRest() const { return false; }
  // Whether the GPUs meet before the first launch, and behind the last one.
  virtual bool meetsBefore() const { return true; }
  virtual bool meetsBehind() const { return true; }
  // Whether it begins where the planning of its plan has ended (DevicePlan::Captured), on all ranks; and whether it is
  // a planning that can be followed so.
  virtual bool follows() const { return false; }
  virtual bool canBeFollowed() const { return false; }
  // Whether launches use memory of the operation slot: words that other GPUs write, and a planner's counts.
  virtual bool usesSlotMemory() const { return !domain_.oneLaunch() && !domain_.waitsOnHost(); }
  // After the launch, on this rank's own thread; may be called until it is complete.
  virtual Outcome finish() { return Outcome::complete; }

  Parameters parameters(std::size_t rowBytes, std::size_t rowBytes2, std::uint64_t type, std::uint64_t options) const;
  // SMs that the ranks of a launch may take together.
  static kernels::Budget budgetOf(const std::vector<DeviceOperation*>& all);
  // Announces a tensor under kRows, kRows2, kTickets or kLanding, and where a peer has one.
  void announceTensor(Meeting::Announcement& announcement, MemoryRole role, const void* pointer, std::size_t bytes);
  std::byte* tensorOf(int localIndex, MemoryRole role) const;
  bool capturing() const { return capturing_; }
  // After the launch: throws when it has waited in vain.
  void checkWaits() const;

  Engine& engine_;
  DeviceDomain& domain_;
  std::shared_ptr<PlanState> plan_;
  int slot_ = -1;
  Meeting meeting_;

 private:
  // Members that share a launch, and the stream that it is on.
  struct Part {
    std::vector<DeviceOperation*> all;
    std::vector<exec::cuda::Stream> others;  // of members, beside the leader
    // Of a planning: where its last launch ended, and which slots it has come after.
    exec::cuda::CaptureEdges planned;
    bool begun[kOperationSlots] = {};
    exec::cuda::Stream leader() const { return all.front()->stream_; }
    DeviceDomain& domain() const { return all.front()->domain_; }
  };
  static std::vector<Part> partsOf(const std::vector<DeviceOperation*>& all);
  // What is launched on any GPU's stream from now on comes after what is on all of them.
  void meet(const std::vector<Part>& parts) const;
  // What was launched for a part still uses its plans' memory.
  void recordUse(const Part& part) const;
  void beginSlots(Part& part) const;
  // What a dispatch needs to follow this planning; and such a dispatch's first and last step.
  void keepCaptured(const Part& part) const;
  void rewind(const Part& part) const;
  void takeBack(const Part& part) const;

  Outcome ready();
  Outcome launchStep();

  exec::cuda::Stream stream_;
  bool capturing_ = false;
  bool arrived_ = false;
  std::atomic<bool> launched_{false};
  std::exception_ptr launchError_;
  std::shared_ptr<const WaitWords> waits_;  // of the domain that launched
};

}  // namespace fusco::engine
