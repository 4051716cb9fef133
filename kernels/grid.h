// What the launch functions share: what the GPU has, and launches that may begin before the previous one has ended.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fusco::kernels {

struct DeviceShape {
  int sms = 1;
  int sharedBytes = 49152;  // of one block, opted in
  int major = 0;            // of the GPU, and no more than what the kernels were compiled for
};

// Of the current device; asked once.
DeviceShape deviceShape();

// Shared memory that kernels have beside what a launch gives them.
inline constexpr std::size_t kMostStaticBytes = 8192;
inline std::size_t mostDynamicBytes() { return static_cast<std::size_t>(deviceShape().sharedBytes) - kMostStaticBytes; }

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
  constexpr std::size_t kUnasked = 49152 - kMostStaticBytes;
  if (shared > kUnasked) {
    // Sticks to the kernel, and threads may launch it side by side: the same for all shapes. Cheap beside a launch.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(mostDynamicBytes()));
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
