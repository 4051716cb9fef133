#include "exec/cuda_peer.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "base/status.h"
#include "exec/cuda_calls.h"
#include "exec/cuda_virtual.h"

namespace fusco::exec::cuda {

namespace {

cudaEvent_t nativeEvent(void* event) { return static_cast<cudaEvent_t>(event); }
cudaStream_t nativeStream(Stream stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

OwnStream::OwnStream() {
  int least = 0, greatest = 0;
  FUSCO_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t stream = nullptr;
  FUSCO_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
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
  FUSCO_CUDA_CHECK(cudaEventCreateWithFlags(&event, flags));
  event_ = event;
}
SharedEvent::SharedEvent(const Handle& handle) {
  cudaIpcEventHandle_t native;
  static_assert(sizeof native == sizeof handle);
  std::memcpy(&native, handle.data(), sizeof native);
  cudaEvent_t event = nullptr;
  FUSCO_CUDA_CHECK(cudaIpcOpenEventHandle(&event, native));
  event_ = event;
}
SharedEvent::~SharedEvent() { cudaEventDestroy(nativeEvent(event_)); }
Handle SharedEvent::handle() const {
  cudaIpcEventHandle_t native;
  FUSCO_CUDA_CHECK(cudaIpcGetEventHandle(&native, nativeEvent(event_)));
  Handle handle;
  std::memcpy(handle.data(), &native, sizeof native);
  return handle;
}
void SharedEvent::record(Stream stream) {
  FUSCO_CUDA_CHECK(cudaEventRecord(nativeEvent(event_), nativeStream(stream)));
}
void SharedEvent::waitOn(Stream stream) const {
  FUSCO_CUDA_CHECK(cudaStreamWaitEvent(nativeStream(stream), nativeEvent(event_), 0));
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
  if (getRange(&start, &bytes, address) != cudaSuccess) return {};
  if (getAttribute(&id, kBufferId, address) != cudaSuccess) id = 0;
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

struct Imported::Mapping {
  int device;
  Foreign foreign;
  void* start = nullptr;
  std::unique_ptr<VirtualMapping> pieces;  // where it has no CUDA IPC handle
  int uses = 0;
  std::atomic<bool> unmapped{false};
};

struct Imported::Mappings {
  std::mutex mutex;
  std::vector<std::shared_ptr<Mapping>> all;

  // Never destroyed: communicators may end while the process does.
  static Mappings& ofProcess() {
    static auto& mappings = *new Mappings;
    return mappings;
  }
  void unmap(std::size_t at) noexcept {
    all[at]->unmapped = true;
    if (all[at]->pieces != nullptr) {
      all[at]->pieces.reset();
    } else {
      cudaIpcCloseMemHandle(all[at]->start);
    }
    cudaGetLastError();
    all.erase(all.begin() + static_cast<std::ptrdiff_t>(at));
  }
};

Imported::Imported(const Foreign& foreign) {
  Mappings& mappings = Mappings::ofProcess();
  const int device = currentDevice();
  std::lock_guard lock(mappings.mutex);
  for (std::size_t at = mappings.all.size(); at-- > 0;) {
    Mapping& known = *mappings.all[at];
    const Foreign& other = known.foreign;
    if (known.device != device || std::memcmp(other.process, foreign.process, sizeof other.process) != 0) continue;
    if (other.handle == foreign.handle) {
      mapping_ = mappings.all[at];
    } else if (!isVirtual(other.handle) && !isVirtual(foreign.handle) && other.start < foreign.start + foreign.bytes &&
               foreign.start < other.start + other.bytes) {
      mappings.unmap(at);
    }
  }
  if (mapping_ == nullptr) {
    auto made = std::make_shared<Mapping>();
    made->device = device;
    made->foreign = foreign;
    if (isVirtual(foreign.handle)) {
      made->pieces = std::make_unique<VirtualMapping>(foreign.handle);
      made->start = made->pieces->start();
    } else {
      cudaIpcMemHandle_t native;
      std::memcpy(&native, foreign.handle.data(), sizeof native);
      check(cudaIpcOpenMemHandle(&made->start, native, cudaIpcMemLazyEnablePeerAccess),
            "cudaIpcOpenMemHandle (if there is no path between these GPUs: set FUSCO_P2P_DISABLE=1)");
    }
    mappings.all.push_back(made);
    mapping_ = std::move(made);
  }
  ++mapping_->uses;
}

Imported::~Imported() {
  Mappings& mappings = Mappings::ofProcess();
  std::lock_guard lock(mappings.mutex);
  if (--mapping_->uses > 0 || mapping_->unmapped) return;
  const auto found = std::find(mappings.all.begin(), mappings.all.end(), mapping_);
  if (found != mappings.all.end()) mappings.unmap(static_cast<std::size_t>(found - mappings.all.begin()));
}

std::byte* Imported::start() const { return static_cast<std::byte*>(mapping_->start); }
bool Imported::unmapped() const { return mapping_->unmapped; }

void copyRows(const kernels::RowCopy* copies, std::size_t count, const kernels::Budget& budget, Stream stream) {
  for (std::size_t at = 0; at < count; at += kernels::kMaxCopies) {
    const int some = static_cast<int>(std::min<std::size_t>(count - at, kernels::kMaxCopies));
    check(kernels::launchCopies(copies + at, some, budget, stream), "launch of the copy kernel");
  }
}

}  // namespace fusco::exec::cuda
