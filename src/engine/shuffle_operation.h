// What dispatch, combine and backward share: a plan, the meeting of the node's ranks, and how memory is announced.
#pragma once

#include <memory>
#include <string>
#include <vector>

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
  void reset() override { meeting_.begin(); }
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
  };
  // Fills and posts the next slice of a stream; idle without a credit, complete when the last has left the caller's
  // memory.
  Outcome extractSlice(StreamOut& out, const Stream& stream, const SourceRows* tensors);
  // Throws unless the slice belongs to this operation and every row of it has its place in this node.
  void checkRows(const Slice& slice, const std::vector<SourceRows>& tensors) const;
  void complete(Slice& slice, std::uint32_t flags, std::size_t rowOffset);
  void count(std::size_t bytes);
  void post(transport::PostedLink& link, Slice& slice, std::size_t bytes, std::uint32_t flags, std::size_t rowOffset);
  // The operation's number in slices.
  std::uint64_t number() const { return meeting_.sequence(); }

  Engine& engine_;
  std::shared_ptr<PlanState> plan_;
  int slot_ = -1;  // taken when the operation is queued
  Meeting meeting_;
  std::uint64_t signature_ = 0;
  std::vector<transport::Segment> gathered_;
};

}  // namespace fusco::engine
