// Memory of a GPU that the host can look at, for tests; and whether there is a GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "shuffle/case.h"

namespace fusco::test {

inline void okCuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}
#define CUDA_OK(call) ::fusco::test::okCuda((call), #call)

// Empty, or why no test can run.
inline std::string noGpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no GPU: ") + cudaGetErrorString(error);
  return count > 0 ? "" : "no GPU: the driver shows none";
}

// The GPU of a rank: ranks are dealt to the GPUs of the machine in blocks, to FUSCO_TEST_GPUS of them at most.
inline int gpuOfRank(int rank, int ranks) {
  int count = 1;
  CUDA_OK(cudaGetDeviceCount(&count));
  const char* most = std::getenv("FUSCO_TEST_GPUS");
  if (most != nullptr) count = std::min(count, std::max(1, std::atoi(most)));
  count = std::min(count, ranks);
  return rank * count / ranks;
}

inline bool gpusApart() {
  const char* apart = std::getenv("FUSCO_GPU_APART");
  return apart != nullptr && std::string(apart) == "1";
}

// By rank: which of them launch together, where the others' rows may cross once; the same for all where none may, since
// processes share a GPU or have several.
inline std::vector<int> partsOfRanks(int ranks, int ofProcess) {
  std::vector<int> parts;
  bool together = false;
  for (int i = 0; i < ranks; ++i) {
    parts.push_back(i);
    for (int j = 0; j < i; ++j) {
      const bool process = i / ofProcess == j / ofProcess, gpu = gpuOfRank(i, ranks) == gpuOfRank(j, ranks);
      if (process && gpu && !gpusApart()) {
        parts.back() = std::min(parts.back(), j);
      } else if (process ? ofProcess < ranks : gpu && !gpusApart()) {
        together = true;
      }
    }
  }
  if (together) std::fill(parts.begin(), parts.end(), 0);
  return parts;
}

// Memory of the current GPU, which the host sees by copies. Kept for the next case: giving memory back waits for the
// GPU, and what a test does not wait for shall not be hidden by that.
class GpuSpace : public Space {
 public:
  GpuSpace() {
    CUDA_OK(cudaGetDevice(&device_));
    CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~GpuSpace() override {
    cudaStreamDestroy(stream_);
    for (const auto& [pointer, bytes] : sizes_) cudaFree(pointer);
  }
  void* allocate(std::size_t bytes, bool) override {
    std::size_t size = 256;
    while (size < bytes) size *= 2;
    std::vector<void*>& kept = kept_[size];
    if (!kept.empty()) {
      void* pointer = kept.back();
      kept.pop_back();
      return pointer;
    }
    void* pointer = nullptr;
    int before = 0;
    CUDA_OK(cudaGetDevice(&before));
    CUDA_OK(cudaSetDevice(device_));
    CUDA_OK(cudaMalloc(&pointer, size));
    CUDA_OK(cudaSetDevice(before));
    sizes_[pointer] = size;
    return pointer;
  }
  void release(void* pointer, bool) override { kept_[sizes_.at(pointer)].push_back(pointer); }
  cudaStream_t stream() override { return stream_; }
  void settle() override { CUDA_OK(cudaStreamSynchronize(stream_)); }
  void read(void* to, const void* from, std::size_t bytes) override {
    CUDA_OK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
    settle();
  }
  void write(void* to, const void* from, std::size_t bytes) override {
    CUDA_OK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
  }
  bool direct() const override { return false; }
  bool gpu() const override { return true; }
  bool apart(int rank, int other) const override {
    return !parts_.empty() && parts_[static_cast<std::size_t>(rank)] != parts_[static_cast<std::size_t>(other)];
  }
  // The ranks are on one node, so many of them in each process.
  void setRanks(int ranks, int ofProcess) { parts_ = partsOfRanks(ranks, ofProcess); }

 private:
  int device_ = 0;
  std::vector<int> parts_;
  cudaStream_t stream_ = nullptr;
  std::map<void*, std::size_t> sizes_;
  std::map<std::size_t, std::vector<void*>> kept_;
};

// Some bytes of a space, for as long as a test wants them; zeroed.
class GpuBytes {
 public:
  GpuBytes(GpuSpace& space, std::size_t bytes) : space_(space), here(bytes) {
    pointer_ = space.allocate(bytes + 1, true);
  }
  ~GpuBytes() { space_.release(pointer_, true); }
  GpuBytes(const GpuBytes&) = delete;
  GpuBytes& operator=(const GpuBytes&) = delete;
  void* send() {
    if (!here.empty()) space_.write(pointer_, here.data(), here.size());
    return pointer_;
  }
  void fetch() {
    if (!here.empty()) space_.read(here.data(), pointer_, here.size());
  }
  void* there() const { return pointer_; }

 private:
  GpuSpace& space_;
  void* pointer_ = nullptr;

 public:
  std::vector<std::uint8_t> here;
};

// Communicators of ranks on all GPUs of the machine (`spread`), or on the first one; one for each thread, whose GPU is
// the rank's, and which runs body(communicator, rank). One text a rank: what the body returned or threw. `nodes` by
// rank; none: one node.
inline std::vector<std::string> runGpuRanks(int ranks, const std::function<std::string(fuscoComm_t, int)>& body,
                                            int maxSms = 0, const std::vector<int>& nodes = {},
                                            std::int64_t sliceBytes = 0, bool spread = true) {
  fuscoUniqueId id;
  FUSCO_OK(fuscoGetUniqueId(&id));
  std::vector<std::string> wrong(static_cast<std::size_t>(ranks));
  runThreads(ranks, [&](int rank) {
    if (spread) CUDA_OK(cudaSetDevice(gpuOfRank(rank, ranks)));
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    config.operationTimeoutMs = 20000;
    if (maxSms > 0) config.maxSms = maxSms;
    if (!nodes.empty()) config.nodeId = nodes[static_cast<std::size_t>(rank)];
    if (sliceBytes > 0) config.sliceBytes = sliceBytes;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, ranks, id, rank, &config));
    std::string& text = wrong[static_cast<std::size_t>(rank)];
    try {
      text = body(comm, rank);
    } catch (const std::exception& e) {
      text = e.what();
    }
    if (!text.empty()) {
      fuscoCommAbort(comm);
      return;
    }
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  return wrong;
}

// Communicators of ranks on all GPUs of the machine, for one thread that drives them all.
inline std::vector<fuscoComm_t> gpuComms(int ranks) {
  fuscoUniqueId id;
  FUSCO_OK(fuscoGetUniqueId(&id));
  std::vector<fuscoComm_t> comms(static_cast<std::size_t>(ranks), nullptr);
  FUSCO_OK(fuscoGroupStart());
  for (int r = 0; r < ranks; ++r) {
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    config.gpu = gpuOfRank(r, ranks);
    config.operationTimeoutMs = 20000;
    FUSCO_OK(fuscoCommInitRankConfig(&comms[static_cast<std::size_t>(r)], ranks, id, r, &config));
  }
  FUSCO_OK(fuscoGroupEnd());
  return comms;
}

// A test that needs a GPU, and says so where there is none.
class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string why = noGpu();
    if (!why.empty()) GTEST_SKIP() << why;
  }
};

}  // namespace fusco::test
