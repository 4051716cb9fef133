#include "exec/cuda_peer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "base/status.h"

namespace fusco::exec::cuda {

namespace {

void check(int result, const char* call) {
  if (result == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(result);
  cudaGetLastError();
  fail(Code::unhandledCudaError,
       std::string(call) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}
#define CHECK(call) check(call, #call)

void* driverFunction(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  CHECK(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found));
#else
  CHECK(cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found));
#endif
  if (found != cudaDriverEntryPointSuccess) fail(Code::unhandledCudaError, std::string("the driver lacks ") + name);
  return entry;
}

cudaEvent_t nativeEvent(void* event) { return static_cast<cudaEvent_t>(event); }
cudaStream_t nativeStream(Stream stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

OwnStream::OwnStream() {
  int least = 0, greatest = 0;
  CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
  stream_ = stream;
}
OwnStream::~OwnStream() { cudaStreamDestroy(nativeStream(stream_)); }
bool OwnStream::drained() const {
  const cudaError_t error = cudaStreamQuery(nativeStream(stream_));
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  return true;  // also after an error: nothing more will come of it
}

SharedEvent::SharedEvent(bool betweenProcesses) {
  cudaEvent_t event = nullptr;
  const unsigned flags = cudaEventDisableTiming | (betweenProcesses ? cudaEventInterprocess : 0u);
  CHECK(cudaEventCreateWithFlags(&event, flags));
  event_ = event;
}
SharedEvent::SharedEvent(const Handle& handle) {
  cudaIpcEventHandle_t native;
  static_assert(sizeof native == sizeof handle);
  std::memcpy(&native, handle.data(), sizeof native);
  cudaEvent_t event = nullptr;
  CHECK(cudaIpcOpenEventHandle(&event, native));
  event_ = event;
}
SharedEvent::~SharedEvent() { cudaEventDestroy(nativeEvent(event_)); }
Handle SharedEvent::handle() const {
  cudaIpcEventHandle_t native;
  CHECK(cudaIpcGetEventHandle(&native, nativeEvent(event_)));
  Handle handle;
  std::memcpy(handle.data(), &native, sizeof native);
  return handle;
}
void SharedEvent::record(Stream stream) { CHECK(cudaEventRecord(nativeEvent(event_), nativeStream(stream))); }
void SharedEvent::waitOn(Stream stream) const {
  CHECK(cudaStreamWaitEvent(nativeStream(stream), nativeEvent(event_), 0));
}

Allocation allocationOf(const void* pointer) {
  using GetRange = int (*)(unsigned long long*, std::size_t*, unsigned long long);
  using GetAttribute = int (*)(void*, int, unsigned long long);
  static const auto getRange = reinterpret_cast<GetRange>(driverFunction("cuMemGetAddressRange"));
  static const auto getAttribute = reinterpret_cast<GetAttribute>(driverFunction("cuPointerGetAttribute"));
  constexpr int kBufferId = 7;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  unsigned long long start = 0, id = 0;
  std::size_t bytes = 0;
  check(getRange(&start, &bytes, address), "cuMemGetAddressRange");
  check(getAttribute(&id, kBufferId, address), "cuPointerGetAttribute");
  return {start, bytes, id};
}

bool tryExport(const Allocation& allocation, Handle& handle) {
  cudaIpcMemHandle_t native;
  if (cudaIpcGetMemHandle(&native, reinterpret_cast<void*>(allocation.start)) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  std::memcpy(handle.data(), &native, sizeof native);
  return true;
}

void copyRows(const kernels::RowCopy* copies, std::size_t count, const kernels::Budget& budget, Stream stream) {
  for (std::size_t at = 0; at < count; at += kernels::kMaxCopies) {
    const int some = static_cast<int>(std::min<std::size_t>(count - at, kernels::kMaxCopies));
    check(kernels::launchCopies(copies + at, some, budget, stream), "launch of the copy kernel");
  }
}

}  // namespace fusco::exec::cuda
