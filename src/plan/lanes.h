// How fast the lanes of a cluster are, as all ranks agree on it, and how that follows what is measured. Pure: ranks
// that are told the same come to the same.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fusco::plan {

// Speed of a lane in parts of a full one. No lane is thought slower than kLeastSpeed, so that each keeps some traffic,
// by which it is seen to recover.
inline constexpr std::int32_t kFullSpeed = 1024;
inline constexpr std::int32_t kLeastSpeed = 32;

// What went by a way in some time while something was under way there.
struct LaneSample {
  std::int64_t bytes = 0;
  std::int64_t bytesPerSecond = 0;  // 0: not measured
};

// Several ways of one lane as one: their rates are added up, since they go on side by side. Ways with less than half
// of the busiest one's bytes are not asked (they are over before the others have slowed them down), but counted.
LaneSample together(std::span<const LaneSample> ways);

// Speeds of the lanes, [node * lanes + lane], full at first.
class LaneSpeeds {
 public:
  LaneSpeeds(int nodes, int lanes);

  int lanes() const { return lanes_; }
  const std::vector<std::int32_t>& speeds() const { return speeds_; }
  std::int32_t of(int node, int lane) const { return speeds_[static_cast<std::size_t>(node) * lanes_ + lane]; }

  // A step's measurements of rates, [node * lanes + lane], 0 where there is none; out of the node and into it. A lane
  // is compared with the fastest one of its node in the same direction. It shows the faster direction (not measured
  // counts as full there): rates also depend on what the other end of each way has to do, so that a lane is slow at
  // once only if both directions say so. What one direction alone says counts if it is below a third, two steps
  // running. The damping rule, for a lane that was thought to have speed s and now shows m (both of a full lane):
  //   m within a quarter of s: noise; s stays.
  //   m below s / 2: something has happened; s becomes m.
  //   m below s: s moves half of the way to m.
  //   m above s: s rises to m, but by no more than half of itself in a step.
  //   not measured: s rises by a sixteenth of itself, so that a lane that is too slow to be measured is tried again.
  // Rates do not depend on how much a lane is given, so nothing here answers to itself; a lane's share falls at once
  // and comes back in a few steps.
  void follow(std::span<const std::int64_t> ratesOut, std::span<const std::int64_t> ratesIn);

 private:
  int lanes_;
  std::vector<std::int32_t> speeds_;
  std::vector<std::int32_t> slower_;  // direction, as it was shown in the step before; full where it was not
};

}  // namespace fusco::plan
