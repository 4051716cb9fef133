#include "transport/transport.h"

#include "base/status.h"

namespace fusco::transport {

void PostedLink::postRows(std::size_t, std::span<const Segment>) {
  fail(Code::internalError, "rows were posted on a link that does not gather");
}

bool PostedLink::receiveRows(std::span<const Segment>) {
  fail(Code::internalError, "rows were received on a link that does not scatter");
}

}  // namespace fusco::transport
