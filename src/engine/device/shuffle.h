// Dispatch and combine on GPUs.
#pragma once

#include "engine/device/operation.h"
#include "engine/device/plan_memory.h"
#include "engine/shuffle.h"

namespace fusco::engine {

// How rows come to another GPU that wants them for several experts, or that sums them: one by one; or once, and the
// work there goes on beside their coming, or behind it.
enum class Across { no, beside, behind };

// How the ranks of a node, which all compute the same from what they have told each other, decide on it.
class Crossing {
 public:
  // Whether rows of this plan might cross once, as far as its shape goes.
  void consider(const DeviceDomain& domain, const PlanState& plan, std::size_t rowBytes, double overhead,
                bool captured);
  // This rank's flags, if its own rows `may`.
  std::uint32_t flags(const DeviceDomain& domain, bool may) const;
  void bind(const Meeting& meeting, int ranks);
  Across across() const { return across_; }
  // Whether other launches are told of what comes; with that, words for it are needed.
  bool tells(const DeviceDomain& domain) const { return considered_ && domain.mayWaitBeside(captured_); }

 private:
  bool considered_ = false, captured_ = false;
  Across across_ = Across::no;
};

class DeviceDispatch : public DeviceOperation {
 public:
  DeviceDispatch(Engine& engine, std::shared_ptr<PlanState> plan, const DispatchRequest& request,
                 exec::cuda::Stream stream);

 protected:
  void announce(Meeting::Announcement& announcement) override;
  void bind() override;
  void launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                 exec::cuda::Stream stream) override;
  void launchRest(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                  exec::cuda::Stream stream) override;
  bool hasRest() const override { return crossing_.across() == Across::behind; }
  bool follows() const override { return follows_; }
  Outcome finish() override;

 private:
  struct Tensor {
    const std::byte* input = nullptr;
    std::byte* output = nullptr;
    std::size_t rowBytes = 0;  // 0: there is none
  };

  kernels::PlaceArgs placeArgs(const std::vector<DeviceOperation*>& all, int tensor) const;
  void fillGaps(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                exec::cuda::Stream stream) const;
  void resetBeside(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                   exec::cuda::Stream stream) const;
  void describeRows(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                    exec::cuda::Stream stream) const;
  kernels::ResetArgs::Rank resetOf() const;
  std::uint32_t besideFlags() const;
  void announceCrossing(Meeting::Announcement& announcement);
  // Pieces of rows that a rank sends at most, all of which have words.
  std::uint32_t unitsOfRank() const;
  void tellOthers(kernels::PlaceArgs& args, const std::vector<DeviceOperation*>& all) const;
  void expand(const kernels::Budget& budget, exec::cuda::Stream stream) const;
  // What is launched for rows that come from other GPUs, behind their plans.
  void meetPlans(exec::cuda::Stream stream) const;

  const DispatchRequest request_;
  Tensor tensors_[2];
  std::vector<std::byte*> bases_[2];           // of each tensor, by local index
  std::uint32_t flags_ = 0;                    // what this rank wants to have beside its rows, this time
  std::vector<kernels::BesideBoard> growing_;  // by local index: counters of rows as they are complete
  std::vector<kernels::BesideRows> beside_;    // the same: what is written when all rows are there
  bool anyGrowing_ = false, anyBeside_ = false, follows_ = false;
  Crossing crossing_;
  std::vector<std::uint32_t*> arrivals_;  // by local index, of the first rank of each part
};

class DeviceCombine : public DeviceOperation {
 public:
  DeviceCombine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request,
                exec::cuda::Stream stream);

 protected:
  void announce(Meeting::Announcement& announcement) override;
  void bind() override;
  void launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                 exec::cuda::Stream stream) override;
  void launchRest(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                  exec::cuda::Stream stream) override;
  bool hasRest() const override { return crossing_.across() == Across::behind; }

 private:
  std::size_t rowBytes() const { return request_.elements * exec::elementBytes(request_.type); }
  bool mayBringPartials() const;
  void announceCrossing(Meeting::Announcement& announcement);
  // Sums of a token's rows come from so many ranks at most.
  int mostPartials() const;
  // The multiprocessors that sums fill, as far as this rank knows before it has met the others; 0: they fill none.
  int filled() const;
  // In which this rank would have sums cross, who take the longest that any of them wants.
  kernels::RowPieces wantedPieces() const;
  void bringPartials(const kernels::Budget& budget, exec::cuda::Stream stream) const;
  kernels::SumArgs sumArgs(const std::vector<DeviceOperation*>& all) const;

  CombineRequest request_;
  std::vector<std::byte*> bases_;
  Crossing crossing_;
  int filled_ = 0;
  kernels::RowPieces pieces_{};
  std::vector<std::byte*> partials_;      // by local index
  std::vector<std::uint32_t*> arrivals_;  // the same
};

}  // namespace fusco::engine
