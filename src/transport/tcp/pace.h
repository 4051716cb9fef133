// What the kernel knows of how fast a connection sends.
#pragma once

#include <cstdint>

namespace fusco::transport {

// All since the connection was made.
struct TcpPace {
  std::uint64_t acknowledged = 0;  // bytes
  std::uint64_t busyUs = 0;        // something was waiting to be sent or acknowledged
  std::uint64_t peerUs = 0;        // of that, the peer's buffer was full: it is busy, not the way to it
};

// Zeros where the kernel does not say.
TcpPace paceOf(int socket);

}  // namespace fusco::transport
