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

void addBytes(const CommunicatorRef& communicator, bool send, const void* base, std::size_t bytes, int peer) {
  checkPeer(*communicator, peer);
  if (base == nullptr && bytes > 0)
    fail(Code::invalidArgument, std::string(send ? "sendbuff" : "recvbuff") + " is NULL");
  group().workOf(communicator).transfers.push_back({send, peer, const_cast<void*>(base), 1, bytes, false, {}});
}

// Byte `offset` of a buffer that may be NULL when nothing is moved.
const void* at(const void* base, std::size_t offset) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + offset;
}

void addRows(ncclComm_t comm, bool send, const void* base, std::size_t count, ncclDataType_t type, int peer,
             const void* indices, int rowBytes) {
  const CommunicatorRef communicator = usable(comm);
  checkPeer(*communicator, peer);
  const std::size_t bytes = bytesOf(type, count);
  if (rowBytes < 1 || bytes % static_cast<std::size_t>(rowBytes) != 0) {
    fail(Code::invalidArgument,
         std::to_string(bytes) + " bytes are no whole number of segments of " + std::to_string(rowBytes) + " bytes");
  }
  if (bytes > 0 && (base == nullptr || indices == nullptr))
    fail(Code::invalidArgument, "the buffer or the list of segments is NULL");
  Transfer transfer{send,
                    peer,
                    const_cast<void*>(base),
                    bytes / static_cast<std::size_t>(rowBytes),
                    static_cast<std::size_t>(rowBytes),
                    bytes > 0,
                    {}};
  const auto* const rows = static_cast<const std::int64_t*>(indices);
  if (bytes > 0) transfer.list.assign(rows, rows + transfer.rows);
  group().workOf(communicator).transfers.push_back(std::move(transfer));
}

// Of calls that the real library is asked to carry out.
void countPassed(ncclComm_t comm) {
  if (const CommunicatorRef communicator = findCommunicator(comm))
    communicator->passedCalls.fetch_add(1, std::memory_order_relaxed);
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
  if (mode() == Mode::host)
    return hostCall("ncclSend", [&] { addBytes(usable(comm), true, sendbuff, bytesOf(type, count), peer); });
  countPassed(comm);
  return FUSCO_REAL(Send, sendbuff, count, type, peer, comm, stream);
}

ncclResult_t Recv(void* recvbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  FUSCO_PASS_INSIDE(Recv, recvbuff, count, type, peer, comm, stream)
  if (mode() == Mode::host)
    return hostCall("ncclRecv", [&] { addBytes(usable(comm), false, recvbuff, bytesOf(type, count), peer); });
  countPassed(comm);
  return FUSCO_REAL(Recv, recvbuff, count, type, peer, comm, stream);
}

ncclResult_t AlltoAll(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclComm_t comm,
                      cudaStream_t stream) {
  FUSCO_PASS_INSIDE(AlltoAll, sendbuff, recvbuff, count, type, comm, stream)
  if (mode() == Mode::host) {
    return hostCall("ncclAlltoAll", [&] {
      const CommunicatorRef communicator = usable(comm);
      const std::size_t bytes = bytesOf(type, count);
      for (int peer = 0; peer < communicator->ranks; ++peer) {
        const std::size_t offset = static_cast<std::size_t>(peer) * bytes;
        addBytes(communicator, true, at(sendbuff, offset), bytes, peer);
        addBytes(communicator, false, at(recvbuff, offset), bytes, peer);
      }
    });
  }
  countPassed(comm);
  return FUSCO_REAL(AlltoAll, sendbuff, recvbuff, count, type, comm, stream);
}

ncclResult_t Gather(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                    cudaStream_t stream) {
  FUSCO_PASS_INSIDE(Gather, sendbuff, recvbuff, count, type, root, comm, stream)
  if (mode() == Mode::host) {
    return hostCall("ncclGather", [&] {
      const CommunicatorRef communicator = usable(comm);
      checkPeer(*communicator, root, "root");
      const std::size_t bytes = bytesOf(type, count);
      addBytes(communicator, true, sendbuff, bytes, root);
      for (int peer = 0; root == communicator->rank && peer < communicator->ranks; ++peer)
        addBytes(communicator, false, at(recvbuff, static_cast<std::size_t>(peer) * bytes), bytes, peer);
    });
  }
  countPassed(comm);
  return FUSCO_REAL(Gather, sendbuff, recvbuff, count, type, root, comm, stream);
}

ncclResult_t Scatter(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                     cudaStream_t stream) {
  FUSCO_PASS_INSIDE(Scatter, sendbuff, recvbuff, count, type, root, comm, stream)
  if (mode() == Mode::host) {
    return hostCall("ncclScatter", [&] {
      const CommunicatorRef communicator = usable(comm);
      checkPeer(*communicator, root, "root");
      const std::size_t bytes = bytesOf(type, count);
      for (int peer = 0; root == communicator->rank && peer < communicator->ranks; ++peer)
        addBytes(communicator, true, at(sendbuff, static_cast<std::size_t>(peer) * bytes), bytes, peer);
      addBytes(communicator, false, recvbuff, bytes, root);
    });
  }
  countPassed(comm);
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
  countPassed(comm);
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
  if (mode() != Mode::host) {
    ncclResult_t passed = ncclSuccess;
    const ncclResult_t checked = guarded("ncclAllToAllv", [&] {
      checkArrays();
      passed = passAllToAllv(sendbuff, sendcounts, sdispls, recvbuff, recvcounts, rdispls, datatype, comm, stream);
    });
    return checked != ncclSuccess ? checked : passed;
  }
  return hostCall("ncclAllToAllv", [&] {
    const CommunicatorRef communicator = usable(comm);
    checkArrays();
    checkOverlap(communicator, sendbuff, sendcounts, sdispls, recvbuff, recvcounts, rdispls, datatype);
    for (int peer = 0; peer < communicator->ranks; ++peer) {
      addBytes(communicator, true, at(sendbuff, bytesOf(datatype, sdispls[peer])), bytesOf(datatype, sendcounts[peer]),
               peer);
      addBytes(communicator, false, at(recvbuff, bytesOf(datatype, rdispls[peer])), bytesOf(datatype, recvcounts[peer]),
               peer);
    }
  });
}

ncclResult_t ncclAllToAll(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype, ncclComm_t comm,
                          cudaStream_t stream) {
  if (mode() == Mode::host || realFunction(Function::AlltoAll) != nullptr)
    return face::AlltoAll(sendbuff, recvbuff, count, datatype, comm, stream);
  ncclResult_t passed = ncclSuccess;
  const ncclResult_t checked = guarded("ncclAllToAll", [&] {
    int ranks = 0;
    passed = FUSCO_REAL(CommCount, comm, &ranks);
    const std::vector<size_t> counts(static_cast<std::size_t>(ranks), count);
    std::vector<size_t> displacements;
    for (int peer = 0; peer < ranks; ++peer) displacements.push_back(static_cast<std::size_t>(peer) * count);
    if (passed == ncclSuccess)
      passed = passAllToAllv(sendbuff, counts.data(), displacements.data(), recvbuff, counts.data(),
                             displacements.data(), datatype, comm, stream);
  });
  return checked != ncclSuccess ? checked : passed;
}

ncclResult_t gatherSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int dest, ncclComm_t comm,
                        cudaStream_t, const void* segmentIndices, int bytesPerSegment) {
  return hostCall("gatherSend", [&] {
    if (mode() != Mode::host) fail(Code::invalidUsage, "NCCL cannot send segments: " + deviceReason());
    addRows(comm, true, sendbuff, count, datatype, dest, segmentIndices, bytesPerSegment);
  });
}

ncclResult_t scatterRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int src, ncclComm_t comm, cudaStream_t,
                         const void* segmentIndices, int bytesPerSegment) {
  return hostCall("scatterRecv", [&] {
    if (mode() != Mode::host) fail(Code::invalidUsage, "NCCL cannot receive segments: " + deviceReason());
    addRows(comm, false, recvbuff, count, datatype, src, segmentIndices, bytesPerSegment);
  });
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
