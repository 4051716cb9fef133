// The collectives of host mode.
#include "plugin/nccl/face.h"
#include "plugin/nccl/host.h"

namespace fusco::nccl::face {

namespace {

ncclResult_t add(const char* name, const Collective& collective, ncclComm_t comm) {
  return hostCall(name, [&] {
    const CommunicatorRef communicator = usable(comm);
    const Collective& c = collective;
    const bool reduces = c.kind == CollectiveKind::allReduce || c.kind == CollectiveKind::reduce ||
                         c.kind == CollectiveKind::reduceScatter;
    bytesOf(c.type, c.count);
    if (c.root < 0 || c.root >= communicator->ranks) {
      fail(Code::invalidArgument,
           "root is " + std::to_string(c.root) + ", must be 0 to " + std::to_string(communicator->ranks - 1));
    }
    if (reduces && (c.operation < ncclSum || c.operation >= ncclNumOps)) {
      fail(Code::invalidArgument, "operation " + std::to_string(static_cast<int>(c.operation)) +
                                      ": host mode has sum, prod, max, min and avg");
    }
    const bool rooted = c.kind == CollectiveKind::reduce || c.kind == CollectiveKind::broadcast;
    const bool isRoot = c.root == communicator->rank;
    const bool sends = c.kind != CollectiveKind::broadcast || isRoot;
    const bool receives = !rooted || (c.kind == CollectiveKind::broadcast ? !isRoot : isRoot);
    if (c.count > 0 && ((sends && c.send == nullptr) || (receives && c.receive == nullptr)))
      fail(Code::invalidArgument, "a buffer is NULL");
    group().workOf(communicator).collectives.push_back(c);
  });
}

}  // namespace

ncclResult_t AllGather(const void* sendbuff, void* recvbuff, size_t sendcount, ncclDataType_t type, ncclComm_t comm,
                       cudaStream_t) {
  return add("ncclAllGather", {CollectiveKind::allGather, sendbuff, recvbuff, sendcount, type}, comm);
}

ncclResult_t AllReduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclRedOp_t op,
                       ncclComm_t comm, cudaStream_t) {
  return add("ncclAllReduce", {CollectiveKind::allReduce, sendbuff, recvbuff, count, type, op}, comm);
}

ncclResult_t ReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t) {
  return add("ncclReduceScatter", {CollectiveKind::reduceScatter, sendbuff, recvbuff, recvcount, type, op}, comm);
}

ncclResult_t Reduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                    ncclComm_t comm, cudaStream_t) {
  return add("ncclReduce", {CollectiveKind::reduce, sendbuff, recvbuff, count, type, op, root}, comm);
}

ncclResult_t Broadcast(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root,
                       ncclComm_t comm, cudaStream_t) {
  return add("ncclBroadcast", {CollectiveKind::broadcast, sendbuff, recvbuff, count, type, ncclSum, root}, comm);
}

ncclResult_t Bcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t) {
  return add("ncclBcast", {CollectiveKind::broadcast, buffer, buffer, count, type, ncclSum, root}, comm);
}

}  // namespace fusco::nccl::face
