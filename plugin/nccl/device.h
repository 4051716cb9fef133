// Device mode: communicators of the real NCCL, which the user holds; what FUSCO knows of them stands in the side table.
#pragma once

#include "plugin/nccl/group.h"
#include "plugin/nccl/host.h"

namespace fusco::nccl {

// What a call that made a communicator leaves to be done for it: all its ranks vote, where they can meet.
struct Making {
  ncclComm_t* slot = nullptr;  // where the real library stores it, maybe later
  Tag tag;                     // the place where they meet; invalid: there is none
  ncclUniqueId id{};           // that it came with
  Wishes wishes;
  CommunicatorRef parent;  // of split, shrink and grow, where it is carried
  bool childless = false;  // of a split without a colour
  // The parent's ranks meet at `tag` first, since only one of them has brought the place that the joining ones know.
  bool grows = false;
  Tag brought;
};

// Whether communicators with such wishes are to be voted on.
bool deviceVotes(const Wishes& wishes);

// After the real call: enters what was made, in a group when the group has ended. Collective when there is a vote. What
// is made without blocking is voted on by a thread, and ncclInProgress till then.
ncclResult_t noteMade(ncclResult_t result, std::vector<Making> makings);
// What is needed for that, noted before the real call.
Making noteInit(const ncclUniqueId* id, ncclComm_t* slot, const ncclConfig_t* config);
Making noteSplit(ncclComm_t parent, int color, ncclComm_t* slot, const ncclConfig_t* config);
Making noteShrink(ncclComm_t parent, const int* excluded, int count, ncclComm_t* slot, const ncclConfig_t* config);
Making noteGrow(ncclComm_t parent, const ncclUniqueId* id, ncclComm_t* slot, const ncclConfig_t* config);
// Puts the mark of a place on an id of the real library's, if there may be a vote.
void markId(ncclUniqueId& id);
// Children that the real library was still making when it was asked: ncclInProgress until they have been voted on too.
ncclResult_t childrenState(Communicator& parent);

// The communicator, if FUSCO carries this call on it: it was decided so, and the stream is not being captured, or can
// be (else captured calls are NCCL's, at both ends).
CommunicatorRef carrier(ncclComm_t handle, cudaStream_t stream);
// `body` checks its arguments and adds to this thread's group; outside a group that is run at once.
ncclResult_t deviceCall(const char* name, const CommunicatorRef& communicator, const std::function<void()>& body);
// For libfusco's own calls: what a communicator failed with, on top of what the real library says.
ncclResult_t carriedError(const Communicator& communicator);
// At its end: `abort` gives up what is under way.
void deviceEnd(Communicator& communicator, bool abort);
// Gives up what is under way; the communicator stays, and carries nothing more.
void deviceRevoke(ncclComm_t handle);

ncclResult_t deviceGroupStart();
ncclResult_t deviceGroupEnd();
ncclResult_t deviceGroupSimulateEnd(ncclSimInfo_t* info);

}  // namespace fusco::nccl
