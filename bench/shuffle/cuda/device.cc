#include "shuffle/cuda/device.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

namespace fusco::bench::gpu {

void checkCuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  int device = -1;
  cudaGetDevice(&device);
  throw std::runtime_error(fmt::format("GPU {}: {}: {}", device, call, cudaGetErrorString(error)));
}

int gpusPresent() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(fmt::format("no GPU: {}", cudaGetErrorString(error)));
  }
  if (count == 0) throw std::runtime_error("no GPU: the driver shows none");
  return count;
}

std::string gpuName(int gpu) {
  cudaDeviceProp properties{};
  FUSCO_BENCH_CUDA(cudaGetDeviceProperties(&properties, gpu));
  return properties.name;
}

std::string driverName() {
  int driver = 0, runtime = 0;
  FUSCO_BENCH_CUDA(cudaDriverGetVersion(&driver));
  FUSCO_BENCH_CUDA(cudaRuntimeGetVersion(&runtime));
  return fmt::format("CUDA driver {}.{}, runtime {}.{}", driver / 1000, driver % 1000 / 10, runtime / 1000,
                     runtime % 1000 / 10);
}

OnGpu::OnGpu(int device) {
  FUSCO_BENCH_CUDA(cudaGetDevice(&before_));
  if (before_ != device) FUSCO_BENCH_CUDA(cudaSetDevice(device));
}
OnGpu::~OnGpu() { cudaSetDevice(before_); }

Memory::Memory(int device, std::size_t bytes) : device_(device), bytes_(bytes) {
  const OnGpu on(device);
  void* at = nullptr;
  FUSCO_BENCH_CUDA(cudaMalloc(&at, std::max<std::size_t>(bytes, 256)));
  at_ = static_cast<std::byte*>(at);
}
Memory::~Memory() {
  if (at_ != nullptr) cudaFree(at_);
}

Stream::Stream(int device) : device_(device) {
  const OnGpu on(device);
  FUSCO_BENCH_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}
Stream::~Stream() {
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

Event::Event(int device, bool timing) : device_(device) {
  const OnGpu on(device);
  FUSCO_BENCH_CUDA(cudaEventCreateWithFlags(&event_, timing ? cudaEventDefault : cudaEventDisableTiming));
}
Event::~Event() {
  if (event_ != nullptr) cudaEventDestroy(event_);
}
void Event::record(const Stream& stream) {
  const OnGpu on(device_);
  FUSCO_BENCH_CUDA(cudaEventRecord(event_, stream.get()));
}
void Event::waitOn(const Stream& stream) const {
  const OnGpu on(stream.device());
  FUSCO_BENCH_CUDA(cudaStreamWaitEvent(stream.get(), event_, 0));
}

double microseconds(const Event& begin, const Event& end) {
  FUSCO_BENCH_CUDA(cudaEventSynchronize(end.get()));
  float ms = 0;
  FUSCO_BENCH_CUDA(cudaEventElapsedTime(&ms, begin.get(), end.get()));
  return ms * 1000.0;
}

namespace {

// A graph of `times` copies of `one`, each after the one before; null if that cannot be.
cudaGraphExec_t chained(cudaGraph_t one, int times) {
  cudaGraph_t graph = nullptr;
  if (cudaGraphCreate(&graph, 0) != cudaSuccess) return nullptr;
  cudaGraphNode_t before = nullptr;
  bool whole = true;
  for (int i = 0; i < times && whole; ++i) {
    cudaGraphNode_t node = nullptr;
    whole = cudaGraphAddChildGraphNode(&node, graph, i == 0 ? nullptr : &before, i == 0 ? 0 : 1, one) == cudaSuccess;
    before = node;
  }
  cudaGraphExec_t all = nullptr;
  if (!whole || cudaGraphInstantiate(&all, graph, 0) != cudaSuccess) all = nullptr;
  cudaGraphDestroy(graph);
  cudaGetLastError();
  return all;
}

}  // namespace

Replay::Replay(const Stream& stream, const std::function<void()>& work, int times) : times_(times) {
  const OnGpu on(stream.device());
  FUSCO_BENCH_CUDA(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  try {
    work();
  } catch (...) {
    cudaGraph_t broken = nullptr;
    cudaStreamEndCapture(stream.get(), &broken);
    if (broken != nullptr) cudaGraphDestroy(broken);
    cudaGetLastError();
    throw;
  }
  FUSCO_BENCH_CUDA(cudaStreamEndCapture(stream.get(), &captured_));
  try {
    FUSCO_BENCH_CUDA(cudaGraphInstantiate(&one_, captured_, 0));
  } catch (...) {
    cudaGraphDestroy(captured_);
    throw;
  }
  if (times > 1) all_ = chained(captured_, times);
}

Replay::~Replay() {
  if (all_ != nullptr) cudaGraphExecDestroy(all_);
  if (one_ != nullptr) cudaGraphExecDestroy(one_);
  if (captured_ != nullptr) cudaGraphDestroy(captured_);
}

void Replay::launchOne(const Stream& stream) {
  const OnGpu on(stream.device());
  FUSCO_BENCH_CUDA(cudaGraphLaunch(one_, stream.get()));
}

void Replay::launch(const Stream& stream) {
  const OnGpu on(stream.device());
  if (all_ != nullptr) {
    FUSCO_BENCH_CUDA(cudaGraphLaunch(all_, stream.get()));
    return;
  }
  for (int i = 0; i < times_; ++i) FUSCO_BENCH_CUDA(cudaGraphLaunch(one_, stream.get()));
}

}  // namespace fusco::bench::gpu
