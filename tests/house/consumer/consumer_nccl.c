#include <fusco/nccl.h>
#include <stdio.h>

/* One rank alone, in host mode. */
int main(void) {
  ncclUniqueId id;
  ncclComm_t comm;
  int in = 42, out = 0;
  if (ncclGetUniqueId(&id) != ncclSuccess || ncclCommInitRank(&comm, 1, id, 0) != ncclSuccess ||
      ncclAllToAll(&in, &out, 1, ncclInt32, comm, NULL) != ncclSuccess || ncclCommDestroy(comm) != ncclSuccess) {
    printf("%s\n", ncclGetLastError(NULL));
    return 1;
  }
  return out == 42 ? 0 : 1;
}
