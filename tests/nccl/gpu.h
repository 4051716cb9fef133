// For the programs that run on GPUs.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "nccl/loop.h"

namespace fusco::test {

inline void cuda(cudaError_t error, int line) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(cudaGetErrorString(error)) + " at line " + std::to_string(line));
}
#define CUDA(call) ::fusco::test::cuda((call), __LINE__)

// Ranks of a process take GPUs in turn. Tells NCCL to take several ranks on a GPU where there are fewer GPUs than
// ranks.
void shareGpus(const Rank& process, int ranksOfProcess);
// Whether this NCCL takes several ranks of one process on a GPU; "" if it does.
std::string refusesSeveralRanks(int ranksOfProcess);

void gpuLoop(const Rank& process, const LoopShape& shape);

}  // namespace fusco::test
