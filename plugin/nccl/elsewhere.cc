#include "plugin/nccl/elsewhere.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>

#include "plugin/nccl/report.h"

namespace fusco::nccl {

namespace {

constexpr int kConnectMs = 1000;
constexpr std::size_t kAddressAt = 8;  // in the id, behind NCCL's magic number

std::uint64_t hash(const std::string& text) {
  std::uint64_t value = 0xcbf29ce484222325;
  for (const unsigned char letter : text) value = (value ^ letter) * 0x100000001b3;
  return value;
}

}  // namespace

std::uint64_t machineIdentity() {
  static const std::uint64_t value = [] {
    std::string text;
    std::ifstream boot("/proc/sys/kernel/random/boot_id");
    std::getline(boot, text);
    struct stat space {};
    if (::stat("/proc/self/ns/net", &space) == 0) text += "," + std::to_string(space.st_ino);
    return hash(text + "," + setting("FUSCO_HOSTID"));
  }();
  return value;
}

Socket listenForElsewhere(std::uint16_t& port) {
  port = 0;
  for (const int family : {AF_INET6, AF_INET}) {
    Socket listener(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (listener.get() < 0) continue;
    sockaddr_in6 six{};
    sockaddr_in four{};
    six.sin6_family = AF_INET6;
    four.sin_family = AF_INET;
    const int no = 0;
    // One socket for both families.
    if (family == AF_INET6) ::setsockopt(listener.get(), IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
    auto* const address = family == AF_INET6 ? reinterpret_cast<sockaddr*>(&six) : reinterpret_cast<sockaddr*>(&four);
    socklen_t bytes = family == AF_INET6 ? sizeof six : sizeof four;
    if (::bind(listener.get(), address, bytes) != 0 || ::listen(listener.get(), 4096) != 0 ||
        ::getsockname(listener.get(), address, &bytes) != 0)
      continue;
    port = ntohs(family == AF_INET6 ? six.sin6_port : four.sin_port);
    return listener;
  }
  return {};
}

void sayElsewhere(const ncclUniqueId& id, const Tag& tag, int rank, int ranks) {
  sockaddr_storage address{};
  sa_family_t family = 0;
  std::memcpy(&family, id.internal + kAddressAt, sizeof family);
  socklen_t bytes = 0;
  if (family == AF_INET) {
    auto& four = reinterpret_cast<sockaddr_in&>(address);
    std::memcpy(&four, id.internal + kAddressAt, bytes = sizeof four);
    four.sin_port = htons(tag.port);
  } else if (family == AF_INET6) {
    auto& six = reinterpret_cast<sockaddr_in6&>(address);
    std::memcpy(&six, id.internal + kAddressAt, bytes = sizeof six);
    six.sin6_port = htons(tag.port);
  } else {
    return;
  }
  const Socket socket(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  ::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), bytes);
  pollfd polled{socket.get(), POLLOUT, 0};
  if (::poll(&polled, 1, kConnectMs) <= 0) return;
  Elsewhere words;
  std::memcpy(words.name, tag.name, sizeof words.name);
  words.rank = rank;
  words.ranks = ranks;
  if (::send(socket.get(), &words, sizeof words, MSG_NOSIGNAL) != sizeof words) return;
  // Until it was read: a socket that is closed before may lose what it has sent.
  char end = 0;
  polled.events = POLLIN;
  if (::poll(&polled, 1, kConnectMs) > 0 && ::recv(socket.get(), &end, 1, 0) < 0) return;
}

}  // namespace fusco::nccl
