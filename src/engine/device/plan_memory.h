// What a plan holds on a GPU: its arena, what the planner works with, and on the host a copy of the arena's head.
#pragma once

#include <memory>
#include <vector>

#include "engine/device/beside.h"
#include "engine/device/domain.h"
#include "engine/plan_state.h"
#include "plan/frame.h"

namespace fusco::engine {

class DevicePlan {
 public:
  // Uploads what is known before any routing map; where ranks of several nodes plan on the host, there is only the head
  // of an arena, for counts. Throws invalidArgument where the GPU cannot plan this shape.
  DevicePlan(Engine& engine, const PlanRequest& request);
  ~DevicePlan();
  DevicePlan(const DevicePlan&) = delete;
  DevicePlan& operator=(const DevicePlan&) = delete;

  std::byte* arena() const { return block_.device; }
  std::uint64_t arenaBytes() const { return arenaBytes_; }
  const plan::ArenaOffsets& offsets() const { return offsets_; }
  // The head of the arena: header, counts, flows. As the frame has it until counts are brought to the host.
  std::byte* head() const { return block_.host; }
  std::uint64_t headBytes() const { return offsets_.copies; }
  kernels::PlanStatus& status() const { return *reinterpret_cast<kernels::PlanStatus*>(block_.host + statusAt_); }
  kernels::PlanPointers pointers() const { return pointersTo(arena(), offsets_); }
  kernels::PlanArgs::Rank planner(const PlanRequest& request, int rank, int node) const;

  // Memory beside `rows` rows, if the plan wants any; once.
  void holdBeside(const PlanRequest& request, std::size_t rows);
  const DeviceBeside* beside() const { return beside_.get(); }
  // Rank order: the routing map as it was when the plan was made, for dispatches to come.
  std::byte* keptIds() const { return block_.device + keptIdsAt_; }
  float* keptWeights() const { return reinterpret_cast<float*>(block_.device + keptWeightsAt_); }

  // The plans of the node's ranks, by local index, as this GPU reaches them: learnt when the plan is made.
  struct OfRank {
    kernels::PlanPointers pointers;
    std::int64_t tokens;  // at most
  };
  void learn(int localIndex, const PlanRequest& request, const std::byte* arena, std::int64_t tokens);
  const OfRank& ofRank(int localIndex) const { return ofRanks_[static_cast<std::size_t>(localIndex)]; }
  int mostTokensOfNode() const;

  // int32 [2][keys]: rows of each key of lower ranks, and of all ranks; not in the slotted layout.
  const std::int32_t* exchanged() const { return reinterpret_cast<const std::int32_t*>(block_.device + exchangedAt_); }
  std::size_t keys() const { return keys_; }

  // Plans whose counts the host never learns (capacity, and slotted) can be captured.
  bool countsStayOnDevice() const { return countsStay_; }
  // For an input that is cast before its rows leave the node; grows, contents are lost then.
  std::byte* castMemory(std::size_t bytes);
  // Its memory is not given out again before what was launched for it has ended, on any stream. Before a launch that is
  // captured: nor while the graph is there.
  void holdInGraph(exec::cuda::Stream stream);
  // Behind a launch on `stream` that is not: records an event, or shares the one that another plan of it has recorded.
  std::shared_ptr<exec::cuda::Event> recordEnd(exec::cuda::Stream stream);
  void shareEnd(exec::cuda::Stream stream, std::shared_ptr<exec::cuda::Event> end) { endOn(stream) = std::move(end); }
  // Where its planning has ended in a capture. The GPUs have met in it, behind all that their streams had and all that
  // used these slots: what follows it at once need not meet again.
  struct Captured {
    static constexpr std::uint64_t kNever = ~std::uint64_t{0};
    exec::cuda::Stream stream = nullptr;
    exec::cuda::CaptureEdges planned;  // behind the plans of this GPU
    // Behind the end of the operation: the plans of all GPUs. But those of small routing maps, which processes bring each
    // other before, end it without a meeting, and it is the same as `planned`.
    exec::cuda::CaptureEdges met;
    std::uint64_t ends[kOperationSlots] = {};  // of the slots' orders then; kNever: it has not come after the last
  };
  void setCaptured(Captured captured) { captured_ = std::move(captured); }
  const Captured& captured() const { return captured_; }
  // Whether what `stream` has now, with `slot`, follows it at once.
  bool followedBy(exec::cuda::Stream stream, int slot) const;
  // Until all of it has ended.
  void settle() const;
  // What a first dispatch writes beside its rows is there, or coming: not by one that is only captured.
  bool described() const { return described_; }
  void setDescribed() { described_ = true; }

 private:
  void clearHead();
  std::shared_ptr<exec::cuda::Event>& endOn(exec::cuda::Stream stream);
  // The one flow of a plan in one node.
  static kernels::PlanPointers pointersTo(const std::byte* arena, const plan::ArenaOffsets& offsets);

  Engine& engine_;
  DeviceDomain& domain_;
  const bool countsStay_;
  plan::ArenaOffsets offsets_{};
  std::uint64_t arenaBytes_ = 0;
  std::size_t frameAt_ = 0, homesAt_ = 0, flowsAt_ = 0, scratchAt_ = 0;
  std::size_t exchangedAt_ = 0, keys_ = 0, keptIdsAt_ = 0,
              keptWeightsAt_ = 0;  // these too in the block's device memory
  std::size_t statusAt_ = 0;       // in its host memory
  plan::ArenaHeader frame_{};
  DevicePool::Block block_;
  DevicePool::Block castBlock_;
  std::unique_ptr<DeviceBeside> beside_;
  std::vector<OfRank> ofRanks_;
  std::vector<std::pair<exec::cuda::Stream, std::shared_ptr<exec::cuda::Event>>> uses_;
  std::shared_ptr<const void> inGraphs_;  // graphs hold it too
  unsigned long long capture_ = 0;        // the last one that does
  Captured captured_;
  bool described_ = false;
};

}  // namespace fusco::engine
