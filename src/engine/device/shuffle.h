// Dispatch and combine on GPUs.
#pragma once

#include "engine/device/operation.h"
#include "engine/device/plan_memory.h"
#include "engine/shuffle.h"

namespace fusco::engine {

class DeviceDispatch : public DeviceOperation {
 public:
  DeviceDispatch(Engine& engine, std::shared_ptr<PlanState> plan, const DispatchRequest& request,
                 exec::cuda::Stream stream);

 protected:
  void announce(Meeting::Announcement& announcement) override;
  void bind() override;
  void launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                 exec::cuda::Stream stream) override;
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

  const DispatchRequest request_;
  Tensor tensors_[2];
  std::vector<std::byte*> bases_[2];           // of each tensor, by local index
  std::uint32_t flags_ = 0;                    // what this rank wants to have beside its rows, this time
  std::vector<kernels::BesideBoard> growing_;  // by local index: counters of rows as they are complete
  std::vector<kernels::BesideRows> beside_;    // the same: what is written when all rows are there
  bool anyGrowing_ = false, anyBeside_ = false;
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

 private:
  CombineRequest request_;
  std::vector<std::byte*> bases_;
};

}  // namespace fusco::engine
