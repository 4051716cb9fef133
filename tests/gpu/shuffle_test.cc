// Whole shuffles with ranks as threads that share a GPU, against the naive oracle: the cases of the host.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "shuffle/case.h"

namespace fusco::test {
namespace {

void okCuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}
#define CUDA_OK(call) okCuda((call), #call)

// Managed memory: the host checks what the GPU wrote where it lies.
class GpuSpace : public Space {
 public:
  GpuSpace() { CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~GpuSpace() override { cudaStreamDestroy(stream_); }
  void* allocate(std::size_t bytes, bool) override {
    void* pointer = nullptr;
    CUDA_OK(cudaMallocManaged(&pointer, bytes, cudaMemAttachGlobal));
    return pointer;
  }
  void release(void* pointer, bool) override { cudaFree(pointer); }
  cudaStream_t stream() override { return stream_; }
  void settle() override { CUDA_OK(cudaStreamSynchronize(stream_)); }
  void read(void* to, const void* from, std::size_t bytes) override {
    CUDA_OK(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
  }
  bool gpu() const override { return true; }

 private:
  cudaStream_t stream_ = nullptr;
};

class GpuShuffle : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU: " << cudaGetErrorString(error);
  }
};

// What GPUs have not got yet is left out of a random case.
Case gpuCase(std::uint64_t seed, int ranks) {
  Case c = randomCase(seed, ranks);
  c.tickets = c.counters = false;
  return c;
}

void runGpu(int ranks, int cases, const std::function<std::string(const Case&, fuscoComm_t, int, Space&)>& body) {
  const Cases some(cases, ranks);
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess) << fuscoGetLastError(nullptr);
  std::vector<std::string> wrong(static_cast<std::size_t>(ranks));
  runThreads(ranks, [&](int rank) {
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    config.operationTimeoutMs = 20000;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, ranks, id, rank, &config));
    std::string& text = wrong[static_cast<std::size_t>(rank)];
    try {
      GpuSpace space;
      for (std::int64_t i = 0; i < some.count && text.empty(); ++i) {
        const Case c = gpuCase(some.seed(i), ranks);
        if (c.layout == fuscoLayoutRankOrder) continue;
        text = body(c, comm, rank, space);
      }
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
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

TEST_P(GpuShuffle, IsWhatTheOracleSays) {
  runGpu(GetParam(), 300, [](const Case& c, fuscoComm_t comm, int rank, Space& space) {
    return runRank(c, comm, rank, space);
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuShuffle, ::testing::Values(1, 2, 3, 7, 8));

}  // namespace
}  // namespace fusco::test
