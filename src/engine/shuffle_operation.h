// What dispatch, combine and backward share: a plan, the meeting of the node's ranks, and how memory is announced.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/device/rows.h"
#include "engine/engine.h"
#include "engine/meeting.h"
#include "engine/plan_state.h"
#include "engine/shuffle.h"
#include "engine/slice.h"
#include "engine/stream_io.h"

namespace fusco::engine {

class ShuffleOperation : public Operation {
 public:
  ShuffleOperation(OperationKind kind, Engine& engine, std::shared_ptr<PlanState> plan);
  std::string describe() const override;
  int channel() const override { return slot_; }
  void clearCounts() override { plan_->clearCounts(); }
  void giveUp() override;

 protected:
  void takePlace() override;
  void reset() override;
  bool needs(const Step& step, int rank) const override;
  // Steps that are the same for all.
  Outcome announceDone();
  Outcome waitDone() { return meeting_.allDone() ? Outcome::complete : Outcome::idle; }
  // Parameters that all ranks of the node must share; the plan's number is filled in.
  Parameters parameters(std::size_t rowBytes, std::size_t rowBytes2, std::uint64_t type, std::uint64_t options);
  // Hash of the parameters, which every slice carries. Set by parameters().
  std::uint64_t signature() const { return signature_; }
  // How peers reach a tensor of the caller: in place, by process_vm, or not at all.
  enum class Reach { mapped, processVm, staged };
  Reach reachOf(const void* address, std::size_t bytes) const;
  transport::PostedLink& linkTo(const Stream& stream) { return engine_.fabric().link(stream.peer, slot_, stream.path); }
  // Rows of one tensor, as a slice takes them up.
  struct SourceRows {
    const std::byte* rows;
    std::size_t rowBytes;
    bool ofLibrary = false;  // in memory of the library, on the host whatever the communicator is on
  };
  exec::Executor& executorOf(bool ofLibrary) { return ofLibrary ? engine_.hostExecutor() : engine_.executor(); }
  // Fills and posts the next slice of the stream out with this index; idle without a credit, complete when the last has
  // left the caller's memory.
  Outcome extractSlice(std::size_t stream, StreamOut& out, const SourceRows* tensors);
  // How the executor sees slices of a stream; one of each direction at a time.
  enum Direction { kOut = 0, kIn = 1 };
  exec::Passage& passage(Direction direction, std::size_t stream) {
    return engine_.executor().passage((static_cast<std::uint64_t>(slot_) * 2 + direction) << 32 | stream);
  }
  // A slice that is posted when the executor has filled it. Complete: there is none, or it has been posted.
  struct Leaving {
    bool open = false;
    Slice slice;
    std::size_t bytes = 0, rowOffset = 0;
    std::uint32_t flags = 0;
    bool mirrored = false;  // the payload was filled in the link's GPU memory
  };
  Outcome postWhenFilled(Leaving& leaving, exec::Passage& passage, transport::PostedLink& link);
  // Throws unless the slice belongs to this operation and every row of it has its place in this node.
  void checkRows(const Slice& slice, const std::vector<SourceRows>& tensors) const;
  void complete(Slice& slice, std::uint32_t flags, std::size_t rowOffset);
  void count(std::size_t bytes);
  void post(transport::PostedLink& link, Slice& slice, std::size_t bytes, std::uint32_t flags, std::size_t rowOffset,
            bool mirrored = false);
  // The operation's number in slices.
  std::uint64_t number() const { return meeting_.sequence(); }
  // Under which memory is opened to peers.
  std::uint64_t placesTag() const { return number() + 1; }

  Engine& engine_;
  std::shared_ptr<PlanState> plan_;
  int slot_ = -1;  // taken when the operation is queued
  Meeting meeting_;
  std::uint64_t signature_ = 0;
  // Rows of a slice out that have a place of their own in the peer's node, which it has opened to this rank: where.
  bool findTargets(transport::PostedLink& link, const Stream& stream, const StreamOut::Cut& cut, std::size_t rowBytes);
  std::vector<transport::Segment> gathered_;
  std::vector<transport::PostedLink::Target> targets_;
  std::vector<Leaving> leaving_;  // by stream out, or where slices are sent back by stream in
};

}  // namespace fusco::engine
