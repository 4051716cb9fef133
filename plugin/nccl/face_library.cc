// Calls that need no communicator.
#include "plugin/nccl/device.h"
#include "plugin/nccl/face.h"
#include "plugin/nccl/real.h"

namespace fusco::nccl::face {

ncclResult_t GetVersion(int* version) {
  return guarded("ncclGetVersion", [&] {
    if (version == nullptr) fail(Code::invalidArgument, "version is NULL");
    // Whose calls host mode has.
    *version = NCCL_VERSION_CODE;
  });
}

const char* GetErrorString(ncclResult_t result) {
  if (mode() != Mode::host) {
    if (void* const address = realFunction(Function::GetErrorString))
      return reinterpret_cast<const char* (*)(ncclResult_t)>(address)(result);
  }
  return fuscoGetErrorString(static_cast<fuscoResult_t>(result));
}

const char* GetLastError(ncclComm_t comm) {
  // What a communicator failed with is not this thread's: whoever asks is told.
  if (const CommunicatorRef communicator = findCommunicator(comm)) {
    if (communicator->state == State::failed) {
      // A copy, which stays when the communicator is destroyed.
      std::string& failure = ofThisThread<std::string, struct Failure>();
      std::lock_guard lock(communicator->errorMutex);
      failure = communicator->errorText;
      return failure.c_str();
    }
    if (communicator->state == State::ready && communicator->carried) {
      const char* const text = fuscoGetLastError(communicator->engine);
      if (text[0] != 0) return text;
    }
  }
  const std::string& own = lastError();
  void* const address = mode() == Mode::host ? nullptr : realFunction(Function::GetLastError);
  const char* const real = address == nullptr ? "" : reinterpret_cast<const char* (*)(ncclComm_t)>(address)(comm);
  if (own.empty()) return real;
  if (real[0] == 0) return own.c_str();
  // Nobody knows which of them came last: many of NCCL's calls do not pass here.
  std::string& both = ofThisThread<std::string, struct Both>();
  both = own + "; NCCL: " + real;
  return both.c_str();
}

ncclResult_t GetUniqueId(ncclUniqueId* id) {
  FUSCO_PASS_INSIDE(GetUniqueId, id)
  if (mode() == Mode::host) {
    return guarded("ncclGetUniqueId", [&] {
      if (id == nullptr) fail(Code::invalidArgument, "the id is NULL");
      *id = {};
      writeTag(*id, openMeeting());
    });
  }
  const ncclResult_t result = FUSCO_REAL(GetUniqueId, id);
  if (result == ncclSuccess) markId(*id);
  return result;
}

ncclResult_t MemAlloc(void** pointer, size_t bytes) {
  return guarded("ncclMemAlloc", [&] { check(fuscoMemAlloc(pointer, bytes)); });
}

ncclResult_t MemFree(void* pointer) {
  return guarded("ncclMemFree", [&] { check(fuscoMemFree(pointer)); });
}

}  // namespace fusco::nccl::face
