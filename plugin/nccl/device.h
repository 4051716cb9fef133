// Device mode: communicators of the real NCCL, which the user holds; what FUSCO knows of them stands in the side table.
#pragma once

#include "plugin/nccl/group.h"

namespace fusco::nccl {

// Why this process cannot carry on a GPU, "" if it can.
const std::string& deviceReason();
// Whether communicators are to be voted on: this process can carry, or was asked to try (FUSCO_CARRY=all).
bool deviceVotes();

// After a real call that makes a communicator: enters what lies at `slot`, in a group when the group has ended.
// `tag` may be invalid. Collective when there is a vote. `child`: rank 0 has to open the place first.
void noteMade(ncclResult_t result, ncclComm_t* slot, const Tag& tag, bool child = false);
// The place where the children of a split vote; invalid where the parent is not carried. Before the real call.
Tag noteSplit(ncclComm_t parent, int color);

// The communicator, if FUSCO carries this call on it: it was decided so, and the stream is not being captured (a graph
// of one process cannot meet the others anew each time it is replayed: captured calls are NCCL's, at both ends).
CommunicatorRef carrier(ncclComm_t handle, cudaStream_t stream);
// `body` checks its arguments and adds to this thread's group; outside a group that is run at once.
ncclResult_t deviceCall(const char* name, const std::function<void()>& body);
// For libfusco's own calls: what a communicator failed with, on top of what the real library says.
ncclResult_t carriedError(const Communicator& communicator);
// At its end: `abort` gives up what is under way.
void deviceEnd(Communicator& communicator, bool abort);

ncclResult_t deviceGroupStart();
ncclResult_t deviceGroupEnd();
ncclResult_t deviceGroupSimulateEnd(ncclSimInfo_t* info);

}  // namespace fusco::nccl
