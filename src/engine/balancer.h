// The balancer in operation (docs/design.md): what a rank tells in a plan's exchange, what all ranks make of it, and
// the routes that the next plan is made with. Everything that is decided here follows from what all ranks have
// exchanged. Under the engine's lock.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "comm/fabric.h"
#include "engine/lane_meter.h"
#include "engine/routes.h"
#include "plan/balance.h"
#include "plan/lanes.h"

namespace fusco::engine {

class Balancer {
 public:
  Balancer(comm::Fabric& fabric, plan::Balance balance);

  // The default flows, which never change.
  const std::shared_ptr<const Routes>& plain() const { return plain_; }
  // Those that the next plan is made with.
  const std::shared_ptr<const Routes>& current() const { return current_; }

  // Words that each rank tells when a plan with these loads is made; 0: nothing is told.
  std::size_t recordWords() const;
  // `copiesOfNode` of the plan that is being made.
  void fillRecord(std::span<const std::int32_t> copiesOfNode, std::int32_t* record);
  // All ranks' records, in rank order: the routes for the plan after this one.
  void learn(std::span<const std::int32_t> records);

  bool measures() const { return measures_; }
  LaneMeter& meter() { return meter_; }
  const plan::LaneSpeeds& speeds() const { return speeds_; }

 private:
  void followLanes(std::span<const std::int32_t> records);
  void tellOfSlowLanes();

  comm::Fabric& fabric_;
  const plan::Balance balance_;
  const bool active_;    // there is something to choose
  const bool measures_;  // lanes are compared
  std::shared_ptr<const Routes> plain_, current_;
  LaneMeter meter_;
  plan::LaneSpeeds speeds_;
  std::vector<char> toldSlow_;  // by lane of this rank's node
};

}  // namespace fusco::engine
