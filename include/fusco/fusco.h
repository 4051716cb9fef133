/*
 * FUSCO: moves tokens between ranks and changes their layout in the same pass.
 *
 * An independent implementation of the method of arXiv 2512.22036. Section numbers below are that paper's.
 *
 * Words: a rank is a member of a communicator; a node is a set of ranks that can reach each other's memory (by default
 * a host). A routing map gives for each of T tokens K expert ids. Dispatch brings each token's row to its experts;
 * combine brings the experts' rows back and adds them up. A plan is what a routing map becomes: which row goes where.
 *
 * Conventions
 *  - Every function returns a fuscoResult_t with NCCL's numeric values. fuscoGetLastError() tells who, where, what and
 *    what to do.
 *  - Calls on one communicator come from one thread at a time; fuscoCommAbort, fuscoCommGetAsyncError,
 *    fuscoCommGetStatistics and fuscoGetLastError may come from any thread at any time. Different communicators may be
 * used from different threads side by side.
 *  - All ranks of a communicator make the same collective calls in the same order. Ranks that disagree on the
 * parameters of a call get fuscoInvalidUsage, with both values in the text of those that see the difference. On one
 * node nothing has moved then and the communicator stays usable; on several nodes a dispatch or combine may be under
 * way, and it breaks. One case is found by the time-out only: on one node, a slotted plan (which meets nobody) where
 * others make one of another layout.
 *  - On host communicators `stream` is ignored and a call has completed when it returns, inside a group when the
 * outermost fuscoGroupEnd returns.
 *  - On communicators on GPUs tensors lie in memory that the GPU reaches (its own, managed, pinned), and calls are
 * ordered by `stream` (a cudaStream_t of the communicator's GPU): they return when their kernels are launched, and never
 * wait for the GPU but where it is said. Ranks that share a process and a GPU launch together, and so do those of several
 * GPUs where one process has all ranks of the node: their threads meet inside the call, and one thread that drives several
 * of them calls for all of them inside one group. Such calls can be captured in a CUDA graph, those on several GPUs with
 * the streams of all of them in one capture. Operations follow each other where they need to, whichever streams and
 * branches of a capture they are on; replays on one stream do, others of one communicator, and calls beside them, the
 * caller orders. A graph keeps the memory of its plans, which may be destroyed before; a communicator outlives its
 * graphs. cudaStreamPerThread is refused: ranks launch for each other.
 *  - With several GPUs on a node all tensors of a call, routing maps too, lie in memory that the other GPUs reach: that of
 * cudaMalloc is, and pinned memory; that of a stream-ordered pool is once cudaMemPoolSetAccess has said so. Ranks in
 * several processes give memory of cudaMalloc, or of virtual memory management with file descriptors.
 *  - Ranks in several processes, each with one GPU, meet on the host inside the call, to tell each other where their
 * tensors are, and then on their GPUs. Each process captures its own calls, in the same order in all of them, and
 * replays its graph as often as the others do; a tensor of a captured call stays where it is as long as any of these
 * graphs. All processes issue calls and replays of a communicator in the same order; those of one capture are on one
 * stream, or ordered by the capture. Processes that share a GPU, or have several, wait for their streams inside each call
 * instead, and cannot be captured. A GPU waits for another one at most operationTimeoutMs, and no longer when a rank has
 * died or aborted: what it has written is then undefined, and fuscoCommGetAsyncError and the next call say so.
 *  - Where ranks are on several nodes the host plans and sends: a call waits for the stream, returns when all of it has
 * been done, and cannot be captured.
 *  - Public structs begin with their size and a magic number and grow only at their end: start from the INIT macro.
 *  - Pointers to tensors are the caller's and stay so; they must stay valid until the call has completed. What is
 * written may overlap nothing else of its call, but where it is said.
 */
#ifndef FUSCO_FUSCO_H_
#define FUSCO_FUSCO_H_

#include <stddef.h>
#include <stdint.h>

#define FUSCO_MAJOR 0
#define FUSCO_MINOR 1
#define FUSCO_PATCH 0
#define FUSCO_VERSION (FUSCO_MAJOR * 10000 + FUSCO_MINOR * 100 + FUSCO_PATCH)

#if defined(__GNUC__)
#define FUSCO_API __attribute__((visibility("default")))
#else
#define FUSCO_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The same opaque pointer as in the CUDA runtime's header, which need not be there. */
typedef struct CUstream_st* cudaStream_t;

typedef struct fuscoComm* fuscoComm_t;
typedef struct fuscoPlan* fuscoPlan_t;

typedef enum {
  fuscoSuccess = 0,
  fuscoUnhandledCudaError = 1,
  fuscoSystemError = 2, /* the machine refused something: the text says what is needed and what there is */
  fuscoInternalError = 3,
  fuscoInvalidArgument = 4, /* an argument is wrong; nothing was moved, the communicator stays usable */
  fuscoInvalidUsage = 5,    /* the calls do not fit together, here or between ranks */
  fuscoRemoteError = 6,     /* a peer died, left, aborted or did not answer in time */
  fuscoInProgress = 7,      /* non-blocking communicators: not finished yet */
  fuscoNumResults = 8
} fuscoResult_t;

typedef enum {
  fuscoInt8 = 0,
  fuscoUint8 = 1,
  fuscoInt32 = 2,
  fuscoUint32 = 3,
  fuscoInt64 = 4,
  fuscoUint64 = 5,
  fuscoFloat16 = 6,
  fuscoFloat32 = 7,
  fuscoFloat64 = 8,
  fuscoBfloat16 = 9,
  fuscoFloat8e4m3 = 10,
  fuscoFloat8e5m2 = 11
} fuscoDataType_t;

/* ---- library ------------------------------------------------------------------------------------------------------
 */

/* FUSCO_VERSION of the library that runs. */
FUSCO_API fuscoResult_t fuscoGetVersion(int* version);

/* A constant text for a code; never NULL. */
FUSCO_API const char* fuscoGetErrorString(fuscoResult_t result);

/* The text of the last error of the calling thread (comm = NULL), or of the error that broke `comm`. "" if none. Valid
 * until this thread's next call of this function. */
FUSCO_API const char* fuscoGetLastError(fuscoComm_t comm);

/* For libraries that stand on this one, so that a process has one set of settings and one log. The text of a setting
 * of docs/environment.md by its FUSCO_ name: its variable, else the NCCL variable beside it, else its default; "" if
 * there is none. *value stays valid. InvalidArgument: no such setting. */
FUSCO_API fuscoResult_t fuscoGetSetting(const char* name, const char** value);

typedef enum { fuscoLogWarn = 2, fuscoLogInfo = 3, fuscoLogTrace = 4 } fuscoLogLevel_t;

/* One line of the log that FUSCO_DEBUG governs; at Info and Trace under the subsystem INIT. */
FUSCO_API fuscoResult_t fuscoLog(int level, const char* text);

/* ---- communicators ------------------------------------------------------------------------------------------------
 */

#define FUSCO_UNIQUE_ID_BYTES 128
typedef struct {
  char internal[FUSCO_UNIQUE_ID_BYTES]; /* an address and a random 256-bit key: treat it as a secret of the job */
} fuscoUniqueId;

/* Makes an id and opens its meeting place in this process, which must live until all ranks have met. If FUSCO_COMM_ID
 * (or NCCL_COMM_ID) is set to host:port on all ranks, each may make the id by itself, as often as the others, and
 * nothing has to be passed on: rank 0, on that host, opens the meeting place when it joins. Its key then comes from
 * FUSCO_COMM_KEY; without that whoever can reach the port and knows the job can join. */
FUSCO_API fuscoResult_t fuscoGetUniqueId(fuscoUniqueId* id);

typedef enum { fuscoDeviceAuto = 0, fuscoDeviceHost = 1, fuscoDeviceCuda = 2 } fuscoDevice_t;
typedef enum { fuscoBalanceNone = 0, fuscoBalancePaper = 1, fuscoBalanceFull = 2 } fuscoBalance_t;

/* What fuscoDeviceAuto stands for in this process: fuscoDeviceCuda where FUSCO was built with kernels and a GPU is
 * seen, else fuscoDeviceHost, and then *why (may be NULL) is a text that tells what is missing, valid until this
 * thread's next call of this function. */
FUSCO_API fuscoResult_t fuscoGetAutoDevice(fuscoDevice_t* device, const char** why);

#define FUSCO_CONFIG_MAGIC 0x46434647u
#define FUSCO_UNSET (-1)

/* How a communicator is made. A field left at its INIT value takes its setting from the environment
 * (docs/environment.md), else its default. */
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  int device;             /* fuscoDevice_t */
  int blocking;           /* 1 (default): init returns when all ranks are ready. 0: fuscoCommGetAsyncError tells */
  int nodeId;             /* which node this rank belongs to; FUSCO_UNSET: by the host that it runs on. GPUs: either is
                           * divided further where GPUs have no path to each other's memory (docs/concepts.md) */
  int lanesPerNode;       /* independent ways out of a node; default 1 */
  int initTimeoutMs;      /* all ranks must have come by then; default 300000 */
  int operationTimeoutMs; /* an operation that has not finished by then fails; default 300000; 0: no limit */
  int64_t sliceBytes;     /* size of a slice between nodes; default 262144, on GPUs 1048576 */
  int slices;             /* slices in flight for each peer on another node and operation slot; default 4 */
  int balance; /* fuscoBalance_t; default none. Else each plan's forwarders and lanes follow the loads of the plan before
                * it (docs/design.md, "How are lanes balanced?"); full also the speeds that lanes have shown */
  /* Memory of the library that grows with the work (plans, staging windows excluded: those must be shareable). NULL:
   * the C library's. `allocate` returns memory aligned to `alignment` or NULL. Called from calls on this communicator
   * and from its own thread, never by two at once. */
  void* (*allocate)(size_t bytes, size_t alignment, void* context);
  void (*release)(void* pointer, size_t bytes, void* context);
  void* allocatorContext;
  /* A library-owned window for each direction (dispatch's output, combine's input) holds rows of tensors that peers
   * cannot reach otherwise (docs/concepts.md, private memory). Its size is bounded by this; 0: no bound. */
  int64_t maxStagingBytes;
  int allowProcessVm; /* 1 (default): peers' private memory by process_vm_readv/writev where the kernel allows it */
  int maxSms; /* GPUs: multiprocessors that this rank's kernels may take; ranks that share a GPU and a process add theirs
               * up; default 0: all */
  int gpu;    /* GPUs: CUDA's number of this rank's; default: that of the calling thread */
} fuscoConfig_t;

#define FUSCO_CONFIG_INIT                                                                                             \
  {                                                                                                                   \
    sizeof(fuscoConfig_t), FUSCO_CONFIG_MAGIC, FUSCO_VERSION, fuscoDeviceAuto, FUSCO_UNSET, FUSCO_UNSET, FUSCO_UNSET, \
        FUSCO_UNSET, FUSCO_UNSET, FUSCO_UNSET, FUSCO_UNSET, FUSCO_UNSET, NULL, NULL, NULL, FUSCO_UNSET, FUSCO_UNSET,  \
        FUSCO_UNSET, FUSCO_UNSET                                                                                      \
  }

/* Joins `nranks` ranks that hold the same id. Collective. Ranks may be threads of a process, processes, or both. In a
 * group the ranks of one process are joined side by side by fuscoGroupEnd, and *comm is stored there. Errors:
 * InvalidArgument (rank, nranks, config), InvalidUsage (ranks disagree: both values), RemoteError (who is missing after
 * initTimeoutMs), SystemError (what is short). */
FUSCO_API fuscoResult_t fuscoCommInitRank(fuscoComm_t* comm, int nranks, fuscoUniqueId id, int rank);
FUSCO_API fuscoResult_t fuscoCommInitRankConfig(fuscoComm_t* comm, int nranks, fuscoUniqueId id, int rank,
                                                const fuscoConfig_t* config);

/* Joins all processes that a launcher started, one rank each, without an id: rank and size are read from RANK and
 * WORLD_SIZE, OMPI_COMM_WORLD_*, PMIX_*, PMI_* or SLURM_*; the address where rank 0 opens the meeting place is
 * FUSCO_COMM_ID, else MASTER_ADDR with the port after MASTER_PORT, else this host or Slurm's first with a port made of
 * the job's name. config may be NULL. Collective. Errors as fuscoCommInitRank; InvalidUsage also names what the
 * launcher does not say. */
FUSCO_API fuscoResult_t fuscoCommInitFromEnvironment(fuscoComm_t* comm, const fuscoConfig_t* config);

/* Ranks with the same colour >= 0 form a communicator, ordered by key, then by rank. A negative colour: *newcomm =
 * NULL. config may be NULL (the parent's). Collective. Always blocks, whatever `blocking` says: the new one is ready when it
 * returns. */
FUSCO_API fuscoResult_t fuscoCommSplit(fuscoComm_t comm, int color, int key, fuscoComm_t* newcomm,
                                       const fuscoConfig_t* config);

/* Waits until everything started on it has finished; on GPUs: is launched. Collective; bounded by operationTimeoutMs. */
FUSCO_API fuscoResult_t fuscoCommFinalize(fuscoComm_t comm);
/* Frees a communicator. Local, bounded (5 s; on GPUs 12 s, if its launches do not end; one whose init has not finished:
 * initTimeoutMs). Plans made on it must be destroyed before. An operation that was started and has not finished is given
 * up: the others get RemoteError, and nobody touches its tensors any more when this returns. Twice, or use after it:
 * InvalidArgument. */
FUSCO_API fuscoResult_t fuscoCommDestroy(fuscoComm_t comm);
/* Wakes every rank of the communicator with RemoteError and gives it up here. From any thread, also while another
 * thread is inside a call on it: that call returns an error, and the memory goes with it. When both have returned nobody
 * touches tensors of operations any more; for ranks that are in the middle of a step this waits, 2 s at most.
 * One whose init has not finished: returns when that has, at the latest after initTimeoutMs; if all ranks came, they
 * are woken then. */
FUSCO_API fuscoResult_t fuscoCommAbort(fuscoComm_t comm);

FUSCO_API fuscoResult_t fuscoCommCount(fuscoComm_t comm, int* count);
FUSCO_API fuscoResult_t fuscoCommUserRank(fuscoComm_t comm, int* rank);
/* The node of `rank`, numbered from 0 by first appearance. */
FUSCO_API fuscoResult_t fuscoCommNode(fuscoComm_t comm, int rank, int* node);
/* 1 where each rank captures its sends and receives in a CUDA graph of its own, which it replays as often as its peers
 * do theirs, all at the same time: its ranks are several processes with a GPU each, on one node. Else 0. The same on all
 * ranks. A captured group meets its peers on the host, also one that only sends, and sends memory of cudaMalloc. */
FUSCO_API fuscoResult_t fuscoCommCapturesTransfers(fuscoComm_t comm, int* captures);
/* fuscoSuccess, fuscoInProgress, or the error that broke the communicator: such an error stays. It also looks at the
 * peers, so that a watchdog that only polls it learns of one that died, exited without destroy or aborted; one that has
 * left in order is no error for who waits for nothing. And it tells of a send that has returned and was then refused. */
FUSCO_API fuscoResult_t fuscoCommGetAsyncError(fuscoComm_t comm, fuscoResult_t* error);

#define FUSCO_STATISTICS_MAGIC 0x46535441u
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  uint64_t operations; /* finished */
  uint64_t rowsPlaced; /* rows written to their final place by this rank */
  uint64_t bytesPlaced;
  uint64_t bytesRead; /* rows read by combine */
  uint64_t wireBytes; /* given to links between nodes by this rank, headers included */
  uint64_t wireSlices;
  uint64_t stagedBytes;    /* copied through the library's windows */
  uint64_t processVmBytes; /* moved by process_vm_readv/writev */
  /* nanoseconds of this rank's calls, by stage: planning (exchange included), extraction into slices, waiting for
   * links, placement, sums, waiting for peers */
  uint64_t planNs, extractNs, wireNs, placeNs, sumNs, waitNs;
  uint64_t workspaceBytes; /* memory held by the communicator and its plans at this moment */
} fuscoStatistics_t;
#define FUSCO_STATISTICS_INIT \
  { sizeof(fuscoStatistics_t), FUSCO_STATISTICS_MAGIC, FUSCO_VERSION, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
FUSCO_API fuscoResult_t fuscoCommGetStatistics(fuscoComm_t comm, fuscoStatistics_t* statistics);

/* ---- memory -------------------------------------------------------------------------------------------------------
 */

/* Zeroed memory that every rank of the machine can reach: rows go straight into it. Local; peers map it on first use.
 */
FUSCO_API fuscoResult_t fuscoMemAlloc(void** pointer, size_t bytes);
FUSCO_API fuscoResult_t fuscoMemFree(void* pointer);
/* Tells a communicator of memory that it will see often. On the host this checks the range and costs nothing later;
 * registered private memory stays private. Deregister before it is freed. */
FUSCO_API fuscoResult_t fuscoCommRegister(fuscoComm_t comm, void* pointer, size_t bytes, void** handle);
FUSCO_API fuscoResult_t fuscoCommDeregister(fuscoComm_t comm, void* handle);

/* ---- groups -------------------------------------------------------------------------------------------------------
 */

/* Calls between Start and the outermost End, on any number of communicators, are carried out together by End. An error
 * inside sticks and is returned there. Depth is per thread. */
FUSCO_API fuscoResult_t fuscoGroupStart(void);
FUSCO_API fuscoResult_t fuscoGroupEnd(void);

/* ---- point to point and all-to-all --------------------------------------------------------------------------------
 */

/* `count` elements to / from `peer`. The k-th send of an ordered pair matches its k-th receive, whichever of these
 * calls made them. Sizes that differ: InvalidUsage with both sizes where it is seen (between nodes at the receiver, whose
 * sender may have returned; in a node a sender that has returned is told by fuscoCommGetAsyncError and its next call), and
 * the communicator is broken for all. A send to oneself needs its receive in the same group. count 0 is legal and keeps
 * its place in the order.
 * On GPUs sender and receiver meet on the host in each call, and then go by the order of their streams. A group that only
 * sends need not meet anybody while its messages, of at most 4 MiB each, find room in a window of 32 MiB of the
 * communicator and fewer than 4 to a receiver are outstanding. In a CUDA graph: ranks of one process, sends and receives
 * of all of them in one group and one capture; or each rank in its own (fuscoCommCapturesTransfers). With a
 * rank of another node a call returns when its rows have left, or have come, and cannot be captured. */
FUSCO_API fuscoResult_t fuscoSend(const void* sendbuff, size_t count, fuscoDataType_t datatype, int peer,
                                  fuscoComm_t comm, cudaStream_t stream);
FUSCO_API fuscoResult_t fuscoRecv(void* recvbuff, size_t count, fuscoDataType_t datatype, int peer, fuscoComm_t comm,
                                  cudaStream_t stream);

/* Counts and displacements in elements, host arrays of nranks, copied during the call. The buffers must not overlap. */
FUSCO_API fuscoResult_t fuscoAllToAllv(const void* sendbuff, const size_t sendcounts[], const size_t sdispls[],
                                       void* recvbuff, const size_t recvcounts[], const size_t rdispls[],
                                       fuscoDataType_t datatype, fuscoComm_t comm, cudaStream_t stream);

/* The paper's dComm (section 3). Rows of `rowBytes` bytes at sendbuff + index * rowBytes, `rows` of them, indices of
 * type fuscoInt32 or fuscoInt64 (host memory on host communicators, copied during the call; memory that the GPU reaches on
 * others, read in the order of the stream and not checked), are sent in list order;
 * the receiver's k-th row goes to recvbuff + index[k] * rowBytes. Repeats are legal when sending, not when receiving
 * (InvalidArgument; lists in GPU memory are not looked through). A NULL index list: 0, 1, 2, ... Matches
 * fuscoSend/fuscoRecv as well, if the bytes are equal. */
FUSCO_API fuscoResult_t fuscoGatherSend(const void* sendbuff, size_t rows, size_t rowBytes, const void* rowIndices,
                                        fuscoDataType_t indexType, int peer, fuscoComm_t comm, cudaStream_t stream);
FUSCO_API fuscoResult_t fuscoScatterRecv(void* recvbuff, size_t rows, size_t rowBytes, const void* rowIndices,
                                         fuscoDataType_t indexType, int peer, fuscoComm_t comm, cudaStream_t stream);

/* ---- the shuffle: plans, dispatch, combine (sections 3 to 5) -------------------------------------------------------
 */

typedef enum {
  fuscoLayoutExpertOrder = 0, /* rows by local expert, then source rank, then token, then slot */
  fuscoLayoutRankOrder = 1,   /* one row per token and rank, by source rank, then token; local expert ids beside it */
  fuscoLayoutSlotted = 2 /* row = (local expert * nranks + source rank) * maxTokens + n; no count round (decoding) */
} fuscoLayout_t;

typedef enum {
  fuscoDedupNone = 0, /* a copy per routed slot crosses between nodes */
  fuscoDedupNode = 1, /* a copy per destination node; every final row is written from it */
  fuscoDedupFull = 2, /* as node, and rows that a rank needs more than once are written once and expanded there */
  fuscoDedupAuto = 3  /* node where the output can be written directly, else full; between GPUs of a node full where that
                       * saves enough (default) */
} fuscoDedup_t;

typedef enum { fuscoCapacityError = 0, fuscoCapacityDrop = 1 } fuscoCapacityPolicy_t;

#define FUSCO_PLAN_MAGIC 0x46504346u
/* A routing map and what is to be made of it. Experts are dealt out in contiguous blocks in rank order; the first
 * (experts % nranks) ranks hold one more. */
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  const void* expertIds;  /* [tokens, topk], row-major; -1: not routed; an id may repeat (delivered and summed twice) */
  fuscoDataType_t idType; /* fuscoInt32 or fuscoInt64 */
  const float* weights;   /* [tokens, topk] or NULL (all 1); copied */
  int64_t tokens;         /* T, may differ between ranks, may be 0 */
  int topk;               /* K, 1 to 32767, T x K below 2^31; the same on all ranks */
  int experts;            /* E >= 1, of all ranks together, the same on all ranks */
  int layout;             /* fuscoLayout_t, the same on all ranks */
  int alignment;          /* each local expert's rows start at a multiple of it (expert order); default 1 */
  int zeroFill;           /* 1: alignment gaps are zeroed by each dispatch */
  int64_t maxTokens;      /* slotted: the most tokens that any rank brings, the same on all ranks */
  int64_t capacityRows;   /* 0: exact. Else the rows that every rank's output can hold, the same on all ranks */
  int capacityPolicy;     /* fuscoCapacityPolicy_t: what happens to rows beyond capacityRows, or in the slotted layout
                           * beyond maxTokens for an expert (when tokens name it more than once) */
  int dedup;              /* fuscoDedup_t */
  int expertCounters; /* 1: keep per-expert counters of complete rows, see fuscoPlanExpertCounters (the slotted layout
                       * always does, rank order never) */
  int tickets;        /* 1: keep a ticket beside each received row, see fuscoPlanTickets (the slotted and the rank-order
                       * layout always do) */
  const int64_t* tokensOnDevice; /* GPUs: where in GPU memory the number of tokens stands when the plan is made, at most
                                  * `tokens`; NULL: it is `tokens` */
} fuscoPlanConfig_t;
#define FUSCO_PLAN_CONFIG_INIT                                                                   \
  {                                                                                              \
    sizeof(fuscoPlanConfig_t), FUSCO_PLAN_MAGIC, FUSCO_VERSION, NULL, fuscoInt64, NULL, 0, 1, 1, \
        fuscoLayoutExpertOrder, 1, 0, 0, 0, fuscoCapacityError, fuscoDedupAuto, 0, 0, NULL       \
  }

/* Makes a plan: counts the routing map, exchanges row bases, computes every final row (section 3.2). Collective. The
 * routing map may be reused when this returns. One plan serves any number of dispatches and combines, forward and
 * backward. Errors: InvalidArgument (an id out of range: token, slot and id; more rows than capacity: needs and has).
 *
 * On GPUs the routing map lies in GPU memory and is read in stream order. A plan with capacityRows and
 * fuscoCapacityDrop, or in the slotted layout, is made without any word to the host: the call returns at once and can be
 * captured; replaying the graph plans anew from what then stands in the routing map, weights and tokensOnDevice. An id
 * out of range then counts as -1 and is told by the next call that uses the plan. All other plans are exact: the call
 * waits for the stream, and cannot be captured. On several nodes all plans are so, and tokensOnDevice is InvalidUsage. */
FUSCO_API fuscoResult_t fuscoPlanCreate(fuscoPlan_t* plan, const fuscoPlanConfig_t* config, fuscoComm_t comm,
                                        cudaStream_t stream);
FUSCO_API fuscoResult_t fuscoPlanDestroy(fuscoPlan_t plan);

#define FUSCO_PLAN_INFO_MAGIC 0x46504946u
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  int64_t tokens;
  int64_t receiveRows; /* rows that a dispatch's output tensor must hold here, alignment gaps included */
  int64_t droppedRows; /* of this rank's tokens, beyond capacity */
  int localExperts;
  int firstExpert;
  int64_t copiesLocal;             /* rows that stay in the node */
  int64_t copiesRemote;            /* rows that this rank gives to links */
  const int32_t* localExpertRows;  /* [localExperts] rows received for each local expert; the plan's, until destroyed */
  const int32_t* localExpertStart; /* [localExperts + 1] first row of each */
} fuscoPlanInfo_t;
#define FUSCO_PLAN_INFO_INIT \
  { sizeof(fuscoPlanInfo_t), FUSCO_PLAN_INFO_MAGIC, FUSCO_VERSION, 0, 0, 0, 0, 0, 0, 0, NULL, NULL }
/* On GPUs, of a plan that keeps its counts there: tokens and receiveRows are capacities, droppedRows, copies and
 * localExpertRows 0; see fuscoPlanGetDeviceInfo. */
FUSCO_API fuscoResult_t fuscoPlanGetInfo(fuscoPlan_t plan, fuscoPlanInfo_t* info);

#define FUSCO_PLAN_DEVICE_INFO_MAGIC 0x46504449u
/* Where a plan's counts lie in GPU memory, for kernels behind it on the stream. The plan's, until destroyed. */
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  const int32_t* localExpertRows;  /* [localExperts] rows received for each local expert, at most what capacity leaves */
  const int32_t* localExpertStart; /* [localExperts + 1] first row of each; the last is receiveRows; rank order: zeros */
  const int64_t* droppedRows;      /* of this rank's tokens, beyond capacity */
  const int64_t* receiveRows;      /* rows that a dispatch brings here, alignment gaps included */
} fuscoPlanDeviceInfo_t;
#define FUSCO_PLAN_DEVICE_INFO_INIT \
  { sizeof(fuscoPlanDeviceInfo_t), FUSCO_PLAN_DEVICE_INFO_MAGIC, FUSCO_VERSION, NULL, NULL, NULL, NULL }
/* InvalidUsage on host communicators. */
FUSCO_API fuscoResult_t fuscoPlanGetDeviceInfo(fuscoPlan_t plan, fuscoPlanDeviceInfo_t* info);

/* Per local expert, the number of its rows that are complete in the running (or last) dispatch, for consumers that
 * start before the end: [localExperts], written with release order by whoever places rows. Needs expertCounters = 1.
 * Alignment gaps are not counted. A dispatch begins by setting them to zero, one after the other.
 *
 * On GPUs they lie in GPU memory, for kernels on other streams: one that reads a counter with acquire (at device scope, at
 * system scope where ranks are on several GPUs) finds so many rows written. Each dispatch sets them to zero in the order of
 * its stream; those of one plan come one after the other. Where rows are cast, and in the slotted layout without
 * expertCounters, they are set when all rows are there, as they are where ranks are on several nodes. CUDA loads a kernel
 * when it is launched first, and may wait for running ones to do so: dispatch once, or set CUDA_MODULE_LOADING=EAGER,
 * before a kernel waits for counters. */
FUSCO_API fuscoResult_t fuscoPlanExpertCounters(fuscoPlan_t plan, const volatile uint64_t** counters);

/* Where a received row came from. source = -1: no row (an alignment gap, an unused slot). */
typedef struct {
  int32_t source; /* rank */
  int32_t token;  /* index in the source's routing map */
  int32_t slot;   /* of the token's top-k */
  float weight;
  uint32_t primary; /* of the token's rows on this rank the one of its lowest slot, which need not be the lowest row; this
                     * row itself if it is that one */
} fuscoTicket_t;
/* [receiveRows], the plan's, filled by its first dispatch. Needs tickets = 1 (or the rank-order or slotted layout). On GPUs
 * in GPU memory, in the order of that dispatch's stream; with counts in GPU memory there are as many as capacity leaves. */
FUSCO_API fuscoResult_t fuscoPlanTickets(fuscoPlan_t plan, const fuscoTicket_t** tickets);

/* Rank-order layout: for each received row the token's K local expert ids (-1: not here) and weights, [receiveRows,
 * topk], the plan's, filled by its first dispatch; on GPUs in GPU memory. */
FUSCO_API fuscoResult_t fuscoPlanRankOrder(fuscoPlan_t plan, const int32_t** localExpertIds, const float** weights);

/* The plan as text (json = 0) or JSON, at most `bytes` with the closing 0 in `buffer`; *needed (may be NULL) is the
 * size that would hold all of it. */
FUSCO_API fuscoResult_t fuscoPlanPrint(fuscoPlan_t plan, int json, char* buffer, size_t bytes, size_t* needed);
/* Writes {routing map, topology, exchanged} so that the plan can be replayed without any peer, to look into it: by
 * plan::load and plan::replay of src/plan/file.h. No function of this header reads it. */
FUSCO_API fuscoResult_t fuscoPlanSave(fuscoPlan_t plan, const char* path);

typedef enum { fuscoCastNone = 0, fuscoCastBf16ToFp8e4m3 = 1 } fuscoCast_t;

#define FUSCO_DISPATCH_MAGIC 0x46444953u
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  const void* input; /* [tokens] rows */
  void* output;      /* [receiveRows] rows */
  size_t rowBytes;   /* of an input row; any number >= 1, the same on all ranks */
  /* A second tensor that travels in the same call (the scales of FP8 rows), or rowBytes2 = 0. */
  const void* input2;
  void* output2;
  size_t rowBytes2;
  /* fuscoCastBf16ToFp8e4m3: input rows are BF16, rowBytes / 2 elements (a multiple of 128); output rows are FP8 e4m3 of
   * as many bytes, and outputScales gets rowBytes / 256 FP32 scales a row. */
  int cast;
  float* outputScales;
} fuscoDispatchArgs_t;
#define FUSCO_DISPATCH_INIT                                                                                        \
  {                                                                                                                \
    sizeof(fuscoDispatchArgs_t), FUSCO_DISPATCH_MAGIC, FUSCO_VERSION, NULL, NULL, 0, NULL, NULL, 0, fuscoCastNone, \
        NULL                                                                                                       \
  }

#define FUSCO_COMBINE_MAGIC 0x46434d42u
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  const void* input; /* [receiveRows] rows of the experts, laid out as dispatch's output */
  void* output;    /* [tokens] rows: output[t] = bias[t] + sum over slots of weight * row; zeros for unrouted tokens */
  size_t elements; /* per row */
  fuscoDataType_t datatype; /* fuscoBfloat16, fuscoFloat16 or fuscoFloat32 */
  const void* bias;         /* [tokens] rows of the same type, or NULL; may be output itself */
  int weighted;     /* 1 (default): with the plan's weights. 0: plain sum (the backward of dispatch). In the rank-order
                     * layout sums are always plain: a row stands for all of the token's slots on its rank */
  int partialsFp32; /* 1: sums travel between nodes in FP32, at twice the bytes for 16-bit rows; between GPUs of a node
                     * 16-bit rows travel one by one then, and no sums */
} fuscoCombineArgs_t;
#define FUSCO_COMBINE_INIT \
  { sizeof(fuscoCombineArgs_t), FUSCO_COMBINE_MAGIC, FUSCO_VERSION, NULL, NULL, 0, fuscoBfloat16, NULL, 1, 0 }

#define FUSCO_COMBINE_BACKWARD_MAGIC 0x46434257u
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  const void* outputGradient; /* [tokens] rows: gradient of combine's output */
  const void* expertRows;     /* [receiveRows] rows: combine's input of the forward pass */
  void* inputGradient;        /* [receiveRows] rows: weight * outputGradient, for the experts */
  float* weightGradient;      /* [tokens, topk]: dot(outputGradient[t], expert row), 0 where not routed */
  size_t elements;
  fuscoDataType_t datatype;
} fuscoCombineBackwardArgs_t;
#define FUSCO_COMBINE_BACKWARD_INIT                                                                             \
  {                                                                                                             \
    sizeof(fuscoCombineBackwardArgs_t), FUSCO_COMBINE_BACKWARD_MAGIC, FUSCO_VERSION, NULL, NULL, NULL, NULL, 0, \
        fuscoBfloat16                                                                                           \
  }

/* Tokens to experts: every row is read once and written to all its places (section 3.3). Collective. */
FUSCO_API fuscoResult_t fuscoDispatch(fuscoPlan_t plan, const void* input, void* output, size_t rowBytes,
                                      cudaStream_t stream);
FUSCO_API fuscoResult_t fuscoDispatchEx(fuscoPlan_t plan, const fuscoDispatchArgs_t* args, cudaStream_t stream);
/* Back, weighted and summed in FP32, rounded once per level: 1 in a node, 2 across nodes and where sums cross between
 * GPUs of a node (fuscoDedup_t; partialsFp32 prevents it). Order of addition: node, rank, slot; two runs of one plan are
 * bit-identical. Collective. On several nodes the plan must have been dispatched before. */
FUSCO_API fuscoResult_t fuscoCombine(fuscoPlan_t plan, const void* input, void* output, size_t elements,
                                     fuscoDataType_t datatype, cudaStream_t stream);
FUSCO_API fuscoResult_t fuscoCombineEx(fuscoPlan_t plan, const fuscoCombineArgs_t* args, cudaStream_t stream);
/* The exact backward of a weighted combine. The backward of dispatch is fuscoCombineEx with weighted = 0. In the
 * rank-order layout, whose sums are plain, the backward of combine is a dispatch: InvalidUsage here. Collective. */
FUSCO_API fuscoResult_t fuscoCombineBackward(fuscoPlan_t plan, const fuscoCombineBackwardArgs_t* args,
                                             cudaStream_t stream);

/* The same in two halves: Start returns at once and the communicator's own thread carries the operation on; Finish
 * waits for the oldest started operation of the plan's communicator. At most 2 may be under way (two micro-batches). */
FUSCO_API fuscoResult_t fuscoDispatchStart(fuscoPlan_t plan, const fuscoDispatchArgs_t* args, cudaStream_t stream);
FUSCO_API fuscoResult_t fuscoCombineStart(fuscoPlan_t plan, const fuscoCombineArgs_t* args, cudaStream_t stream);
FUSCO_API fuscoResult_t fuscoFinish(fuscoPlan_t plan);

/* Memory that the library will hold on a rank beyond the caller's tensors for a communicator of `nranks` on `nodes`
 * equal nodes and one plan of the given shape (tokens, topk, experts, layout; expertIds is not read) with rows of
 * `rowBytes`; docs/concepts.md has the formulas. On a GPU and one node: in the GPU's memory and pinned. `privateRows`
 * is the number of rows in memory that peers cannot map (0: all tensors from fuscoMemAlloc or in one process). No
 * communicator is needed. InvalidArgument: a shape that no plan can have, or more bytes than can be counted. */
FUSCO_API fuscoResult_t fuscoWorkspaceSize(const fuscoConfig_t* config, const fuscoPlanConfig_t* plan, int nranks,
                                           int nodes, size_t rowBytes, int64_t privateRows, size_t* bytes);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FUSCO_FUSCO_H_ */
