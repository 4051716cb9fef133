// Host mode (FUSCO_DEVICE=host): communicators of ranks whose buffers lie in host memory, with no NCCL and no GPU.
#pragma once

#include "plugin/nccl/group.h"

namespace fusco::nccl {

// Read as far as it reaches.
Wishes readConfig(const ncclConfig_t* config);

// Adds the making of a communicator to this thread's group. Non-blocking: *slot is set and a thread goes on.
void addInit(ncclComm_t* slot, int ranks, int rank, const Tag& tag, Wishes wishes, int device = 0);

// The communicator behind a handle; throws for unknown ones.
CommunicatorRef known(ncclComm_t handle);
// The same, ready to be used.
CommunicatorRef usable(ncclComm_t handle);
void requireUsable(const Communicator& communicator);

std::size_t bytesOf(ncclDataType_t type, std::size_t count);  // throws for unknown types and overflow

// `count` inputs in rank order become one output, by an operation; sums of small floats are made in FP32.
void reduceInOrder(ncclDataType_t type, ncclRedOp_t operation, const std::vector<const void*>& inputs, void* output,
                   std::size_t count);

}  // namespace fusco::nccl
