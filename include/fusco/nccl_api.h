/*
 * The part of NCCL's interface that libfusco answers itself, declared for machines without an nccl.h: names, numeric
 * values and layouts agree with NCCL's own header, which is to be preferred where there is one (fusco/nccl.h does so).
 */
#ifndef FUSCO_NCCL_API_H_
#define FUSCO_NCCL_API_H_

#include <fusco/fusco.h>
#include <limits.h>
#include <stddef.h>

/* The version whose calls are declared here. */
#define NCCL_MAJOR 2
#define NCCL_MINOR 28
#define NCCL_PATCH 9
#define NCCL_VERSION(major, minor, patch) ((major)*10000 + (minor)*100 + (patch))
#define NCCL_VERSION_CODE NCCL_VERSION(NCCL_MAJOR, NCCL_MINOR, NCCL_PATCH)

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ncclComm* ncclComm_t;
#define NCCL_COMM_NULL NULL

#define NCCL_UNIQUE_ID_BYTES 128
typedef struct {
  char internal[NCCL_UNIQUE_ID_BYTES];
} ncclUniqueId;

typedef enum {
  ncclSuccess = 0,
  ncclUnhandledCudaError = 1,
  ncclSystemError = 2,
  ncclInternalError = 3,
  ncclInvalidArgument = 4,
  ncclInvalidUsage = 5,
  ncclRemoteError = 6,
  ncclInProgress = 7,
  ncclNumResults = 8
} ncclResult_t;

typedef enum {
  ncclInt8 = 0,
  ncclChar = 0,
  ncclUint8 = 1,
  ncclInt32 = 2,
  ncclInt = 2,
  ncclUint32 = 3,
  ncclInt64 = 4,
  ncclUint64 = 5,
  ncclFloat16 = 6,
  ncclHalf = 6,
  ncclFloat32 = 7,
  ncclFloat = 7,
  ncclFloat64 = 8,
  ncclDouble = 8,
  ncclBfloat16 = 9,
  ncclFloat8e4m3 = 10,
  ncclFloat8e5m2 = 11,
  ncclNumTypes = 12
} ncclDataType_t;

typedef enum {
  ncclSum = 0,
  ncclProd = 1,
  ncclMax = 2,
  ncclMin = 3,
  ncclAvg = 4,
  ncclNumOps = 5,
  ncclMaxRedOp = 0x7fffffff
} ncclRedOp_t;

#define NCCL_CONFIG_UNDEF_INT INT_MIN
#define NCCL_CONFIG_UNDEF_PTR NULL
#define NCCL_SPLIT_NOCOLOR -1
#define NCCL_SHRINK_DEFAULT 0x00
#define NCCL_SHRINK_ABORT 0x01
#define NCCL_CTA_POLICY_DEFAULT 0x00
#define NCCL_CTA_POLICY_ZERO 0x02

/* Grows from version to version: at most `size` bytes may be read. */
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  int blocking;
  int cgaClusterSize;
  int minCTAs;
  int maxCTAs;
  const char* netName;
  int splitShare;
  int trafficClass;
  const char* commName;
  int collnetEnable;
  int CTAPolicy;
  int shrinkShare;
  int nvlsCTAs;
  int nChannelsPerNetPeer;
  int nvlinkCentricSched;
} ncclConfig_t;

#define NCCL_CONFIG_INITIALIZER                                                                        \
  {                                                                                                    \
    sizeof(ncclConfig_t), 0xcafebeef, NCCL_VERSION_CODE, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, \
        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_PTR, NCCL_CONFIG_UNDEF_INT,    \
        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_PTR, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT,    \
        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT     \
  }

typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  float estimatedTime;
} ncclSimInfo_t;

#define NCCL_SIM_INFO_INITIALIZER \
  { sizeof(ncclSimInfo_t), 0x74685283, NCCL_VERSION_CODE, -1.0f }

/* Every function has a twin with a p in front, for profilers that define the first themselves. */
#ifndef FUSCO_NCCL
#define FUSCO_NCCL(result, name, arguments) \
  FUSCO_API result nccl##name arguments;    \
  FUSCO_API result pnccl##name arguments
#endif

FUSCO_NCCL(ncclResult_t, GetVersion, (int* version));
FUSCO_NCCL(const char*, GetErrorString, (ncclResult_t result));
FUSCO_NCCL(const char*, GetLastError, (ncclComm_t comm));
FUSCO_NCCL(ncclResult_t, GetUniqueId, (ncclUniqueId * id));

FUSCO_NCCL(ncclResult_t, CommInitRank, (ncclComm_t * comm, int nranks, ncclUniqueId id, int rank));
FUSCO_NCCL(ncclResult_t, CommInitRankConfig,
           (ncclComm_t * comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t* config));
FUSCO_NCCL(ncclResult_t, CommInitRankScalable,
           (ncclComm_t * comm, int nranks, int rank, int nId, ncclUniqueId* ids, ncclConfig_t* config));
FUSCO_NCCL(ncclResult_t, CommInitAll, (ncclComm_t * comms, int ndev, const int* devlist));
FUSCO_NCCL(ncclResult_t, CommSplit, (ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config));
FUSCO_NCCL(ncclResult_t, CommShrink,
           (ncclComm_t comm, int* excluded, int excludedCount, ncclComm_t* newcomm, ncclConfig_t* config, int flags));
FUSCO_NCCL(ncclResult_t, CommGetUniqueId, (ncclComm_t comm, ncclUniqueId* id));
FUSCO_NCCL(ncclResult_t, CommGrow,
           (ncclComm_t comm, int nranks, const ncclUniqueId* id, int rank, ncclComm_t* newcomm, ncclConfig_t* config));
FUSCO_NCCL(ncclResult_t, CommFinalize, (ncclComm_t comm));
FUSCO_NCCL(ncclResult_t, CommDestroy, (ncclComm_t comm));
FUSCO_NCCL(ncclResult_t, CommAbort, (ncclComm_t comm));
FUSCO_NCCL(ncclResult_t, CommRevoke, (ncclComm_t comm, int flags));
FUSCO_NCCL(ncclResult_t, CommSuspend, (ncclComm_t comm, int flags));
FUSCO_NCCL(ncclResult_t, CommResume, (ncclComm_t comm));
FUSCO_NCCL(ncclResult_t, CommGetAsyncError, (ncclComm_t comm, ncclResult_t* error));
FUSCO_NCCL(ncclResult_t, CommCount, (const ncclComm_t comm, int* count));
FUSCO_NCCL(ncclResult_t, CommUserRank, (const ncclComm_t comm, int* rank));
FUSCO_NCCL(ncclResult_t, CommCuDevice, (const ncclComm_t comm, int* device));

FUSCO_NCCL(ncclResult_t, MemAlloc, (void** pointer, size_t bytes));
FUSCO_NCCL(ncclResult_t, MemFree, (void* pointer));
FUSCO_NCCL(ncclResult_t, CommRegister, (const ncclComm_t comm, void* buffer, size_t bytes, void** handle));
FUSCO_NCCL(ncclResult_t, CommDeregister, (const ncclComm_t comm, void* handle));

FUSCO_NCCL(ncclResult_t, GroupStart, (void));
FUSCO_NCCL(ncclResult_t, GroupEnd, (void));
FUSCO_NCCL(ncclResult_t, GroupSimulateEnd, (ncclSimInfo_t * info));

FUSCO_NCCL(ncclResult_t, Send,
           (const void* sendbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, Recv,
           (void* recvbuff, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, AlltoAll,
           (const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclComm_t comm,
            cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, Gather,
           (const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
            cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, Scatter,
           (const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
            cudaStream_t stream));

FUSCO_NCCL(ncclResult_t, AllGather,
           (const void* sendbuff, void* recvbuff, size_t sendcount, ncclDataType_t type, ncclComm_t comm,
            cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, AllReduce,
           (const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
            cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, ReduceScatter,
           (const void* sendbuff, void* recvbuff, size_t recvcount, ncclDataType_t type, ncclRedOp_t op,
            ncclComm_t comm, cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, Reduce,
           (const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
            ncclComm_t comm, cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, Broadcast,
           (const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
            cudaStream_t stream));
FUSCO_NCCL(ncclResult_t, Bcast,
           (void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream));

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FUSCO_NCCL_API_H_ */
