// Communicators come and go.
#include <cstring>

#include "plugin/nccl/children.h"
#include "plugin/nccl/device.h"
#include "plugin/nccl/face.h"
#include "plugin/nccl/real.h"

namespace fusco::nccl::face {

ncclResult_t CommInitRankConfig(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t* config) {
  FUSCO_PASS_INSIDE(CommInitRankConfig, comm, nranks, id, rank, config)
  if (mode() == Mode::host) {
    return hostCall("ncclCommInitRankConfig", [&] { addInit(comm, nranks, rank, readTag(id), readConfig(config)); });
  }
  const ncclResult_t result = FUSCO_REAL(CommInitRankConfig, comm, nranks, id, rank, config);
  return noteMade(result, {noteInit(&id, comm, config)});
}

ncclResult_t CommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank) {
  FUSCO_PASS_INSIDE(CommInitRank, comm, nranks, id, rank)
  if (mode() == Mode::host) return hostCall("ncclCommInitRank", [&] { addInit(comm, nranks, rank, readTag(id), {}); });
  const ncclResult_t result = FUSCO_REAL(CommInitRank, comm, nranks, id, rank);
  return noteMade(result, {noteInit(&id, comm, nullptr)});
}

namespace {

// One place is enough: all ranks have all ids in the same order, and meet by the first.
void closeOtherPlaces(int nId, const ncclUniqueId* ids) {
  guarded("libfusco", [&] {
    for (int i = 1; i < nId; ++i) {
      if (const Tag tag = readTag(ids[i]); tag.valid()) closeMeeting(tag);
    }
  });
}

}  // namespace

ncclResult_t CommInitRankScalable(ncclComm_t* comm, int nranks, int rank, int nId, ncclUniqueId* ids,
                                  ncclConfig_t* config) {
  FUSCO_PASS_INSIDE(CommInitRankScalable, comm, nranks, rank, nId, ids, config)
  if (mode() == Mode::host) {
    return hostCall("ncclCommInitRankScalable", [&] {
      if (nId < 1 || ids == nullptr) fail(Code::invalidArgument, "at least one id is needed");
      closeOtherPlaces(nId, ids);
      addInit(comm, nranks, rank, readTag(ids[0]), readConfig(config));
    });
  }
  const ncclResult_t result = FUSCO_REAL(CommInitRankScalable, comm, nranks, rank, nId, ids, config);
  if (result == ncclSuccess || result == ncclInProgress) closeOtherPlaces(nId, ids);
  return noteMade(result, {noteInit(nId > 0 ? ids : nullptr, comm, config)});
}

ncclResult_t CommInitAll(ncclComm_t* comms, int ndev, const int* devlist) {
  FUSCO_PASS_INSIDE(CommInitAll, comms, ndev, devlist)
  if (mode() == Mode::host) {
    return hostCall("ncclCommInitAll", [&] {
      if (comms == nullptr || ndev < 1) fail(Code::invalidArgument, "comms is NULL or ndev below 1");
      const Tag tag = openMeeting();
      for (int r = 0; r < ndev; ++r) addInit(comms + r, ndev, r, tag, {}, devlist == nullptr ? r : devlist[r]);
    });
  }
  const ncclResult_t result = FUSCO_REAL(CommInitAll, comms, ndev, devlist);
  if (result != ncclSuccess && result != ncclInProgress) return result;
  // All ranks are here: the place needs no id to be known by.
  ncclUniqueId id{};
  markId(id);
  std::vector<Making> makings;
  for (int r = 0; r < ndev; ++r) makings.push_back(noteInit(&id, comms + r, nullptr));
  return noteMade(result, std::move(makings));
}

ncclResult_t CommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config) {
  FUSCO_PASS_INSIDE(CommSplit, comm, color, key, newcomm, config)
  if (mode() == Mode::host) return hostCall("ncclCommSplit", [&] { addSplit(comm, color, key, newcomm, config); });
  const Making making = noteSplit(comm, color, newcomm, config);
  return noteMade(FUSCO_REAL(CommSplit, comm, color, key, newcomm, config), {making});
}

ncclResult_t CommShrink(ncclComm_t comm, int* excluded, int excludedCount, ncclComm_t* newcomm, ncclConfig_t* config,
                        int flags) {
  FUSCO_PASS_INSIDE(CommShrink, comm, excluded, excludedCount, newcomm, config, flags)
  if (mode() == Mode::host)
    return hostCall("ncclCommShrink", [&] { addShrink(comm, excluded, excludedCount, newcomm, config, flags); });
  const Making making = noteShrink(comm, excluded, excludedCount, newcomm, config);
  if ((flags & NCCL_SHRINK_ABORT) != 0) deviceRevoke(comm);
  return noteMade(FUSCO_REAL(CommShrink, comm, excluded, excludedCount, newcomm, config, flags), {making});
}

ncclResult_t CommGetUniqueId(ncclComm_t comm, ncclUniqueId* id) {
  FUSCO_PASS_INSIDE(CommGetUniqueId, comm, id)
  if (mode() == Mode::host) {
    return guarded("ncclCommGetUniqueId", [&] {
      if (id == nullptr) fail(Code::invalidArgument, "the id is NULL");
      known(comm);
      *id = {};
      writeTag(*id, openMeeting());
    });
  }
  const ncclResult_t result = FUSCO_REAL(CommGetUniqueId, comm, id);
  if (result == ncclSuccess) markId(*id);
  return result;
}

ncclResult_t CommGrow(ncclComm_t comm, int nranks, const ncclUniqueId* id, int rank, ncclComm_t* newcomm,
                      ncclConfig_t* config) {
  FUSCO_PASS_INSIDE(CommGrow, comm, nranks, id, rank, newcomm, config)
  if (mode() == Mode::host) {
    return hostCall("ncclCommGrow", [&] { addGrow(comm, nranks, id, rank, newcomm, config); });
  }
  const Making making = noteGrow(comm, id, newcomm, config);
  return noteMade(FUSCO_REAL(CommGrow, comm, nranks, id, rank, newcomm, config), {making});
}

ncclResult_t CommFinalize(ncclComm_t comm) {
  FUSCO_PASS_INSIDE(CommFinalize, comm)
  if (mode() == Mode::host) {
    return guarded("ncclCommFinalize", [&] {
      if (comm == nullptr) return;
      // Calls have completed when they return: there is nothing to wait for.
      usable(comm)->state = State::finalized;
    });
  }
  return FUSCO_REAL(CommFinalize, comm);
}

ncclResult_t CommDestroy(ncclComm_t comm) {
  FUSCO_PASS_INSIDE(CommDestroy, comm)
  if (mode() != Mode::host) {
    // Out of the table before the real call: NCCL may give the address to another one at once.
    const CommunicatorRef communicator = takeOut(comm);
    if (communicator) deviceEnd(*communicator, false);
    return FUSCO_REAL(CommDestroy, comm);
  }
  return guarded("ncclCommDestroy", [&] {
    if (comm == nullptr) return;
    const CommunicatorRef communicator = known(comm);
    const State state = communicator->state;
    // Refused while plans of it live: then it stays as it is.
    if (state == State::ready || state == State::finalized) check(fuscoCommDestroy(communicator->engine));
    communicator->cancelled = true;
    // Who makes it may have looked just before that.
    if (state == State::starting && communicator->state == State::ready) revoke(*communicator);
    takeOut(comm);
  });
}

ncclResult_t CommAbort(ncclComm_t comm) {
  FUSCO_PASS_INSIDE(CommAbort, comm)
  const CommunicatorRef communicator = takeOut(comm);
  if (communicator) communicator->cancelled = true;
  if (mode() != Mode::host) {
    if (communicator) deviceEnd(*communicator, true);
    return FUSCO_REAL(CommAbort, comm);
  }
  return guarded("ncclCommAbort", [&] {
    if (comm == nullptr) return;
    if (!communicator) fail(Code::invalidArgument, "there is no such communicator (any more): was it destroyed?");
    // Not the lock of calls: a call that waits is what is to be ended.
    const State state = communicator->state;
    if (state == State::ready || state == State::finalized) check(fuscoCommAbort(communicator->engine));
  });
}

ncclResult_t CommRevoke(ncclComm_t comm, int flags) {
  FUSCO_PASS_INSIDE(CommRevoke, comm, flags)
  if (mode() != Mode::host) {
    deviceRevoke(comm);
    return FUSCO_REAL(CommRevoke, comm, flags);
  }
  return guarded("ncclCommRevoke", [&] {
    if (flags != 0) fail(Code::invalidArgument, "revokeFlags is " + std::to_string(flags) + ", must be 0");
    revoke(*usable(comm));
  });
}

ncclResult_t CommSuspend(ncclComm_t comm, int flags) {
  FUSCO_PASS_INSIDE(CommSuspend, comm, flags)
  if (mode() != Mode::host) return FUSCO_REAL(CommSuspend, comm, flags);
  // Nothing is under way between calls, and the memory that is held is small.
  return guarded("ncclCommSuspend", [&] { usable(comm); });
}

ncclResult_t CommResume(ncclComm_t comm) {
  FUSCO_PASS_INSIDE(CommResume, comm)
  if (mode() != Mode::host) return FUSCO_REAL(CommResume, comm);
  return guarded("ncclCommResume", [&] { usable(comm); });
}

ncclResult_t CommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  FUSCO_PASS_INSIDE(CommGetAsyncError, comm, error)
  if (mode() != Mode::host) {
    const ncclResult_t result = FUSCO_REAL(CommGetAsyncError, comm, error);
    if (result != ncclSuccess || error == nullptr || *error != ncclSuccess) return result;
    // Ready is who is ready on both sides.
    if (const CommunicatorRef communicator = findCommunicator(comm)) {
      *error = carriedError(*communicator);
      if (*error == ncclSuccess) *error = childrenState(*communicator);
    }
    return result;
  }
  return guarded("ncclCommGetAsyncError", [&] {
    if (error == nullptr) fail(Code::invalidArgument, "asyncError is NULL");
    const CommunicatorRef communicator = known(comm);
    *error = ncclSuccess;
    if (communicator->state == State::starting) {
      *error = ncclInProgress;
    } else if (communicator->state == State::failed) {
      std::lock_guard lock(communicator->errorMutex);
      *error = communicator->error;
    } else if (communicator->state != State::revoked) {
      fuscoResult_t state = fuscoSuccess;
      check(fuscoCommGetAsyncError(communicator->engine, &state));
      *error = static_cast<ncclResult_t>(state);
    }
  });
}

ncclResult_t CommCount(const ncclComm_t comm, int* count) {
  return guarded("ncclCommCount", [&] {
    if (count == nullptr) fail(Code::invalidArgument, "count is NULL");
    *count = known(comm)->ranks;
  });
}

ncclResult_t CommUserRank(const ncclComm_t comm, int* rank) {
  return guarded("ncclCommUserRank", [&] {
    if (rank == nullptr) fail(Code::invalidArgument, "rank is NULL");
    *rank = known(comm)->rank;
  });
}

ncclResult_t CommCuDevice(const ncclComm_t comm, int* device) {
  return guarded("ncclCommCuDevice", [&] {
    if (device == nullptr) fail(Code::invalidArgument, "device is NULL");
    *device = known(comm)->device;
  });
}

ncclResult_t CommRegister(const ncclComm_t comm, void* buffer, size_t bytes, void** handle) {
  return guarded("ncclCommRegister", [&] { check(fuscoCommRegister(usable(comm)->engine, buffer, bytes, handle)); });
}

ncclResult_t CommDeregister(const ncclComm_t comm, void* handle) {
  return guarded("ncclCommDeregister", [&] {
    const CommunicatorRef communicator = known(comm);
    // As NCCL gives NULL for what it does not register.
    if (handle == nullptr) return;
    if (communicator->state != State::finalized) requireUsable(*communicator);
    check(fuscoCommDeregister(communicator->engine, handle));
  });
}

}  // namespace fusco::nccl::face
