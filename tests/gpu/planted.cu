// A program with a bug of each kind that compute-sanitizer looks for, so that its silence about others can be trusted.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 64;

__global__ void writeBehindTheEnd(int* memory) { memory[kThreads + threadIdx.x] = 1; }

__global__ void raceInSharedMemory(int* out) {
  __shared__ int words[kThreads];
  words[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = words[kThreads - 1 - threadIdx.x];
}

__global__ void readWhatNobodyWrote(const int* memory, int* out) { out[threadIdx.x] = memory[threadIdx.x] + 1; }

// A lane waits with lanes that do not name it.
__global__ void waitUninvited(int* out) {
  const unsigned int named = __ballot_sync(0xffffffffu, threadIdx.x % 32 < 16);
  if (threadIdx.x % 32 <= 16) {
    out[threadIdx.x] = 1;
    __syncwarp(named);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const char* kind = count > 1 ? arguments[1] : "";
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 77;
  int *memory = nullptr, *out = nullptr;
  if (cudaMalloc(&memory, kThreads * sizeof(int)) != cudaSuccess) return 1;
  if (cudaMalloc(&out, kThreads * sizeof(int)) != cudaSuccess) return 1;
  if (std::strcmp(kind, "memcheck") == 0) {
    writeBehindTheEnd<<<1, kThreads>>>(memory);
  } else if (std::strcmp(kind, "racecheck") == 0) {
    raceInSharedMemory<<<1, kThreads>>>(out);
  } else if (std::strcmp(kind, "initcheck") == 0) {
    readWhatNobodyWrote<<<1, kThreads>>>(memory, out);
  } else if (std::strcmp(kind, "synccheck") == 0) {
    waitUninvited<<<1, kThreads>>>(out);
  }
  std::printf("%s: %s\n", kind, cudaGetErrorString(cudaDeviceSynchronize()));
  cudaFree(memory);
  cudaFree(out);
  return 0;
}
