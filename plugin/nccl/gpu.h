// What device mode asks of GPUs, and nothing else does. tests/nccl has another implementation, on host memory, so that
// the rest of device mode runs where there is no GPU.
#pragma once

#include <string>

#include "plugin/nccl/communicators.h"

namespace fusco::nccl {

// Why this process cannot carry on a GPU, "" if it can.
const std::string& deviceReason();
// All ranks have said that they are ready to. Throws where they cannot reach each other's memory.
fuscoComm_t makeDeviceEngine(const Communicator& communicator, const fuscoUniqueId& id, int timeoutMs);
// Whether each rank captures its calls by itself, so that they can be carried: the same on all ranks.
bool engineCaptures(fuscoComm_t engine);
// Whether what is issued on this stream goes into a graph.
bool captured(cudaStream_t stream);

}  // namespace fusco::nccl
