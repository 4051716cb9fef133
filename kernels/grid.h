// What the launch functions share: what the GPU has, and launches that may begin before the previous one has ended.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fusco::kernels {

struct DeviceShape {
  int sms = 1;
  int sharedBytes = 49152;  // of one block, opted in
  int major = 0;
};

// Of the current device; asked once.
inline DeviceShape deviceShape() {
  static thread_local int known = -1;
  static thread_local DeviceShape shape;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return shape;
  if (device != known) {
    cudaDeviceGetAttribute(&shape.sms, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shape.sharedBytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&shape.major, cudaDevAttrComputeCapabilityMajor, device);
    known = device;
  }
  return shape;
}

// Dynamic shared memory with which a block has a multiprocessor to itself: more than half of what there is.
inline std::size_t aloneBytes(std::size_t needed) {
  const std::size_t alone = static_cast<std::size_t>(deviceShape().sharedBytes) / 2 + 128;
  return needed < alone ? alone : needed;
}

// Launches kernel(arguments). On Hopper and later the kernel may begin while the previous launch of the stream ends:
// it must call ptx::waitForPreviousLaunch() before it reads or writes what others may use.
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Arguments& arguments, int blocks, int threads, std::size_t shared,
                   cudaStream_t stream) {
  if (shared > 49152) {
    // Sticks to the kernel; cheap beside a launch.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    // Launches that run side by side share a multiprocessor only if it is divided for both.
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = deviceShape().major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace fusco::kernels
