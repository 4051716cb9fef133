#include "engine/lane_meter.h"

#include <algorithm>

namespace fusco::engine {

namespace {

// Below these the start of a transfer and the resolution of clocks say more than the lane. Kernels tell how long a
// socket was busy in steps of up to 10 ms.
constexpr std::uint64_t kLeastBytes = 256 * 1024;
constexpr std::int64_t kLeastSendNs = 40'000'000;
constexpr std::int64_t kLeastArrivalNs = 1'000'000;

plan::LaneSample sampleOf(std::uint64_t bytes, std::int64_t ns) {
  if (bytes == 0 || ns <= 0) return {};
  return {
      static_cast<std::int64_t>(bytes),
      std::max<std::int64_t>(1, static_cast<std::int64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(ns)))};
}

}  // namespace

void LaneMeter::watch(const Routes& routes) {
  for (const auto* streams : {&routes.streams.out, &routes.streams.in}) {
    for (const Stream& stream : *streams) out_.try_emplace({stream.peer, stream.path});
  }
}

void LaneMeter::arrived(const Stream& stream, const ArrivalClock& clock) {
  if (clock.bytes() == 0) return;
  Way& way = in_[{stream.peer, stream.path}];
  way.bytes += clock.bytes();
  way.ns += clock.ns();
}

std::vector<plan::LaneSample> LaneMeter::takeOut() {
  const plan::Topology& topology = fabric_.topology();
  const auto lanes = static_cast<std::size_t>(topology.lanesPerNode());
  std::vector<std::vector<plan::LaneSample>> ways(lanes);
  std::vector<std::uint64_t> bytes(lanes, 0);
  std::vector<std::int64_t> longest(lanes, 0);
  const auto laneOf = [&](const Key& key) {
    return static_cast<std::size_t>(topology.laneOf(fabric_.rank(), key.first, key.second));
  };
  for (auto& [key, way] : out_) {
    for (int channel = 0; channel < kOperationSlots; ++channel) {
      const transport::PostedLink::Sent sent = fabric_.link(key.first, channel, key.second).sent();
      way.bytes += sent.bytes - way.seen[channel].bytes;
      way.ns += sent.busyNs - way.seen[channel].busyNs;
      way.seen[channel] = sent;
    }
    const std::size_t lane = laneOf(key);
    ways[lane].push_back(sampleOf(way.bytes, way.ns));
    bytes[lane] += way.bytes;
    longest[lane] = std::max(longest[lane], way.ns);
  }
  std::vector<plan::LaneSample> samples(lanes);
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    if (bytes[lane] >= kLeastBytes && longest[lane] >= kLeastSendNs) samples[lane] = plan::together(ways[lane]);
  }
  for (auto& [key, way] : out_) {
    if (samples[laneOf(key)].bytesPerSecond > 0) static_cast<Way&>(way) = {};
  }
  return samples;
}

plan::LaneSample LaneMeter::takeIn() {
  std::vector<plan::LaneSample> ways;
  std::uint64_t bytes = 0;
  std::int64_t longest = 0;
  for (const auto& [key, way] : in_) {
    ways.push_back(sampleOf(way.bytes, way.ns));
    bytes += way.bytes;
    longest = std::max(longest, way.ns);
  }
  if (bytes < kLeastBytes || longest < kLeastArrivalNs) return {};
  in_.clear();
  return plan::together(ways);
}

}  // namespace fusco::engine
