// The loop of nccl-tests in GPU memory.
#include <cstdio>
#include <cstdlib>

#include "nccl/gpu.h"

namespace fusco::test {

namespace {

int gpus() {
  int count = 0;
  CUDA(cudaGetDeviceCount(&count));
  return count;
}

class GpuMemory : public LoopMemory {
 public:
  void use(int rank) override { CUDA(cudaSetDevice(rank % gpus())); }
  std::uint8_t* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    CUDA(cudaMalloc(&memory, bytes));
    return static_cast<std::uint8_t*>(memory);
  }
  void release(void* memory) override { CUDA(cudaFree(memory)); }
  void write(std::uint8_t* to, const std::vector<std::uint8_t>& bytes) override {
    CUDA(cudaMemcpy(to, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    // The copy may have been staged only.
    CUDA(cudaStreamSynchronize(nullptr));
  }
  std::vector<std::uint8_t> read(const std::uint8_t* from, std::size_t bytes) override {
    std::vector<std::uint8_t> got(bytes);
    CUDA(cudaMemcpy(got.data(), from, bytes, cudaMemcpyDeviceToHost));
    return got;
  }
  cudaStream_t makeStream() override {
    cudaStream_t stream = nullptr;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
  std::vector<int> devices(int ranks) override {
    std::vector<int> all;
    for (int rank = 0; rank < ranks; ++rank) all.push_back(rank % gpus());
    return all;
  }
  bool done(cudaStream_t stream) override {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state != cudaErrorNotReady) CUDA(state);
    return state == cudaSuccess;
  }
  void capture(cudaStream_t stream) override { CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal)); }
  void* endCapture(cudaStream_t stream) override {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    return exec;
  }
  void launch(void* graph, cudaStream_t stream) override {
    CUDA(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream));
  }
  void releaseGraph(void* graph) override { CUDA(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph))); }
};

}  // namespace

void shareGpus(const Rank& process, int ranksOfProcess) {
  if (gpus() < process.ranks * ranksOfProcess && process.ranks > 1) {
    // Each process is a host of its own to NCCL.
    setenv("NCCL_HOSTID", ("host" + std::to_string(process.rank)).c_str(), 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    setenv("NCCL_IB_DISABLE", "1", 0);
  }
  if (gpus() < ranksOfProcess) setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
}

std::string refusesSeveralRanks(int ranksOfProcess) {
  int version = 0;
  OK(ncclGetVersion(&version));
  if (ranksOfProcess <= gpus() || version >= 23000) return "";
  return "NCCL " + std::to_string(version) + " takes no two ranks of one process on a GPU";
}

void gpuLoop(const Rank& process, const LoopShape& shape) {
  shareGpus(process, shape.threads * shape.ranksOfThread);
  GpuMemory memory;
  const long checked = loop(process, shape, memory);
  require(checked >= 24, "only " + std::to_string(checked) + " operations were checked");
  std::printf("process %d of %d, %d threads, %d ranks each: %ld operations right\n", process.rank, process.ranks,
              shape.threads, shape.ranksOfThread, checked);
}

}  // namespace fusco::test
