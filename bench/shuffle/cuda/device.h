// CUDA objects with one owner each. Calls that fail throw std::runtime_error that names the call and the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace fusco::bench::gpu {

void checkCuda(cudaError_t error, const char* call);

// Throws where there is none, with the reason.
int gpusPresent();
std::string gpuName(int gpu);
std::string driverName();

#define FUSCO_BENCH_CUDA(call) ::fusco::bench::gpu::checkCuda((call), #call)

// Makes a GPU the thread's for a while.
class OnGpu {
 public:
  explicit OnGpu(int device);
  ~OnGpu();
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;

 private:
  int before_ = 0;
};

class Memory {
 public:
  Memory() = default;
  Memory(int device, std::size_t bytes);
  Memory(Memory&& other) noexcept
      : device_(other.device_), at_(std::exchange(other.at_, nullptr)), bytes_(other.bytes_) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(at_, other.at_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Memory();
  std::byte* at() const { return at_; }
  std::size_t bytes() const { return bytes_; }

 private:
  int device_ = 0;
  std::byte* at_ = nullptr;
  std::size_t bytes_ = 0;
};

// A list in GPU memory.
template <typename T>
class List {
 public:
  List() = default;
  List(int device, const std::vector<T>& values) : memory_(device, values.size() * sizeof(T)) { assign(values); }
  // As many elements or fewer.
  void assign(const std::vector<T>& values) {
    if (values.empty()) return;
    FUSCO_BENCH_CUDA(cudaMemcpy(memory_.at(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  T* at() const { return reinterpret_cast<T*>(memory_.at()); }

 private:
  Memory memory_;
};

class Stream {
 public:
  explicit Stream(int device);
  Stream(Stream&& other) noexcept : device_(other.device_), stream_(std::exchange(other.stream_, nullptr)) {}
  Stream& operator=(Stream&&) = delete;
  ~Stream();
  cudaStream_t get() const { return stream_; }
  int device() const { return device_; }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  explicit Event(int device, bool timing = false);
  Event(Event&& other) noexcept : device_(other.device_), event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  ~Event();
  void record(const Stream& stream);
  void waitOn(const Stream& stream) const;
  cudaEvent_t get() const { return event_; }

 private:
  int device_;
  cudaEvent_t event_ = nullptr;
};
double microseconds(const Event& begin, const Event& end);

// What `work` puts on a stream, captured once and replayed `times` times in one launch: a graph that holds the captured
// one as children, one behind the other; where the driver refuses that, as many launches.
class Replay {
 public:
  Replay(const Stream& stream, const std::function<void()>& work, int times);
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;
  ~Replay();
  void launch(const Stream& stream);  // all of them
  void launchOne(const Stream& stream);
  bool oneLaunch() const { return all_ != nullptr; }
  int times() const { return times_; }

 private:
  int times_;
  cudaGraph_t captured_ = nullptr;
  cudaGraphExec_t one_ = nullptr, all_ = nullptr;
};

}  // namespace fusco::bench::gpu
