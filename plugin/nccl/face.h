// The functions that libfusco answers itself, with the types of NCCL's header: ncclX is face::X.
#pragma once

#include "fusco/nccl_api.h"

namespace fusco::nccl::face {

// Libraries
ncclResult_t GetVersion(int* version);
const char* GetErrorString(ncclResult_t result);
const char* GetLastError(ncclComm_t comm);
ncclResult_t GetUniqueId(ncclUniqueId* id);
ncclResult_t MemAlloc(void** pointer, size_t bytes);
ncclResult_t MemFree(void* pointer);

// Communicators
ncclResult_t CommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank);
ncclResult_t CommInitRankConfig(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t* config);
ncclResult_t CommInitRankScalable(ncclComm_t* comm, int nranks, int rank, int nId, ncclUniqueId* ids,
                                  ncclConfig_t* config);
ncclResult_t CommInitAll(ncclComm_t* comms, int ndev, const int* devlist);
ncclResult_t CommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config);
ncclResult_t CommShrink(ncclComm_t comm, int* excluded, int excludedCount, ncclComm_t* newcomm, ncclConfig_t* config,
                        int flags);
ncclResult_t CommGetUniqueId(ncclComm_t comm, ncclUniqueId* id);
ncclResult_t CommGrow(ncclComm_t comm, int nranks, const ncclUniqueId* id, int rank, ncclComm_t* newcomm,
                      ncclConfig_t* config);
ncclResult_t CommFinalize(ncclComm_t comm);
ncclResult_t CommDestroy(ncclComm_t comm);
ncclResult_t CommAbort(ncclComm_t comm);
ncclResult_t CommRevoke(ncclComm_t comm, int flags);
ncclResult_t CommSuspend(ncclComm_t comm, int flags);
ncclResult_t CommResume(ncclComm_t comm);
ncclResult_t CommGetAsyncError(ncclComm_t comm, ncclResult_t* error);
ncclResult_t CommCount(const ncclComm_t comm, int* count);
ncclResult_t CommUserRank(const ncclComm_t comm, int* rank);
ncclResult_t CommCuDevice(const ncclComm_t comm, int* device);
ncclResult_t CommRegister(const ncclComm_t comm, void* buffer, size_t bytes, void** handle);
ncclResult_t CommDeregister(const ncclComm_t comm, void* handle);

// Groups and transfers
ncclResult_t GroupStart();
ncclResult_t GroupEnd();
ncclResult_t GroupSimulateEnd(ncclSimInfo_t* info);
ncclResult_t Send(const void* sendbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                  cudaStream_t stream);
ncclResult_t Recv(void* recvbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream);
ncclResult_t AlltoAll(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclComm_t comm,
                      cudaStream_t stream);
ncclResult_t Gather(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                    cudaStream_t stream);
ncclResult_t Scatter(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                     cudaStream_t stream);

// Collectives, in host mode
ncclResult_t AllGather(const void* sendbuff, void* recvbuff, size_t sendcount, ncclDataType_t type, ncclComm_t comm,
                       cudaStream_t stream);
ncclResult_t AllReduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclRedOp_t op,
                       ncclComm_t comm, cudaStream_t stream);
ncclResult_t ReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream);
ncclResult_t Reduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                    ncclComm_t comm, cudaStream_t stream);
ncclResult_t Broadcast(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root,
                       ncclComm_t comm, cudaStream_t stream);
ncclResult_t Bcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream);

}  // namespace fusco::nccl::face

// At the head of a function that the real library may call back into: then it passes straight on.
#define FUSCO_PASS_INSIDE(name, ...)                                                                                  \
  if (::fusco::nccl::mode() != ::fusco::nccl::Mode::host && ::fusco::nccl::insideReal(__builtin_return_address(0))) { \
    return FUSCO_REAL(name __VA_OPT__(, ) __VA_ARGS__);                                                               \
  }
