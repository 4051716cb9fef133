// Device mode: communicators of the real NCCL, which the user holds; what FUSCO knows of them stands in the side table.
#pragma once

#include "plugin/nccl/group.h"

namespace fusco::nccl {

// Why this build cannot carry on a GPU, "" if it can.
std::string deviceReason();
// Whether communicators are to be voted on: this build can carry, or was asked to try (FUSCO_CARRY=all).
bool deviceVotes();

// After a real call that makes a communicator: enters what lies at `slot`, in a group when the group has ended.
// `tag` may be invalid. Collective when there is a vote.
void noteMade(ncclResult_t result, ncclComm_t* slot, const Tag& tag);

ncclResult_t deviceGroupStart();
ncclResult_t deviceGroupEnd();
ncclResult_t deviceGroupSimulateEnd(ncclSimInfo_t* info);

}  // namespace fusco::nccl
