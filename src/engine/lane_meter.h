// How fast this rank's rows leave and arrive by each lane of its node, as its links tell and its dispatches see.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "comm/fabric.h"
#include "engine/control.h"
#include "engine/routes.h"
#include "plan/lanes.h"

namespace fusco::engine {

// When the slices of a stream came in. The first one tells nothing: it may have waited.
class ArrivalClock {
 public:
  void took(std::size_t bytes, std::int64_t nowNs) {
    if (firstNs_ != 0) bytes_ += bytes;
    if (firstNs_ == 0) firstNs_ = nowNs;
    lastNs_ = nowNs;
  }
  std::uint64_t bytes() const { return bytes_; }
  std::int64_t ns() const { return lastNs_ - firstNs_; }

 private:
  std::int64_t firstNs_ = 0, lastNs_ = 0;
  std::uint64_t bytes_ = 0;
};

class LaneMeter {
 public:
  explicit LaneMeter(comm::Fabric& fabric) : fabric_(fabric) {}

  // From now on asks the links of these streams what has left by them.
  void watch(const Routes& routes);
  // A stream in has brought all its slices.
  void arrived(const Stream& stream, const ArrivalClock& clock);
  // Since the last sample of each lane; a lane whose traffic was too little to tell is not measured yet, and goes on.
  // By lane of the node.
  std::vector<plan::LaneSample> takeOut();
  // Into this rank, by the one lane by which it takes in.
  plan::LaneSample takeIn();

 private:
  // What went by a path to or from a peer, in how much time.
  struct Way {
    std::uint64_t bytes = 0;
    std::int64_t ns = 0;
  };
  using Key = std::pair<int, int>;  // peer, path
  struct WayOut : Way {
    transport::PostedLink::Sent seen[kOperationSlots];
  };

  comm::Fabric& fabric_;
  std::map<Key, WayOut> out_;
  std::map<Key, Way> in_;
};

}  // namespace fusco::engine
