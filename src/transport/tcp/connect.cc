#include "transport/tcp/connect.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/status.h"

namespace fusco::transport {

namespace {

UniqueFd newSocket(const Address& address) {
  return UniqueFd(
      ::socket(address.family == 4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP));
}

void setOption(int socket, int level, int option, int value) {
  // Where one is refused the connection works without.
  (void)::setsockopt(socket, level, option, &value, sizeof(value));
}

Address nameOf(int socket, int (*name)(int, sockaddr*, socklen_t*)) {
  sockaddr_storage storage;
  socklen_t length = sizeof(storage);
  if (name(socket, reinterpret_cast<sockaddr*>(&storage), &length) != 0) return {};
  return fromSocketAddress(reinterpret_cast<sockaddr*>(&storage));
}

}  // namespace

UniqueFd listenTcp(Address* address, int backlog, bool shared) {
  UniqueFd socket = newSocket(*address);
  if (!socket) failErrno("cannot open a TCP socket (raise `ulimit -n` if descriptors are short)");
  if (shared) setOption(socket.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  sockaddr_storage storage;
  socklen_t length = toSocketAddress(*address, &storage);
  if (::bind(socket.get(), reinterpret_cast<sockaddr*>(&storage), length) != 0) {
    if (errno == EADDRINUSE) return UniqueFd();
    failErrno("cannot bind to " + textOf(*address));
  }
  if (::listen(socket.get(), backlog) != 0) failErrno("cannot listen at " + textOf(*address));
  length = sizeof(storage);
  if (::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&storage), &length) != 0) {
    failErrno("cannot read the port of " + textOf(*address));
  }
  *address = fromSocketAddress(reinterpret_cast<sockaddr*>(&storage));
  return socket;
}

UniqueFd beginConnect(const Address& to, const Address& from) {
  UniqueFd socket = newSocket(to);
  if (!socket) return socket;
  sockaddr_storage storage;
  if (from) {
    const socklen_t length = toSocketAddress(from, &storage);
    if (::bind(socket.get(), reinterpret_cast<sockaddr*>(&storage), length) != 0) return UniqueFd();
  }
  const socklen_t length = toSocketAddress(to, &storage);
  while (::connect(socket.get(), reinterpret_cast<sockaddr*>(&storage), length) != 0) {
    if (errno == EINTR) continue;
    if (errno == EINPROGRESS) break;
    const int why = errno;
    socket.reset();
    errno = why;
    break;
  }
  return socket;
}

int connectResult(int socket) {
  int error = 0;
  socklen_t length = sizeof(error);
  if (::getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &length) != 0) return errno;
  if (error != 0) return error;
  const Address own = nameOf(socket, ::getsockname);
  if (!own || own != nameOf(socket, ::getpeername)) return 0;
  // The kernel has chosen the port that was called, on which nobody listened, and the two calls have met. It goes back
  // at once, without the minute that a connection's port is kept: somebody is to listen there.
  const linger none{1, 0};
  (void)::setsockopt(socket, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
  return ECONNREFUSED;
}

void keepConnection(int socket, int milliseconds) {
  setOption(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  setOption(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  const int seconds = std::max(1, milliseconds / 4000);
  setOption(socket, IPPROTO_TCP, TCP_KEEPIDLE, seconds);
  setOption(socket, IPPROTO_TCP, TCP_KEEPINTVL, seconds);
  setOption(socket, IPPROTO_TCP, TCP_KEEPCNT, 3);
}

void watchConnection(int socket, int milliseconds) {
  keepConnection(socket, milliseconds);
  setOption(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, milliseconds);
}

void unwatchConnection(int socket) {
  setOption(socket, SOL_SOCKET, SO_KEEPALIVE, 0);
  setOption(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, 0);
}

bool peerKernelIsSilent(int socket, int milliseconds) {
  tcp_info info{};
  socklen_t length = sizeof(info);
  if (::getsockopt(socket, IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return false;
  // A kernel with a closed window is asked less and less often: the last question may be of this moment, or lost.
  const bool asked = info.tcpi_unacked > 0 || info.tcpi_probes > 1;
  return asked && info.tcpi_last_ack_recv > static_cast<std::uint32_t>(milliseconds);
}

}  // namespace fusco::transport
