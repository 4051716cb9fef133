/*
 * NCCL's interface and what libfusco.so adds to it. Include this in place of nccl.h and link with libfusco.so, or build
 * against libnccl and preload libfusco.so for what NCCL has too. docs/nccl.md tells what is carried and when.
 */
#ifndef FUSCO_NCCL_H_
#define FUSCO_NCCL_H_

#if defined(__has_include) && !defined(FUSCO_NCCL_OWN_API)
#if __has_include(<nccl.h>) && __has_include(<cuda_runtime.h>)
#include <nccl.h>
#define FUSCO_NCCL_REAL_HEADER 1
#endif
#endif
#ifndef FUSCO_NCCL_REAL_HEADER
#include <fusco/nccl_api.h>
#endif
#include <stddef.h>

/* torch looks for this name when it is built, and calls ncclAllToAllv where it is defined. */
#ifndef NCCL_ALLTOALLV_SUPPORTED
#define NCCL_ALLTOALLV_SUPPORTED 1
#endif

#if defined(__GNUC__)
#define FUSCO_NCCL_API __attribute__((visibility("default")))
#else
#define FUSCO_NCCL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* All-to-all with counts and displacements in elements, host arrays of one entry for each rank, copied during the call.
 * sendbuff and recvbuff must not overlap. */
FUSCO_NCCL_API ncclResult_t ncclAllToAllv(const void* sendbuff, const size_t sendcounts[], const size_t sdispls[],
                                          void* recvbuff, const size_t recvcounts[], const size_t rdispls[],
                                          ncclDataType_t datatype, ncclComm_t comm, cudaStream_t stream);

/* As ncclAlltoAll of NCCL 2.28, by the name that it has elsewhere: `count` elements to and from each rank. */
FUSCO_NCCL_API ncclResult_t ncclAllToAll(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype,
                                         ncclComm_t comm, cudaStream_t stream);

/* Send and receive of rows that lie anywhere in a tensor. sendbuff and recvbuff are the tensor's first byte; `count`
 * elements in all, count x size of an element a multiple of bytesPerSegment; row k that travels is row
 * ((const int64_t*)segmentIndices)[k] of the tensor, bytesPerSegment bytes each. A row may be sent more than once but
 * received only once in a group. The k-th row sent is the k-th received; the other end may as well be a plain ncclSend
 * or ncclRecv of as many bytes. fuscoGatherSend and fuscoScatterRecv of fusco.h do the same on fuscoComm_t. */
FUSCO_NCCL_API ncclResult_t gatherSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int dest,
                                       ncclComm_t comm, cudaStream_t stream, const void* segmentIndices,
                                       int bytesPerSegment);
FUSCO_NCCL_API ncclResult_t scatterRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int src, ncclComm_t comm,
                                        cudaStream_t stream, const void* segmentIndices, int bytesPerSegment);

/* The communicator of fusco.h behind an NCCL communicator that libfusco carries, for fuscoPlanCreate, fuscoDispatch and
 * fuscoCombine on the same ranks. It ends with `comm`: do not destroy it. InvalidUsage where `comm` is not carried. */
struct fuscoComm;
FUSCO_NCCL_API ncclResult_t fuscoNcclComm(ncclComm_t comm, struct fuscoComm** carrier);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FUSCO_NCCL_H_ */
