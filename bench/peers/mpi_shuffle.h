// The operations as a user of MPI would write them.
#pragma once

#include <memory>

#include "shuffle/implementation.h"

namespace fusco::bench {

// "mpi-alltoallv": pack, MPI_Alltoallv, unpack. "mpi-alltoallw": MPI_Alltoallw with hindexed-block types on both sides.
// "mpi-sendrecv": MPI_Sendrecv around the ring. A copy for each of a token's K experts travels.
std::unique_ptr<Implementation> makeMpi(const std::string& name, const CaseContext& context);

}  // namespace fusco::bench
