#include "transport/local/socket.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

#include "base/status.h"

namespace fusco::transport {

namespace {

socklen_t abstractAddress(const std::string& name, sockaddr_un* address) {
  std::memset(address, 0, sizeof(*address));
  address->sun_family = AF_UNIX;
  if (name.size() + 1 > sizeof(address->sun_path)) fail(Code::internalError, "socket name '" + name + "' is too long");
  std::memcpy(address->sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

UniqueFd newSocket() {
  UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) failErrno("cannot open a Unix socket (raise `ulimit -n` if descriptors are short)");
  return socket;
}

}  // namespace

UniqueFd listenAbstract(const std::string& name, int backlog) {
  UniqueFd socket = listenAbstractUnlessTaken(name, backlog);
  if (!socket) fail(Code::systemError, "the abstract Unix socket '" + name + "' exists already");
  return socket;
}

UniqueFd listenAbstractUnlessTaken(const std::string& name, int backlog) {
  UniqueFd socket = newSocket();
  sockaddr_un address;
  socklen_t length = abstractAddress(name, &address);
  if (::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) {
    if (errno == EADDRINUSE) return UniqueFd();
    failErrno("cannot bind the abstract Unix socket '" + name + "'");
  }
  if (::listen(socket.get(), backlog) != 0) failErrno("cannot listen on the abstract Unix socket '" + name + "'");
  return socket;
}

UniqueFd connectAbstract(const std::string& name, Deadline deadline) {
  sockaddr_un address;
  socklen_t length = abstractAddress(name, &address);
  UniqueFd socket = newSocket();
  while (::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) {
    if (errno == EINTR) continue;
    // EAGAIN: the queue of waiting connections is full for the moment.
    if (errno != EAGAIN) return UniqueFd();
    if (deadline.passed()) {
      errno = ETIMEDOUT;
      return UniqueFd();
    }
    ::poll(nullptr, 0, pollMs(deadline, 2));
  }
  return socket;
}

UniqueFd acceptOne(int listener, bool* exhausted) {
  *exhausted = false;
  for (;;) {
    int fd = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) return UniqueFd(fd);
    if (errno == EINTR || errno == ECONNABORTED) continue;
    *exhausted = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
    if (*exhausted) {
      // The kernel says so before it looks whether anybody waits.
      pollfd waiting{listener, POLLIN, 0};
      *exhausted = ::poll(&waiting, 1, 0) > 0;
    }
    return UniqueFd();
  }
}

Credentials credentialsOf(int socket) {
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    failErrno("cannot read the peer's credentials (SO_PEERCRED)");
  }
  return {credentials.pid, credentials.uid};
}

bool sameUser(int socket) { return credentialsOf(socket).uid == ::geteuid(); }

Io sendMessage(int socket, const void* data, std::size_t bytes, int descriptor) {
  iovec part{const_cast<void*>(data), bytes};
  alignas(cmsghdr) char room[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (descriptor >= 0) {
    message.msg_control = room;
    message.msg_controllen = sizeof(room);
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(head), &descriptor, sizeof(int));
  }
  for (;;) {
    if (::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return Io::done;
    if (errno == EINTR) continue;
    // ETOOMANYREFS: too many descriptors are on their way; they arrive when the peers read.
    if (errno == EAGAIN || errno == ENOBUFS || errno == ETOOMANYREFS) return Io::again;
    if (errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN) return Io::closed;
    failErrno("cannot send on a Unix socket");
  }
}

Io receiveMessage(int socket, void* data, std::size_t room, std::size_t* bytes, UniqueFd* passed) {
  iovec part{data, room};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 8)];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t got;
  do {
    // MSG_TRUNC: the true length, also of a message that does not fit.
    got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC | MSG_TRUNC);
  } while (got < 0 && errno == EINTR);
  if (got < 0) return errno == EAGAIN ? Io::again : Io::closed;
  UniqueFd first;
  for (cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr; head = CMSG_NXTHDR(&message, head)) {
    if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
    std::size_t count = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
      UniqueFd owned(fd);
      if (!first) first = std::move(owned);
    }
  }
  if (got == 0) return Io::closed;
  if (passed != nullptr) *passed = std::move(first);
  *bytes = static_cast<std::size_t>(got);
  return Io::done;
}

void randomBytes(void* data, std::size_t bytes) {
  char* at = static_cast<char*>(data);
  while (bytes > 0) {
    ssize_t got = ::getrandom(at, bytes, 0);
    if (got < 0) {
      if (errno == EINTR) continue;
      failErrno("cannot get random bytes (getrandom)");
    }
    at += got;
    bytes -= static_cast<std::size_t>(got);
  }
}

std::string randomName(const char* prefix) {
  unsigned char random[16];
  randomBytes(random, sizeof(random));
  static constexpr char kHex[] = "0123456789abcdef";
  std::string name = prefix;
  for (unsigned char byte : random) {
    name += kHex[byte >> 4];
    name += kHex[byte & 15];
  }
  return name;
}

bool sameSecret(const void* left, const void* right, std::size_t bytes) {
  const volatile unsigned char* a = static_cast<const volatile unsigned char*>(left);
  const volatile unsigned char* b = static_cast<const volatile unsigned char*>(right);
  unsigned char difference = 0;
  for (std::size_t i = 0; i < bytes; ++i) difference = static_cast<unsigned char>(difference | (a[i] ^ b[i]));
  return difference == 0;
}

}  // namespace fusco::transport
