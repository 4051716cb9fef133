// Planning on GPUs: kernels make the plans of all ranks that launch together (docs/design.md).
#pragma once

#include "engine/device/operation.h"
#include "engine/device/plan_memory.h"

namespace fusco::engine {

class DevicePlanning : public DeviceOperation {
 public:
  DevicePlanning(Engine& engine, std::shared_ptr<PlanState> plan, exec::cuda::Stream stream);
  void clearCounts() override { plan_->clearCounts(); }

 protected:
  void takePlace() override;
  void reset() override;
  void announce(Meeting::Announcement& announcement) override;
  void bind() override;
  void launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                 exec::cuda::Stream stream) override;
  void launchRest(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                  exec::cuda::Stream stream) override;
  bool hasRest() const override { return !domain_.waitsOnHost() && !domain_.oneLaunch() && !small_; }
  // Where GPUs meet in kernels, what others read of a rank is brought to them in a meeting, if routing maps are small;
  // else it is its counts, behind the meeting in between, and the next planning clears them, behind the one at the end.
  bool meetsBefore() const override { return !domain_.meetsOnGpu(); }
  bool meetsBehind() const override { return !domain_.meetsOnGpu() || !small_; }
  bool usesSlotMemory() const override { return true; }
  bool canBeFollowed() const override;
  Outcome finish() override;

 private:
  kernels::PlanArgs arguments(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget) const;
  kernels::PlanArgs mapsOfNode(const kernels::Budget& budget) const;
  void bringMaps(const std::vector<DeviceOperation*>& all, exec::cuda::Stream stream) const;
  void announceMap(Meeting::Announcement& announcement);
  void readCounts();
  void checkCapacity();
  bool comparesRows() const { return plan_->request.options.capacityRows > 0 && !plan_->device->countsStayOnDevice(); }

  Meeting rows_;  // where more rows than fit are an error: what every rank would receive
  bool announcedRows_ = false;
  int blocksOfCount_ = 0;  // that this rank had in the launch that counted
  bool small_ = false;     // several GPUs: each counts all routing maps by itself, and no meeting is needed between
};

}  // namespace fusco::engine
