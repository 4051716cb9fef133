// What the driver's management library says of GPUs that CUDA does not show to this process (CUDA_VISIBLE_DEVICES). It
// is opened at the first question, and nothing here needs CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fusco::exec {

struct NvmlPath {
  std::uint32_t gpu;  // the other one, by its place on the bus (base/bus_id.h)
  bool there;         // both read and write each other's memory
  bool from;          // what is missing: a path from the other one, not to it
  std::string why;
};

// Between a GPU and each other one of the machine that the library knows, where it can say; empty where there is none
// (libnvidia-ml.so.1), or it does not know the GPU.
std::vector<NvmlPath> nvmlPaths(std::uint32_t gpu);

}  // namespace fusco::exec
