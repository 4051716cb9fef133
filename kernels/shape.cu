// What the current GPU has.
#include <algorithm>

#include "kernels/grid.h"

namespace fusco::kernels {

namespace {

// All kernels are compiled for the same architectures as this one.
__global__ void compiled() {}

}  // namespace

DeviceShape deviceShape() {
  static thread_local int known = -1;
  static thread_local DeviceShape shape;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return shape;
  if (device != known) {
    cudaDeviceGetAttribute(&shape.sms, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shape.sharedBytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&shape.major, cudaDevAttrComputeCapabilityMajor, device);
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, compiled) == cudaSuccess)
      shape.major = std::min(shape.major, attributes.ptxVersion / 10);
    known = device;
  }
  return shape;
}

}  // namespace fusco::kernels
