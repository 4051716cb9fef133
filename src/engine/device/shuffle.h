// Dispatch and combine on GPUs.
#pragma once

#include "engine/device/operation.h"
#include "engine/device/plan_memory.h"
#include "engine/shuffle.h"

namespace fusco::engine {

// How rows come to another GPU that wants them for several experts, or that sums them: one by one; or once, and the
// work there goes on beside their coming, or behind it.
enum class Across { no, beside, behind };

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
  bool hasRest() const override { return across_ == Across::behind; }
  void agree(const std::vector<DeviceOperation*>& all) override;
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
  bool crossesOnce(const std::vector<DeviceOperation*>& all) const;
  void tellOthers(kernels::PlaceArgs& args, const std::vector<DeviceOperation*>& all) const;
  void expand(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget, exec::cuda::Stream stream) const;

  const DispatchRequest request_;
  Tensor tensors_[2];
  std::vector<std::byte*> bases_[2];           // of each tensor, by local index
  std::uint32_t flags_ = 0;                    // what this rank wants to have beside its rows, this time
  std::vector<kernels::BesideBoard> growing_;  // by local index: counters of rows as they are complete
  std::vector<kernels::BesideRows> beside_;    // the same: what is written when all rows are there
  bool anyGrowing_ = false, anyBeside_ = false, anyCounted_ = false;
  Across across_ = Across::no;
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
  bool hasRest() const override { return across_ == Across::behind; }
  void agree(const std::vector<DeviceOperation*>& all) override;

 private:
  std::size_t rowBytes() const { return request_.elements * exec::elementBytes(request_.type); }
  bool crossesOnce() const;
  int mostPartials() const;
  void bringPartials(const kernels::Budget& budget, exec::cuda::Stream stream) const;
  void sumRows(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
               exec::cuda::Stream stream) const;

  CombineRequest request_;
  std::vector<std::byte*> bases_;
  Across across_ = Across::no;
  std::uint32_t* arrivals_ = nullptr;  // this rank's, while it launches
  std::byte* partials_ = nullptr;
};

}  // namespace fusco::engine
