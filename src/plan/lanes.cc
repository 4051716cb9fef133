#include "plan/lanes.h"

#include <algorithm>

namespace fusco::plan {

namespace {

constexpr std::int32_t kNotMeasured = -1;

struct Shown {
  std::int32_t slower = kNotMeasured, faster = kNotMeasured;

  void take(std::int32_t speed) {
    faster = slower == kNotMeasured ? kFullSpeed : std::max(slower, speed);
    slower = slower == kNotMeasured ? speed : std::min(slower, speed);
  }
  // By what the slower direction has shown in the step before.
  std::int32_t speed(std::int32_t before) const {
    const std::int32_t again = std::max(slower, before);
    return slower != kNotMeasured && 3 * again < kFullSpeed ? again : faster;
  }
};

// Of a full lane, by the fastest of the node's.
void compare(std::span<const std::int64_t> rates, std::span<Shown> shown) {
  const std::int64_t fastest = *std::max_element(rates.begin(), rates.end());
  for (std::size_t lane = 0; lane < rates.size(); ++lane) {
    if (rates[lane] <= 0) continue;
    shown[lane].take(
        static_cast<std::int32_t>(static_cast<double>(rates[lane]) * kFullSpeed / static_cast<double>(fastest)));
  }
}

std::int32_t damped(std::int32_t speed, std::int32_t shown) {
  if (shown == kNotMeasured) return speed + std::max(1, speed / 16);
  if (4 * std::abs(shown - speed) < speed) return speed;
  if (shown < speed / 2) return shown;
  if (shown < speed) return (speed + shown) / 2;
  return std::min(shown, speed + speed / 2);
}

}  // namespace

LaneSample together(std::span<const LaneSample> ways) {
  LaneSample all;
  std::int64_t busiest = 0, asked = 0, rates = 0;
  for (const LaneSample& way : ways) {
    if (way.bytesPerSecond > 0) busiest = std::max(busiest, way.bytes);
  }
  for (const LaneSample& way : ways) {
    if (way.bytesPerSecond <= 0) continue;
    all.bytes += way.bytes;
    if (2 * way.bytes < busiest) continue;
    asked += way.bytes;
    rates += way.bytesPerSecond;
  }
  if (asked > 0) {
    all.bytesPerSecond = static_cast<std::int64_t>(static_cast<double>(rates) * static_cast<double>(all.bytes) /
                                                   static_cast<double>(asked));
  }
  return all;
}

LaneSpeeds::LaneSpeeds(int nodes, int lanes)
    : lanes_(lanes),
      speeds_(static_cast<std::size_t>(nodes) * static_cast<std::size_t>(lanes), kFullSpeed),
      slower_(speeds_) {}

void LaneSpeeds::follow(std::span<const std::int64_t> ratesOut, std::span<const std::int64_t> ratesIn) {
  const auto lanes = static_cast<std::size_t>(lanes_);
  std::vector<Shown> shown(speeds_.size());
  for (std::size_t first = 0; first < speeds_.size(); first += lanes) {
    const std::span<Shown> ofNode(shown.data() + first, lanes);
    compare(ratesOut.subspan(first, lanes), ofNode);
    compare(ratesIn.subspan(first, lanes), ofNode);
  }
  for (std::size_t i = 0; i < speeds_.size(); ++i) {
    speeds_[i] = std::clamp(damped(speeds_[i], shown[i].speed(slower_[i])), kLeastSpeed, kFullSpeed);
    slower_[i] = shown[i].slower == kNotMeasured ? kFullSpeed : shown[i].slower;
  }
}

}  // namespace fusco::plan
