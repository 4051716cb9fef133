// As a profiler stands in front of NCCL: it has the names itself, and calls their twins with a p in front.
#include "fusco/nccl_api.h"

ncclResult_t ncclGetVersion(int* version) { return pncclGetVersion(version); }

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank) {
  return pncclCommInitRank(comm, nranks, id, rank);
}
