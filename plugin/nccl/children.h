// Communicators that come from others. They need nothing of the parent but the place that its tag leads to, so that
// they work on a revoked parent too.
#pragma once

#include "plugin/nccl/host.h"

namespace fusco::nccl {

// Where the ranks of `parent` that give a colour meet, for the next split of it; each split takes one.
Tag splitPlace(Communicator& parent, int color);
// The same for those that are left without some, and for the parent's ranks before it grows; they then tell each other
// which place the one that made the id has brought. Throws when one of them does not come in time.
Tag shrinkPlace(Communicator& parent, const std::vector<int>& excluded);
Tag growthMeeting(Communicator& parent);
Tag growthPlace(Communicator& parent, const Tag& meeting, const Tag& brought, std::int64_t patienceMs);

// Host mode: each adds the making to this thread's group.
void addSplit(ncclComm_t handle, int color, int key, ncclComm_t* slot, const ncclConfig_t* config);
void addShrink(ncclComm_t handle, const int* excluded, int count, ncclComm_t* slot, const ncclConfig_t* config,
               int flags);
void addGrow(ncclComm_t handle, int ranks, const ncclUniqueId* id, int rank, ncclComm_t* slot,
             const ncclConfig_t* config);
// Stops what is under way on it.
void revoke(Communicator& communicator);

}  // namespace fusco::nccl
