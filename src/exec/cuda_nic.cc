#include "exec/cuda_nic.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "exec/cuda.h"
#include "exec/cuda_calls.h"

namespace fusco::exec::cuda {

NicWrites nicWrites() {
  NicWrites said{};
  const int device = currentDevice();
  FUSCO_CUDA_CHECK(cudaDeviceGetAttribute(&said.major, cudaDevAttrComputeCapabilityMajor, device));
  FUSCO_CUDA_CHECK(cudaDeviceGetAttribute(&said.ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, device));
  FUSCO_CUDA_CHECK(cudaDeviceGetAttribute(&said.flushOptions, cudaDevAttrGPUDirectRDMAFlushWritesOptions, device));
  return said;
}

void flushNicWrites() {
  FUSCO_CUDA_CHECK(cudaDeviceFlushGPUDirectRDMAWrites(cudaFlushGPUDirectRDMAWritesTargetCurrentDevice,
                                                      cudaFlushGPUDirectRDMAWritesToOwner));
}

int exportDmaBuf(const void* begin, std::size_t bytes, std::string* why) {
  const auto exportRange =
      reinterpret_cast<decltype(&cuMemGetHandleForAddressRange)>(findDriverFunction("cuMemGetHandleForAddressRange"));
  if (exportRange == nullptr) {
    *why = "the GPU's driver has no cuMemGetHandleForAddressRange";
    return -1;
  }
  int descriptor = -1;
  const CUresult result =
      exportRange(&descriptor, reinterpret_cast<CUdeviceptr>(begin), bytes, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0);
  if (result == CUDA_SUCCESS) return descriptor;
  *why = "the GPU's driver exports none (cuMemGetHandleForAddressRange: CUresult " +
         std::to_string(static_cast<int>(result)) + ")";
  return -1;
}

}  // namespace fusco::exec::cuda
