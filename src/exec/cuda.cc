#include "exec/cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "base/bus_id.h"
#include "base/log.h"
#include "base/status.h"
#include "base/thread.h"
#include "exec/cuda_calls.h"
#include "exec/cuda_virtual.h"
#include "exec/nvml.h"

namespace fusco::exec::cuda {

namespace {

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

bool available(std::string* why) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return true;
  cudaGetLastError();
  if (why != nullptr) *why = error == cudaSuccess ? "the driver shows no GPU" : cudaGetErrorString(error);
  return false;
}

int currentDevice() {
  int device = 0;
  FUSCO_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

DeviceId deviceId(int device) {
  cudaDeviceProp properties{};
  FUSCO_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  DeviceId id;
  static_assert(sizeof properties.uuid == sizeof id);
  std::memcpy(id.data(), &properties.uuid, sizeof id);
  return id;
}

std::string deviceName(int device) {
  cudaDeviceProp properties{};
  FUSCO_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  return properties.name;
}

int multiprocessors(int device) {
  int count = 0;
  FUSCO_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

std::uint32_t busIdOf(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    FUSCO_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return static_cast<unsigned>(value);
  };
  return busId(attribute(cudaDevAttrPciDomainId), attribute(cudaDevAttrPciBusId), attribute(cudaDevAttrPciDeviceId));
}

std::vector<std::uint32_t> withoutPath(int device) {
  const std::uint32_t self = busIdOf(device);
  std::vector<std::uint32_t> asked = {self}, none;
  int count = 0;
  FUSCO_CUDA_CHECK(cudaGetDeviceCount(&count));
  for (int other = 0; other < count; ++other) {
    const std::uint32_t id = busIdOf(other);
    if (id == self) continue;
    int to = 0, from = 0;
    FUSCO_CUDA_CHECK(cudaDeviceCanAccessPeer(&to, device, other));
    FUSCO_CUDA_CHECK(cudaDeviceCanAccessPeer(&from, other, device));
    asked.push_back(id);
    if (to != 0 && from != 0) continue;
    none.push_back(id);
    FUSCO_INFO(kLogInit, "GPU {}: CUDA knows no path {} {}", busIdText(self), to == 0 ? "to" : "from", busIdText(id));
  }
  for (const NvmlPath& path : nvmlPaths(self)) {
    if (path.there || std::find(asked.begin(), asked.end(), path.gpu) != asked.end()) continue;
    none.push_back(path.gpu);
    FUSCO_INFO(kLogInit, "GPU {}: NVML says that there is no path {} {}: {}", busIdText(self),
               path.from ? "from" : "to", busIdText(path.gpu), path.why);
  }
  return none;
}

bool reachDevice(int device, int other) {
  if (device == other) return true;
  int can = 0;
  FUSCO_CUDA_CHECK(cudaDeviceCanAccessPeer(&can, device, other));
  int atomics = 0;
  if (can != 0)
    FUSCO_CUDA_CHECK(cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device, other));
  FUSCO_INFO(kLogInit, "GPU {} reaches the memory of GPU {} {}", device, other,
             can == 0       ? "by no path"
             : atomics != 0 ? "by a link with atomics (NVLink)"
                            : "by PCIe");
  if (can == 0) return false;
  const OnDevice on(device);
  const cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return true;
  }
  FUSCO_CUDA_CHECK(error);
  return true;
}

namespace {
int& nested() {
  thread_local int count = 0;
  return count;
}
}  // namespace

OnDevice::OnDevice(int device) {
  const int now = currentDevice();
  if (now != device) {
    FUSCO_CUDA_CHECK(cudaSetDevice(device));
    before_ = now;
  }
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  FUSCO_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  captureMode_ = mode;
  ++nested();
}
// To make a GPU a thread's gives it a context there, half a gigabyte of its memory: so a thread of the library's own,
// which begins with GPU 0, stays where it was.
OnDevice::~OnDevice() {
  auto mode = static_cast<cudaStreamCaptureMode>(captureMode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (--nested() == 0 && isOwnThread()) return;
  if (before_ >= 0) cudaSetDevice(before_);
}

void* allocate(std::size_t bytes) {
  void* pointer = nullptr;
  FUSCO_CUDA_CHECK(cudaMalloc(&pointer, bytes));
  return pointer;
}
void* tryAllocate(std::size_t bytes) {
  void* pointer = nullptr;
  const cudaError_t error = cudaMalloc(&pointer, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  check(error, "cudaMalloc");
  return pointer;
}
void release(void* pointer) noexcept { cudaFree(pointer); }

void* allocatePinned(std::size_t bytes) {
  void* pointer = nullptr;
  FUSCO_CUDA_CHECK(cudaHostAlloc(&pointer, bytes, cudaHostAllocPortable));
  return pointer;
}
void releasePinned(void* pointer) noexcept { cudaFreeHost(pointer); }

namespace {
// Never destroyed: communicators may outlive the end of main.
struct Pins {
  std::mutex mutex;
  std::map<void*, int> counts;
};
Pins& pins() {
  static auto* one = new Pins;
  return *one;
}
}  // namespace

bool pin(void* memory, std::size_t bytes) noexcept {
  const std::lock_guard lock(pins().mutex);
  const auto known = pins().counts.find(memory);
  if (known == pins().counts.end() && cudaHostRegister(memory, bytes, cudaHostRegisterPortable) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  ++pins().counts[memory];
  return true;
}

void unpin(void* memory) noexcept {
  const std::lock_guard lock(pins().mutex);
  const auto known = pins().counts.find(memory);
  if (known == pins().counts.end() || --known->second > 0) return;
  pins().counts.erase(known);
  cudaHostUnregister(memory);
  cudaGetLastError();
}

Where whereIs(const void* pointer) {
  cudaPointerAttributes attributes{};
  FUSCO_CUDA_CHECK(cudaPointerGetAttributes(&attributes, pointer));
  switch (attributes.type) {
    case cudaMemoryTypeDevice:
      return {Place::device, attributes.device, false};
    case cudaMemoryTypeManaged:
      return {Place::managed, attributes.device, true};
    default:
      return {Place::host, -1, attributes.type == cudaMemoryTypeHost};
  }
}

void copy(void* to, const void* from, std::size_t bytes, Stream stream) {
  FUSCO_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, native(stream)));
}
void fill(void* pointer, int byte, std::size_t bytes, Stream stream) {
  FUSCO_CUDA_CHECK(cudaMemsetAsync(pointer, byte, bytes, native(stream)));
}
void synchronize(Stream stream) { FUSCO_CUDA_CHECK(cudaStreamSynchronize(native(stream))); }

namespace {
struct OwnStreams {
  std::map<int, cudaStream_t> byDevice;
  ~OwnStreams() {
    for (const auto& [device, stream] : byDevice) cudaStreamDestroy(stream);
  }
};

// A stream of this thread and GPU that waits for no other.
cudaStream_t ownStream() {
  cudaStream_t& stream = ofThisThread<OwnStreams, struct Own>().byDevice[currentDevice()];
  if (stream == nullptr) FUSCO_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}
}  // namespace

void copyNow(void* to, const void* from, std::size_t bytes) {
  FUSCO_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, ownStream()));
  FUSCO_CUDA_CHECK(cudaStreamSynchronize(ownStream()));
}
void fillNow(void* pointer, int byte, std::size_t bytes) {
  FUSCO_CUDA_CHECK(cudaMemsetAsync(pointer, byte, bytes, ownStream()));
  FUSCO_CUDA_CHECK(cudaStreamSynchronize(ownStream()));
}

bool capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  FUSCO_CUDA_CHECK(cudaStreamIsCapturing(native(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

bool isPerThread(Stream stream) { return native(stream) == cudaStreamPerThread; }

unsigned long long captureOf(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  FUSCO_CUDA_CHECK(cudaStreamGetCaptureInfo(native(stream), &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

#if CUDART_VERSION >= 12030
namespace {
#if CUDART_VERSION >= 13000
constexpr auto captureInfo = cudaStreamGetCaptureInfo;
constexpr auto updateCapture = cudaStreamUpdateCaptureDependencies;
#else
constexpr auto captureInfo = cudaStreamGetCaptureInfo_v3;
constexpr auto updateCapture = cudaStreamUpdateCaptureDependencies_v2;
#endif
}  // namespace

CaptureEdges captureEdges(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CaptureEdges edges;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* kinds = nullptr;
  std::size_t count = 0;
  const cudaError_t error = captureInfo(native(stream), &status, &edges.capture, nullptr, &nodes, &kinds, &count);
  if (error == cudaErrorCallRequiresNewerDriver) {
    cudaGetLastError();
    return {};
  }
  check(error, "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive) return {};
  edges.nodes.assign(nodes, nodes + count);
  return edges;
}

namespace {
void changeCaptureEdges(Stream stream, const CaptureEdges& edges, cudaStreamUpdateCaptureDependenciesFlags how) {
  if (edges.capture == 0) return;
  std::vector<cudaGraphNode_t> nodes;
  for (void* node : edges.nodes) nodes.push_back(static_cast<cudaGraphNode_t>(node));
  FUSCO_CUDA_CHECK(updateCapture(native(stream), nodes.data(), nullptr, nodes.size(), how));
}
}  // namespace

void setCaptureEdges(Stream stream, const CaptureEdges& edges) {
  changeCaptureEdges(stream, edges, cudaStreamSetCaptureDependencies);
}
void addCaptureEdges(Stream stream, const CaptureEdges& edges) {
  CaptureEdges fresh = captureEdges(stream);
  const std::vector<void*> known = std::move(fresh.nodes);
  fresh.nodes.clear();
  std::copy_if(edges.nodes.begin(), edges.nodes.end(), std::back_inserter(fresh.nodes),
               [&](void* node) { return std::find(known.begin(), known.end(), node) == known.end(); });
  if (!fresh.nodes.empty()) changeCaptureEdges(stream, fresh, cudaStreamAddCaptureDependencies);
}
#else
CaptureEdges captureEdges(Stream) { return {}; }
void setCaptureEdges(Stream, const CaptureEdges&) {}
void addCaptureEdges(Stream, const CaptureEdges&) {}
#endif

void holdInGraph(Stream stream, std::shared_ptr<const void> held) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
  FUSCO_CUDA_CHECK(cudaStreamGetCaptureInfo(native(stream), &status, &id, &graph));
  using Held = std::shared_ptr<const void>;
  auto kept = std::make_unique<Held>(std::move(held));
  cudaUserObject_t object = nullptr;
  FUSCO_CUDA_CHECK(cudaUserObjectCreate(
      &object, kept.get(), [](void* one) { delete static_cast<Held*>(one); }, 1, cudaUserObjectNoDestructorSync));
  kept.release();
  FUSCO_CUDA_CHECK(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
}

Event::Event() {
  cudaEvent_t event = nullptr;
  FUSCO_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  event_ = event;
}
Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }
void Event::record(Stream stream) {
  FUSCO_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event_), native(stream)));
}
void Event::waitOn(Stream stream) const {
  FUSCO_CUDA_CHECK(cudaStreamWaitEvent(native(stream), static_cast<cudaEvent_t>(event_), 0));
}
void Event::wait() const { FUSCO_CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(event_))); }
void Event::recordEachTime(Stream stream) {
  FUSCO_CUDA_CHECK(cudaEventRecordWithFlags(static_cast<cudaEvent_t>(event_), native(stream), cudaEventRecordExternal));
}
void Event::waitOnEachTime(Stream stream) const {
  FUSCO_CUDA_CHECK(cudaStreamWaitEvent(native(stream), static_cast<cudaEvent_t>(event_), cudaEventWaitExternal));
}
bool Event::reached() const {
  const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check(error, "cudaEventQuery");
  return true;
}

Order::Capture& Order::captureNamed(unsigned long long number) {
  auto known =
      std::find_if(captures_.begin(), captures_.end(), [&](const Capture& one) { return one.number == number; });
  if (known == captures_.end()) {
    if (captures_.size() == kMostCaptures) captures_.pop_back();
    known = captures_.emplace(captures_.begin());
    known->number = number;
  }
  captures_.splice(captures_.begin(), captures_, known);
  return captures_.front();
}

bool Order::isFree(Stream stream) const {
  const unsigned long long number = captureOf(stream);
  return std::none_of(captures_.begin(), captures_.end(),
                      [&](const Capture& one) { return one.number == number && one.ended && one.endedOn != stream; });
}

// What a graph has to wait for each time, each of its streams waits for once.
void Order::begin(Stream stream) {
  const unsigned long long number = captureOf(stream);
  if (number == 0) {
    if (used_) end_.waitOn(stream);
    return;
  }
  Capture& capture = captureNamed(number);
  if (capture.ended) {
    if (stream != capture.endedOn) capture.end.waitOn(stream);
  } else if (eachTime_ && stream != capture.waitedOn) {
    end_.waitOnEachTime(stream);
    capture.waitedOn = stream;
  }
}
void Order::end(Stream stream) {
  const unsigned long long number = captureOf(stream);
  if (number == 0) {
    end_.record(stream);
  } else {
    Capture& capture = captureNamed(number);
    if (eachTime_) recordEachTime(stream, capture);
    capture.end.record(stream);
    capture.ended = true;
    capture.endedOn = stream;
  }
  ++ends_;
  used_ = used_ || number == 0 || eachTime_;
}

// Records follow each other, and nothing else waits for them.
void Order::recordEachTime(Stream stream, Capture& capture) {
  const CaptureEdges before = captureEdges(stream);
  addCaptureEdges(stream, capture.recorded);
  end_.recordEachTime(stream);
  capture.recorded = captureEdges(stream);
  setCaptureEdges(stream, before);
}

Exported exportMemory(const void* pointer, std::size_t bytes) {
  // The handle stands for a whole allocation; where it begins is the driver's to say.
  using GetRange = int (*)(unsigned long long*, std::size_t*, unsigned long long);
  static const auto getRange = reinterpret_cast<GetRange>(driverFunction("cuMemGetAddressRange"));
  unsigned long long start = 0;
  std::size_t whole = 0;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  check(getRange(&start, &whole, address), "cuMemGetAddressRange");
  cudaIpcMemHandle_t handle;
  const cudaError_t told = cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(start));
  if (told == cudaErrorInvalidValue || told == cudaErrorNotSupported) {
    cudaGetLastError();
    Exported exported;
    if (exportVirtual(pointer, bytes, exported)) return exported;
    fail(
        Code::invalidUsage,
        "a tensor lies in GPU memory that has no handle for other processes (a pool; managed or pinned memory; virtual "
        "memory management without file descriptors): take it from "
        "cudaMalloc (torch: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False), run the ranks as threads, or give each "
        "process a node of its own (nodeId, FUSCO_NODE): then the host carries the rows");
  }
  check(told, "cudaIpcGetMemHandle");
  Exported exported;
  static_assert(sizeof handle == sizeof exported.handle);
  std::memcpy(exported.handle.data(), &handle, sizeof handle);
  exported.offset = address - start;
  exported.bytes = whole;
  return exported;
}

std::size_t planScratchBytes(int experts, int ranks, int nodes) {
  return kernels::planScratchBytes(experts, ranks, nodes);
}
bool planFits(const kernels::PlanArgs& args) { return kernels::planFits(args); }
bool planIsSmall(const kernels::PlanArgs& args) { return kernels::planIsSmall(args); }
int planBlocksOfRank(const kernels::PlanArgs& args) { return kernels::planBlocksOfRank(args); }
void planCount(const kernels::PlanArgs& args, Stream stream) {
  check(kernels::launchPlanCount(args, stream), "launch of the planner's count");
}
void planLay(const kernels::PlanArgs& args, Stream stream) {
  check(kernels::launchPlanLay(args, stream), "launch of the planner");
}
void plan(const kernels::PlanArgs& args, Stream stream) {
  check(kernels::launchPlan(args, stream), "launch of the planner");
}
void place(const kernels::PlaceArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchPlace(args, budget, stream), "launch of the dispatch kernel");
}
bool placesAcross(const kernels::PlaceArgs& args) { return kernels::placesAcross(args); }
bool sumFillsMultiprocessors(const kernels::SumArgs& args) { return kernels::sumFillsMultiprocessors(args); }
void expand(const kernels::ExpandArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchExpand(args, budget, stream), "launch of the kernel that copies rows where they have come");
}
void meet(const kernels::MeetArgs& args, Stream stream) {
  check(kernels::launchMeet(args, stream), "launch of the kernel that meets other GPUs");
}
void bringMaps(const kernels::BringMapsArgs& args, Stream stream) {
  check(kernels::launchBringMaps(args, stream), "launch of the kernel that brings routing maps to other GPUs");
}
void tell(const kernels::TellArgs& args, Stream stream) {
  check(kernels::launchTell(args, stream), "launch of the kernel that tells other GPUs");
}
void await(const kernels::AwaitArgs& args, Stream stream) {
  check(kernels::launchAwait(args, stream), "launch of the kernel that waits for other GPUs");
}
void partial(const kernels::PartialArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchPartial(args, budget, stream), "launch of the kernel that sums rows for other GPUs");
}
void placeCounted(const kernels::CountedPlaceArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchCountedPlace(args, budget, stream), "launch of the dispatch kernel that counts");
}
void castPlace(const kernels::CastPlaceArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchCastPlace(args, budget, stream), "launch of the dispatch kernel that casts");
}
void sum(const kernels::SumArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchSum(args, budget, stream), "launch of the combine kernel");
}
void sumTerms(const kernels::TermSumArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchTermSum(args, budget, stream), "launch of the kernel that sums terms");
}
void back(const kernels::BackArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchBack(args, budget, stream), "launch of combine's backward kernel");
}
void gaps(const kernels::GapsArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchGaps(args, budget, stream), "launch of the kernel that zeroes gaps");
}
void reset(const kernels::ResetArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchReset(args, budget, stream), "launch of the kernel that resets tickets and counters");
}
void describe(const kernels::DescribeArgs& args, const kernels::Budget& budget, Stream stream) {
  check(kernels::launchDescribe(args, budget, stream), "launch of the kernel that describes rows");
}

}  // namespace fusco::exec::cuda
