// Which GPU a rank computes on, and which GPUs share no memory with it. Part of its record.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <type_traits>

namespace fusco::comm {

struct GpuPlace {
  static constexpr std::size_t kMost = 16;
  static constexpr std::uint32_t kAllOthers = UINT32_MAX;

  std::uint32_t gpu = 0;  // base/bus_id.h; 0: none, the rank computes on the host
  // GPUs of the machine to which, or from which, there is no path; 0 ends the list, kAllOthers stands for any.
  std::uint32_t without[kMost] = {};

  // As this rank sees it.
  bool reaches(const GpuPlace& other) const {
    if (gpu == 0 || other.gpu == 0 || gpu == other.gpu) return true;
    return std::none_of(std::begin(without), std::end(without),
                        [&](std::uint32_t one) { return one == other.gpu || one == kAllOthers; });
  }
  bool operator==(const GpuPlace&) const = default;
};
static_assert(sizeof(GpuPlace) == 68 && std::is_trivially_copyable_v<GpuPlace>);

// What does not fit is all others.
inline GpuPlace gpuPlace(std::uint32_t gpu, std::span<const std::uint32_t> without) {
  GpuPlace place;
  place.gpu = gpu;
  if (without.size() > GpuPlace::kMost) {
    place.without[0] = GpuPlace::kAllOthers;
  } else {
    std::copy(without.begin(), without.end(), place.without);
  }
  return place;
}

}  // namespace fusco::comm
