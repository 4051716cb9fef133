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
  kernels::PlaceArgs placeArgs(const std::vector<DeviceOperation*>& all, int tensor) const;

  const DispatchRequest request_;
  std::vector<std::byte*> bases_[2];  // of each tensor, by local index
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
