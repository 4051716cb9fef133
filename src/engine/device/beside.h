// What a plan on a GPU holds beside its received rows, in one allocation that peers can map: counters, what rank order
// tells of each row, tickets.
#pragma once

#include <cstddef>

#include "engine/device/domain.h"
#include "engine/plan_state.h"

namespace fusco::engine {

// Where the parts lie; the same for whoever knows the rank, the plan's shape and the number of rows.
struct BesideShape {
  int localExperts = 0;
  int firstExpert = 0;
  std::size_t rows = 0;
  std::size_t topk = 0;
  bool rankOrder = false;

  static BesideShape of(Engine& engine, const PlanRequest& request, int rank, std::size_t rows);
  std::size_t idsAt() const;
  std::size_t weightsAt() const;
  std::size_t ticketsAt() const;
  std::size_t bytes() const;
  kernels::BesideRows at(std::byte* memory) const;
};

class DeviceBeside {
 public:
  // Not zeroed, but for counters.
  DeviceBeside(Engine& engine, const PlanRequest& request, std::size_t rows);
  static bool wantsTickets(const PlanRequest& request);
  static bool wantsCounters(const PlanRequest& request);
  static bool wanted(const PlanRequest& request) { return wantsTickets(request) || wantsCounters(request); }

  std::byte* data() const { return block_.device; }
  const BesideShape& shape() const { return shape_; }
  kernels::BesideRows rows() const { return shape_.at(block_.device); }
  DevicePool::Block release() { return std::move(block_); }

 private:
  BesideShape shape_;
  DevicePool::Block block_;
};

}  // namespace fusco::engine
