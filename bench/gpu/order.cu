// An experiment that came before the CUDA shuffle: how may ranks that share one GPU wait for each other without
// hanging? docs/design.md has the question and what was seen. Each rank, a thread with a stream of its own, says
// "ready" to all, waits for all, copies, says "done" and waits again; the ways to wait are the modes below. Waits in
// kernels give up after a second and are counted; what hangs in the driver's hands is ended after 20 s.
//
//   nvcc -O2 -std=c++20 -arch=sm_90 -o order bench/gpu/order.cu -lcuda
//   order MODE RANKS BLOCKS ITERATIONS BYTES [SHARED_MEMORY_PER_BLOCK [WARM_UP]]
//   MODE: spin memop batch plain (a thread issues for each rank), one events graph (one thread issues for all)
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

using Word = unsigned long long;
constexpr int kMostRanks = 32;
constexpr Word kSpinLimitNs = 1'000'000'000;
enum Phase { kReady = 0, kDone = 1 };

struct Flags {
  Word said[2][kMostRanks][kMostRanks];  // [phase][reader][writer]
  Word timeouts;
};

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::printf("line %d: %s\n", line, cudaGetErrorString(error));
  std::exit(1);
}
void check(CUresult error, int line) {
  if (error == CUDA_SUCCESS) return;
  const char* text = nullptr;
  cuGetErrorString(error, &text);
  std::printf("line %d: %s\n", line, text);
  std::exit(1);
}
#define CHECK(call) check(call, __LINE__)

__device__ Word globalNs() {
  Word ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}
__device__ void storeRelease(Word* word, Word value) {
  asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ Word loadAcquire(Word* word) {
  Word value;
  asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ bool waitForAll(Flags* flags, Phase phase, int rank, int ranks, Word epoch) {
  const Word start = globalNs();
  for (int writer = 0; writer < ranks; ++writer) {
    while (loadAcquire(&flags->said[phase][rank][writer]) < epoch) {
      if (globalNs() - start > kSpinLimitNs) {
        atomicAdd(&flags->timeouts, 1ull);
        return false;
      }
    }
  }
  return true;
}
__device__ void copy(float4* to, const float4* from, size_t count) {
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) to[i] = from[i];
}

__global__ void sayKernel(Flags* flags, Phase phase, int rank, int ranks, Word epoch) {
  if (threadIdx.x < ranks) storeRelease(&flags->said[phase][threadIdx.x][rank], epoch);
}
__global__ void copyKernel(Flags* flags, int rank, int ranks, Word epoch, bool waits, float4* to, const float4* from,
                           size_t count) {
  if (waits) {
    __shared__ bool ready;
    if (threadIdx.x == 0) ready = waitForAll(flags, kReady, rank, ranks, epoch);
    __syncthreads();
    if (!ready) return;
  }
  copy(to, from, count);
}
__global__ void doneKernel(Flags* flags, int rank, int ranks, Word epoch) {
  if (threadIdx.x < ranks) storeRelease(&flags->said[kDone][threadIdx.x][rank], epoch);
  __syncthreads();
  if (threadIdx.x == 0) waitForAll(flags, kDone, rank, ranks, epoch);
}
// All ranks in one launch: blockIdx.y is the rank.
__global__ void allRanksKernel(Flags* flags, int ranks, Word epoch, float4** to, const float4** from, size_t count,
                               unsigned* arrived) {
  const int rank = blockIdx.y;
  if (blockIdx.x == 0 && threadIdx.x < ranks) storeRelease(&flags->said[kReady][threadIdx.x][rank], epoch);
  __shared__ bool go;
  if (threadIdx.x == 0) go = waitForAll(flags, kReady, rank, ranks, epoch);
  __syncthreads();
  if (!go) return;
  copy(to[rank], from[rank], count);
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&arrived[rank], 1) == gridDim.x - 1;
    if (last) arrived[rank] = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x < ranks) storeRelease(&flags->said[kDone][threadIdx.x][rank], epoch);
  __syncthreads();
  if (threadIdx.x == 0) waitForAll(flags, kDone, rank, ranks, epoch);
}

struct Experiment {
  std::string mode;
  int ranks, blocks, iterations;
  size_t bytes;
  int sharedBytes;
  Flags* flags = nullptr;
  std::vector<float4*> to, from;
  std::vector<cudaStream_t> streams;
  std::vector<cudaEvent_t> events;  // ready of each rank, then done of each rank
  size_t count() const { return bytes / sizeof(float4); }

  void copyOn(int rank, Word epoch, bool waits) {
    copyKernel<<<blocks, 128, sharedBytes, streams[rank]>>>(flags, rank, ranks, epoch, waits, to[rank], from[rank],
                                                            count());
  }
  CUdeviceptr word(Phase phase, int reader, int writer) const {
    return reinterpret_cast<CUdeviceptr>(&flags->said[phase][reader][writer]);
  }
  void memoryOperations(Phase phase, int rank, Word epoch, bool batched) {
    for (const bool write : {true, false}) {
      std::vector<CUstreamBatchMemOpParams> all(ranks);
      std::memset(all.data(), 0, sizeof(all[0]) * all.size());
      for (int peer = 0; peer < ranks; ++peer) {
        const CUdeviceptr address = write ? word(phase, peer, rank) : word(phase, rank, peer);
        if (batched && write) {
          all[peer].operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
          all[peer].writeValue.address = address;
          all[peer].writeValue.value64 = epoch;
        } else if (batched) {
          all[peer].operation = CU_STREAM_MEM_OP_WAIT_VALUE_64;
          all[peer].waitValue.address = address;
          all[peer].waitValue.value64 = epoch;
          all[peer].waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
        } else if (write) {
          CHECK(cuStreamWriteValue64(streams[rank], address, epoch, 0));
        } else {
          CHECK(cuStreamWaitValue64(streams[rank], address, epoch, CU_STREAM_WAIT_VALUE_GEQ));
        }
      }
      if (batched) CHECK(cuStreamBatchMemOp(streams[rank], ranks, all.data(), 0));
    }
  }
  void issueRank(int rank, Word epoch) {
    if (mode == "spin") {
      sayKernel<<<1, 32, 0, streams[rank]>>>(flags, kReady, rank, ranks, epoch);
      copyOn(rank, epoch, true);
      doneKernel<<<1, 32, 0, streams[rank]>>>(flags, rank, ranks, epoch);
    } else if (mode == "plain") {
      sayKernel<<<1, 32, 0, streams[rank]>>>(flags, kReady, rank, ranks, epoch);
      copyOn(rank, epoch, false);
      sayKernel<<<1, 32, 0, streams[rank]>>>(flags, kDone, rank, ranks, epoch);
    } else {
      memoryOperations(kReady, rank, epoch, mode == "batch");
      copyOn(rank, epoch, false);
      memoryOperations(kDone, rank, epoch, mode == "batch");
    }
  }
  void issueAllByEvents(Word epoch) {
    const auto waitForOthers = [&](int rank, int firstEvent) {
      for (int peer = 0; peer < ranks; ++peer) {
        if (peer != rank) CHECK(cudaStreamWaitEvent(streams[rank], events[firstEvent + peer], 0));
      }
    };
    for (int rank = 0; rank < ranks; ++rank) CHECK(cudaEventRecord(events[rank], streams[rank]));
    for (int rank = 0; rank < ranks; ++rank) {
      waitForOthers(rank, 0);
      copyOn(rank, epoch, false);
      CHECK(cudaEventRecord(events[ranks + rank], streams[rank]));
    }
    for (int rank = 0; rank < ranks; ++rank) waitForOthers(rank, ranks);
  }
};

using Clock = std::chrono::steady_clock;
double microsecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

void runThreads(Experiment& x, std::vector<double>& times) {
  std::barrier together(x.ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < x.ranks; ++rank) {
    threads.emplace_back([&, rank] {
      CHECK(cudaSetDevice(0));
      for (int i = 1; i <= x.iterations; ++i) {
        together.arrive_and_wait();
        const auto start = Clock::now();
        x.issueRank(rank, static_cast<Word>(i));
        cudaError_t state;
        while ((state = cudaStreamQuery(x.streams[rank])) == cudaErrorNotReady) {
          if (microsecondsSince(start) < 20e6) continue;
          std::printf("%s, %d ranks: rank %d hangs in iteration %d\n", x.mode.c_str(), x.ranks, rank, i);
          std::fflush(stdout);
          std::_Exit(3);
        }
        CHECK(state);
        together.arrive_and_wait();
        if (rank == 0) times.push_back(microsecondsSince(start));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

cudaGraphExec_t captureEvents(Experiment& x) {
  cudaEvent_t fork;
  CHECK(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming));
  CHECK(cudaStreamBeginCapture(x.streams[0], cudaStreamCaptureModeRelaxed));
  CHECK(cudaEventRecord(fork, x.streams[0]));
  for (int rank = 1; rank < x.ranks; ++rank) CHECK(cudaStreamWaitEvent(x.streams[rank], fork, 0));
  x.issueAllByEvents(1);
  for (int rank = 1; rank < x.ranks; ++rank) {
    CHECK(cudaEventRecord(x.events[rank], x.streams[rank]));
    CHECK(cudaStreamWaitEvent(x.streams[0], x.events[rank], 0));
  }
  cudaGraph_t graph;
  CHECK(cudaStreamEndCapture(x.streams[0], &graph));
  cudaGraphExec_t executable;
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  return executable;
}

void runOneThread(Experiment& x, std::vector<double>& times) {
  float4** to;
  const float4** from;
  unsigned* arrived;
  CHECK(cudaMalloc(&to, x.ranks * sizeof(*to)));
  CHECK(cudaMalloc(&from, x.ranks * sizeof(*from)));
  CHECK(cudaMalloc(&arrived, x.ranks * sizeof(*arrived)));
  CHECK(cudaMemset(arrived, 0, x.ranks * sizeof(*arrived)));
  CHECK(cudaMemcpy(to, x.to.data(), x.ranks * sizeof(*to), cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(from, x.from.data(), x.ranks * sizeof(*from), cudaMemcpyHostToDevice));
  const cudaGraphExec_t graph = x.mode == "graph" ? captureEvents(x) : nullptr;
  for (int i = 1; i <= x.iterations; ++i) {
    const auto start = Clock::now();
    if (graph != nullptr) {
      CHECK(cudaGraphLaunch(graph, x.streams[0]));
    } else if (x.mode == "events") {
      x.issueAllByEvents(static_cast<Word>(i));
    } else {
      allRanksKernel<<<dim3(x.blocks, x.ranks), 128, 0, x.streams[0]>>>(x.flags, x.ranks, static_cast<Word>(i), to,
                                                                        from, x.count(), arrived);
    }
    CHECK(cudaDeviceSynchronize());
    times.push_back(microsecondsSince(start));
  }
}

int main(int argc, char** argv) {
  if (argc < 6 || std::atoi(argv[2]) < 1 || std::atoi(argv[2]) > kMostRanks) {
    std::printf("order MODE RANKS BLOCKS ITERATIONS BYTES [SHARED_MEMORY_PER_BLOCK [WARM_UP]]; at most %d ranks\n",
                kMostRanks);
    return 2;
  }
  Experiment x{argv[1],
               std::atoi(argv[2]),
               std::atoi(argv[3]),
               std::atoi(argv[4]),
               static_cast<size_t>(std::atol(argv[5])),
               argc > 6 ? std::atoi(argv[6]) : 0};
  const bool warmUp = argc > 7 && std::atoi(argv[7]) != 0;
  CHECK(cudaSetDevice(0));
  CHECK(cuInit(0));
  CHECK(cudaMalloc(&x.flags, sizeof(Flags)));
  CHECK(cudaMemset(x.flags, 0, sizeof(Flags)));
  x.to.resize(x.ranks);
  x.from.resize(x.ranks);
  x.streams.resize(x.ranks);
  x.events.resize(2 * x.ranks);
  for (int rank = 0; rank < x.ranks; ++rank) {
    CHECK(cudaMalloc(&x.to[rank], x.bytes + sizeof(float4)));
    CHECK(cudaMalloc(&x.from[rank], x.bytes + sizeof(float4)));
    CHECK(cudaStreamCreateWithFlags(&x.streams[rank], cudaStreamNonBlocking));
  }
  for (cudaEvent_t& event : x.events) CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  CHECK(cudaFuncSetAttribute(copyKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024));
  if (warmUp) {  // loads every kernel
    sayKernel<<<1, 32, 0, x.streams[0]>>>(x.flags, kReady, 0, 0, 0);
    copyKernel<<<1, 32, 0, x.streams[0]>>>(x.flags, 0, 0, 0, false, x.to[0], x.from[0], 0);
    doneKernel<<<1, 32, 0, x.streams[0]>>>(x.flags, 0, 0, 0);
  }
  CHECK(cudaDeviceSynchronize());
  std::vector<double> times;
  const bool oneThread = x.mode == "one" || x.mode == "events" || x.mode == "graph";
  oneThread ? runOneThread(x, times) : runThreads(x, times);
  Word timeouts = 0;
  CHECK(cudaMemcpy(&timeouts, &x.flags->timeouts, sizeof timeouts, cudaMemcpyDeviceToHost));
  std::sort(times.begin(), times.end());
  const char* queues = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  std::printf(
      "%-6s ranks %2d blocks %3d shared %6d bytes %8zu warm %d queues %-2s: %llu timeouts in %d iterations, p50 %.1f "
      "us, p99 %.1f us, most %.1f us\n",
      x.mode.c_str(), x.ranks, x.blocks, x.sharedBytes, x.bytes, warmUp, queues != nullptr ? queues : "-", timeouts,
      x.iterations, times[times.size() / 2], times[times.size() * 99 / 100], times.back());
  std::fflush(stdout);
  std::_Exit(0);  // streams that hang would keep an ordinary exit waiting
}
