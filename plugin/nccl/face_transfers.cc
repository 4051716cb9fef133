// Groups, send and receive, and what is made of them.
#include <cstring>

#include "fusco/nccl.h"
#include "plugin/nccl/device.h"
#include "plugin/nccl/face.h"
#include "plugin/nccl/host.h"
#include "plugin/nccl/real.h"

namespace fusco::nccl {

namespace {

void checkPeer(const Communicator& communicator, int peer, const char* what = "peer") {
  if (peer < 0 || peer >= communicator.ranks) {
    fail(Code::invalidArgument, std::string(what) + " is " + std::to_string(peer) + ", must be 0 to " +
                                    std::to_string(communicator.ranks - 1));
  }
}

void addBytes(const CommunicatorRef& communicator, bool send, const void* base, std::size_t bytes, int peer,
              cudaStream_t stream) {
  checkPeer(*communicator, peer);
  if (base == nullptr && bytes > 0)
    fail(Code::invalidArgument, std::string(send ? "sendbuff" : "recvbuff") + " is NULL");
  Transfer transfer{send, peer, const_cast<void*>(base), 1, bytes};
  transfer.stream = stream;
  group().workOf(communicator).transfers.push_back(std::move(transfer));
}

// Byte `offset` of a buffer that may be NULL when nothing is moved.
const void* at(const void* base, std::size_t offset) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + offset;
}

void addRows(const CommunicatorRef& communicator, bool send, const void* base, std::size_t count, ncclDataType_t type,
             int peer, const void* indices, int rowBytes, cudaStream_t stream) {
  checkPeer(*communicator, peer);
  const std::size_t bytes = bytesOf(type, count);
  if (rowBytes < 1 || bytes % static_cast<std::size_t>(rowBytes) != 0) {
    fail(Code::invalidArgument,
         std::to_string(bytes) + " bytes are no whole number of segments of " + std::to_string(rowBytes) + " bytes");
  }
  if (bytes > 0 && (base == nullptr || indices == nullptr))
    fail(Code::invalidArgument, "the buffer or the list of segments is NULL");
  const auto size = static_cast<std::size_t>(rowBytes);
  Transfer transfer{send, peer, const_cast<void*>(base), bytes / size, size, bytes > 0};
  transfer.stream = stream;
  const auto* const rows = static_cast<const std::int64_t*>(indices);
  if (mode() == Mode::device) {
    transfer.deviceList = indices;
  } else if (bytes > 0) {
    transfer.list.assign(rows, rows + transfer.rows);
  }
  group().workOf(communicator).transfers.push_back(std::move(transfer));
}

// A call that host mode and device mode have in common: `add` puts its transfers into this thread's group. False: it is
// the real library's.
bool carried(ncclResult_t& result, const char* name, ncclComm_t comm, cudaStream_t stream,
             const std::function<void(const CommunicatorRef&)>& add) {
  if (mode() == Mode::host) {
    result = hostCall(name, [&] { add(usable(comm)); });
    return true;
  }
  const CommunicatorRef communicator = carrier(comm, stream);
  if (!communicator) return false;
  result = deviceCall(name, communicator, [&] { add(communicator); });
  return true;
}

}  // namespace

namespace face {

ncclResult_t GroupStart() {
  FUSCO_PASS_INSIDE(GroupStart)
  return mode() == Mode::host ? hostGroupStart() : deviceGroupStart();
}

ncclResult_t GroupEnd() {
  FUSCO_PASS_INSIDE(GroupEnd)
  return mode() == Mode::host ? hostGroupEnd(false) : deviceGroupEnd();
}

ncclResult_t GroupSimulateEnd(ncclSimInfo_t* info) {
  FUSCO_PASS_INSIDE(GroupSimulateEnd, info)
  if (mode() != Mode::host) return deviceGroupSimulateEnd(info);
  if (info != nullptr) info->estimatedTime = 0;
  return hostGroupEnd(true);
}

ncclResult_t Send(const void* sendbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                  cudaStream_t stream) {
  FUSCO_PASS_INSIDE(Send, sendbuff, count, type, peer, comm, stream)
  ncclResult_t result = ncclSuccess;
  const auto add = [&](const CommunicatorRef& communicator) {
    addBytes(communicator, true, sendbuff, bytesOf(type, count), peer, stream);
  };
  if (carried(result, "ncclSend", comm, stream, add)) return result;
  return FUSCO_REAL(Send, sendbuff, count, type, peer, comm, stream);
}

ncclResult_t Recv(void* recvbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  FUSCO_PASS_INSIDE(Recv, recvbuff, count, type, peer, comm, stream)
  ncclResult_t result = ncclSuccess;
  const auto add = [&](const CommunicatorRef& communicator) {
    addBytes(communicator, false, recvbuff, bytesOf(type, count), peer, stream);
  };
  if (carried(result, "ncclRecv", comm, stream, add)) return result;
  return FUSCO_REAL(Recv, recvbuff, count, type, peer, comm, stream);
}

ncclResult_t AlltoAll(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclComm_t comm,
                      cudaStream_t stream) {
  FUSCO_PASS_INSIDE(AlltoAll, sendbuff, recvbuff, count, type, comm, stream)
  ncclResult_t result = ncclSuccess;
  const auto add = [&](const CommunicatorRef& communicator) {
    const std::size_t bytes = bytesOf(type, count);
    for (int peer = 0; peer < communicator->ranks; ++peer) {
      const std::size_t offset = static_cast<std::size_t>(peer) * bytes;
      addBytes(communicator, true, at(sendbuff, offset), bytes, peer, stream);
      addBytes(communicator, false, at(recvbuff, offset), bytes, peer, stream);
    }
  };
  if (carried(result, "ncclAlltoAll", comm, stream, add)) return result;
  return FUSCO_REAL(AlltoAll, sendbuff, recvbuff, count, type, comm, stream);
}

ncclResult_t Gather(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                    cudaStream_t stream) {
  FUSCO_PASS_INSIDE(Gather, sendbuff, recvbuff, count, type, root, comm, stream)
  ncclResult_t result = ncclSuccess;
  const auto add = [&](const CommunicatorRef& communicator) {
    checkPeer(*communicator, root, "root");
    const std::size_t bytes = bytesOf(type, count);
    addBytes(communicator, true, sendbuff, bytes, root, stream);
    for (int peer = 0; root == communicator->rank && peer < communicator->ranks; ++peer)
      addBytes(communicator, false, at(recvbuff, static_cast<std::size_t>(peer) * bytes), bytes, peer, stream);
  };
  if (carried(result, "ncclGather", comm, stream, add)) return result;
  return FUSCO_REAL(Gather, sendbuff, recvbuff, count, type, root, comm, stream);
}

ncclResult_t Scatter(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                     cudaStream_t stream) {
  FUSCO_PASS_INSIDE(Scatter, sendbuff, recvbuff, count, type, root, comm, stream)
  ncclResult_t result = ncclSuccess;
  const auto add = [&](const CommunicatorRef& communicator) {
    checkPeer(*communicator, root, "root");
    const std::size_t bytes = bytesOf(type, count);
    for (int peer = 0; root == communicator->rank && peer < communicator->ranks; ++peer)
      addBytes(communicator, true, at(sendbuff, static_cast<std::size_t>(peer) * bytes), bytes, peer, stream);
    addBytes(communicator, false, recvbuff, bytes, root, stream);
  };
  if (carried(result, "ncclScatter", comm, stream, add)) return result;
  return FUSCO_REAL(Scatter, sendbuff, recvbuff, count, type, root, comm, stream);
}

}  // namespace face

namespace {

// Through the real library, where nothing is carried: a group of sends and receives.
ncclResult_t passAllToAllv(const void* sendbuff, const size_t sendcounts[], const size_t sdispls[], void* recvbuff,
                           const size_t recvcounts[], const size_t rdispls[], ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  int ranks = 0;
  ncclResult_t result = FUSCO_REAL(CommCount, comm, &ranks);
  if (result != ncclSuccess) return result;
  const std::size_t element = bytesOf(type, 1);
  result = FUSCO_REAL(GroupStart);
  if (result != ncclSuccess) return result;
  for (int peer = 0; peer < ranks && result == ncclSuccess; ++peer) {
    result = FUSCO_REAL(Send, at(sendbuff, sdispls[peer] * element), sendcounts[peer], type, peer, comm, stream);
    if (result != ncclSuccess) break;
    result = FUSCO_REAL(Recv, const_cast<void*>(at(recvbuff, rdispls[peer] * element)), recvcounts[peer], type, peer,
                        comm, stream);
  }
  const ncclResult_t ended = FUSCO_REAL(GroupEnd);
  return result != ncclSuccess ? result : ended;
}

void checkOverlap(const CommunicatorRef& communicator, const void* sendbuff, const size_t sendcounts[],
                  const size_t sdispls[], const void* recvbuff, const size_t recvcounts[], const size_t rdispls[],
                  ncclDataType_t type) {
  const auto range = [&](const void* base, const size_t counts[], const size_t displs[]) {
    std::uintptr_t low = UINTPTR_MAX, high = 0;
    for (int peer = 0; peer < communicator->ranks; ++peer) {
      if (counts[peer] == 0) continue;
      const auto begin = reinterpret_cast<std::uintptr_t>(base) + bytesOf(type, displs[peer]);
      low = std::min(low, begin);
      high = std::max(high, begin + bytesOf(type, counts[peer]));
    }
    return std::pair(low, high);
  };
  const auto [sendLow, sendHigh] = range(sendbuff, sendcounts, sdispls);
  const auto [receiveLow, receiveHigh] = range(recvbuff, recvcounts, rdispls);
  if (sendLow < receiveHigh && receiveLow < sendHigh) fail(Code::invalidArgument, "sendbuff and recvbuff overlap");
}

}  // namespace

}  // namespace fusco::nccl

using namespace fusco;
using namespace fusco::nccl;

ncclResult_t ncclAllToAllv(const void* sendbuff, const size_t sendcounts[], const size_t sdispls[], void* recvbuff,
                           const size_t recvcounts[], const size_t rdispls[], ncclDataType_t datatype, ncclComm_t comm,
                           cudaStream_t stream) {
  const auto checkArrays = [&] {
    if (sendcounts == nullptr || sdispls == nullptr || recvcounts == nullptr || rdispls == nullptr)
      fail(Code::invalidArgument, "an array of counts or displacements is NULL");
  };
  ncclResult_t result = ncclSuccess;
  const auto add = [&](const CommunicatorRef& communicator) {
    checkArrays();
    checkOverlap(communicator, sendbuff, sendcounts, sdispls, recvbuff, recvcounts, rdispls, datatype);
    for (int peer = 0; peer < communicator->ranks; ++peer) {
      addBytes(communicator, true, at(sendbuff, bytesOf(datatype, sdispls[peer])), bytesOf(datatype, sendcounts[peer]),
               peer, stream);
      addBytes(communicator, false, at(recvbuff, bytesOf(datatype, rdispls[peer])), bytesOf(datatype, recvcounts[peer]),
               peer, stream);
    }
  };
  if (carried(result, "ncclAllToAllv", comm, stream, add)) return result;
  ncclResult_t passed = ncclSuccess;
  const ncclResult_t checked = guarded("ncclAllToAllv", [&] {
    checkArrays();
    passed = passAllToAllv(sendbuff, sendcounts, sdispls, recvbuff, recvcounts, rdispls, datatype, comm, stream);
  });
  return checked != ncclSuccess ? checked : passed;
}

ncclResult_t ncclAllToAll(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype, ncclComm_t comm,
                          cudaStream_t stream) {
  if (mode() == Mode::host || realFunction(Function::AlltoAll) != nullptr)
    return face::AlltoAll(sendbuff, recvbuff, count, datatype, comm, stream);
  // This NCCL has no such call: as sends and receives.
  int ranks = 0;
  const ncclResult_t counted = FUSCO_REAL(CommCount, comm, &ranks);
  if (counted != ncclSuccess) return counted;
  const std::vector<size_t> counts(static_cast<std::size_t>(ranks), count);
  std::vector<size_t> displacements;
  for (int peer = 0; peer < ranks; ++peer) displacements.push_back(static_cast<std::size_t>(peer) * count);
  return ncclAllToAllv(sendbuff, counts.data(), displacements.data(), recvbuff, counts.data(), displacements.data(),
                       datatype, comm, stream);
}

namespace {

ncclResult_t rowsCall(const char* name, bool send, const void* buffer, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream, const void* indices, int rowBytes) {
  ncclResult_t result = ncclSuccess;
  const auto add = [&](const CommunicatorRef& communicator) {
    addRows(communicator, send, buffer, count, type, peer, indices, rowBytes, stream);
  };
  if (carried(result, name, comm, stream, add)) return result;
  return guarded(name, [&] {
    const CommunicatorRef communicator = findCommunicator(comm);
    const std::string why = !communicator           ? "the communicator is not known"
                            : communicator->carried ? "a call that is captured is passed on"
                                                    : "the communicator is not carried: " + communicator->reason;
    fail(Code::invalidUsage, "NCCL cannot move segments, and " + why);
  });
}

}  // namespace

ncclResult_t gatherSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int dest, ncclComm_t comm,
                        cudaStream_t stream, const void* segmentIndices, int bytesPerSegment) {
  return rowsCall("gatherSend", true, sendbuff, count, datatype, dest, comm, stream, segmentIndices, bytesPerSegment);
}

ncclResult_t scatterRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int src, ncclComm_t comm,
                         cudaStream_t stream, const void* segmentIndices, int bytesPerSegment) {
  return rowsCall("scatterRecv", false, recvbuff, count, datatype, src, comm, stream, segmentIndices, bytesPerSegment);
}

ncclResult_t fuscoNcclComm(ncclComm_t comm, fuscoComm_t* carrier) {
  return guarded("fuscoNcclComm", [&] {
    if (carrier == nullptr) fail(Code::invalidArgument, "carrier is NULL");
    *carrier = nullptr;
    const CommunicatorRef communicator = usable(comm);
    if (!communicator->carried) fail(Code::invalidUsage, "the communicator is not carried: " + communicator->reason);
    *carrier = communicator->engine;
  });
}
