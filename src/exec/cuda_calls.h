// How this folder calls CUDA: failures become errors, and the driver's functions are found at run time.
#pragma once

namespace fusco::exec::cuda {

// Throws Error(unhandledCudaError) that names the GPU and the call unless `result` (a cudaError_t) is success.
void check(int result, const char* call);
#define FUSCO_CUDA_CHECK(call) ::fusco::exec::cuda::check(call, #call)

// A function of the driver; null where it has none of that name.
void* findDriverFunction(const char* name);
// The same; throws Error(unhandledCudaError).
void* driverFunction(const char* name);

}  // namespace fusco::exec::cuda
