#include "exec/cuda_calls.h"

#include <cuda_runtime_api.h>

#include <string>

#include "base/status.h"

namespace fusco::exec::cuda {

void check(int result, const char* call) {
  if (result == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(result);
  // The error is told once: a sticky one comes back with the next call.
  cudaGetLastError();
  int device = -1;
  cudaGetDevice(&device);
  fail(Code::unhandledCudaError, std::string("GPU ") + std::to_string(device) + ": " + call + ": " +
                                     cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

void* findDriverFunction(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found);
#endif
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess) return entry;
  cudaGetLastError();
  return nullptr;
}

void* driverFunction(const char* name) {
  void* const entry = findDriverFunction(name);
  if (entry == nullptr) {
    fail(Code::unhandledCudaError, std::string("the driver lacks ") + name + "; install a driver of CUDA 12 or later");
  }
  return entry;
}

}  // namespace fusco::exec::cuda
