#include "transport/transport.h"

#include "base/status.h"

namespace fusco::transport {

void PostedLink::postRows(std::size_t, std::span<const Segment>) {
  fail(Code::internalError, "rows were posted on a link that does not gather");
}

void PostedLink::openPlaces(std::uint64_t, std::span<const Segment>) {
  fail(Code::internalError, "memory was opened to a peer on a link that does not write into it");
}

void PostedLink::postPlaced(std::size_t, std::span<const Segment>, std::span<const Target>) {
  fail(Code::internalError, "rows were posted to places on a link that does not write into a peer's memory");
}

void PostedLink::postMirrored(std::size_t, std::size_t) {
  fail(Code::internalError, "a payload in GPU memory was posted on a link that has none");
}

bool PostedLink::receiveRows(std::span<const Segment>) {
  fail(Code::internalError, "rows were received on a link that does not scatter");
}

}  // namespace fusco::transport
