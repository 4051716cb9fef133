// RDMA in a build without libibverbs's headers: there is none, and that is said.
#include "base/status.h"
#include "transport/verbs/verbs.h"

namespace fusco::transport {

std::unique_ptr<VerbsNics> VerbsNics::open() { return open({}); }

std::unique_ptr<VerbsNics> VerbsNics::open(const std::string&) {
  fail(
      Code::systemError,
      "this build of the library has no queue pairs: build it where libibverbs's headers are (package libibverbs-dev)");
}

}  // namespace fusco::transport
