// The wire alone by RDMA in a build without libibverbs's headers.
#include <stdexcept>

#include "shuffle/wire.h"

namespace fusco::bench {

std::unique_ptr<Implementation> makeVerbsWire(const CaseContext&) {
  throw std::runtime_error("the wire alone, by RDMA: this build has no libibverbs headers (package libibverbs-dev)");
}

}  // namespace fusco::bench
