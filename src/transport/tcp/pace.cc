#include "transport/tcp/pace.h"

// The kernel's header, whose tcp_info is newer than that of netinet/tcp.h; the two cannot be included together.
#include <linux/tcp.h>
#include <sys/socket.h>

#include <cstddef>

namespace fusco::transport {

TcpPace paceOf(int socket) {
  constexpr int kTcp = 6;  // IPPROTO_TCP
  tcp_info info{};
  socklen_t bytes = sizeof(info);
  if (::getsockopt(socket, kTcp, TCP_INFO, &info, &bytes) != 0) return {};
  if (bytes < offsetof(tcp_info, tcpi_rwnd_limited) + sizeof(info.tcpi_rwnd_limited)) return {};
  return {info.tcpi_bytes_acked, info.tcpi_busy_time, info.tcpi_rwnd_limited};
}

}  // namespace fusco::transport
