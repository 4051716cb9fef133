// Host mode: communicators that come from others. Each adds the making to this thread's group. They need nothing of the
// parent but the place that its tag leads to, so that they work on a revoked parent too.
#pragma once

#include "plugin/nccl/host.h"

namespace fusco::nccl {

// Where the ranks of `parent` that give a colour meet, for the next split of it; each split takes one.
Tag splitPlace(Communicator& parent, int color);

void addSplit(ncclComm_t handle, int color, int key, ncclComm_t* slot, const ncclConfig_t* config);
void addShrink(ncclComm_t handle, const int* excluded, int count, ncclComm_t* slot, const ncclConfig_t* config,
               int flags);
void addGrow(ncclComm_t handle, int ranks, const ncclUniqueId* id, int rank, ncclComm_t* slot,
             const ncclConfig_t* config);
// Stops what is under way on it.
void revoke(Communicator& communicator);

}  // namespace fusco::nccl
