#include "shuffle/wire.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "shuffle/routing.h"

namespace fusco::bench {
namespace {

constexpr std::size_t kMostAtOnce = std::size_t{1} << 19;

[[noreturn]] void failed(const char* what) {
  throw std::runtime_error(fmt::format("the wire alone: {}: {}", what, std::strerror(errno)));
}

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }

 private:
  int fd_;
};

sockaddr_in loopback(std::uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = port;
  return address;
}

// Rows that `source` sends to the node of `rank`, if that is the one there that takes them in.
std::size_t bytesBetween(const CaseContext& context, int source, int rank) {
  const Options& o = *context.options;
  const auto nodeOf = [&](int of) { return nodeOfRank(of, o.ranks, o.nodes); };
  const auto indexOf = [&](int of) {
    int index = 0;
    for (int r = 0; r < of; ++r) index += nodeOf(r) == nodeOf(of);
    return index;
  };
  int size = 0;
  for (int r = 0; r < o.ranks; ++r) size += nodeOf(r) == nodeOf(rank);
  if (indexOf(source) % size != indexOf(rank)) return 0;
  const Routing& routing = context.map.routing[source];
  std::size_t rows = 0;
  for (std::int64_t t = 0; t < routing.tokens; ++t) {
    const auto* ids = routing.ids.data() + t * context.map.topk;
    rows += std::any_of(ids, ids + context.map.topk, [&](std::int32_t id) {
      return id >= 0 && nodeOf(rankOfExpert(id, o.ranks, context.map.experts)) == nodeOf(rank);
    });
  }
  return rows * context.rowBytes;
}

class Wire : public Implementation {
 public:
  explicit Wire(const CaseContext& context) : context_(context) {
    std::size_t most = 0;
    for (const Crossing& one : crossingsOf(context)) peers_.push_back({Socket(-1), one.rank, one.out, one.in});
    for (const Peer& p : peers_) most = std::max({most, p.out, p.in});
    out_ = Buffer(std::max<std::size_t>(most, 1));
    in_ = Buffer(std::max<std::size_t>(most, 1));
    std::memset(out_.data(), 1, out_.size());
    std::memset(in_.data(), 2, in_.size());
    connectAll();
  }

  void run() override {
    std::vector<pollfd> waits(peers_.size());
    for (Peer& p : peers_) p.sent = p.got = 0;
    for (bool open = true; open;) {
      bool moved = false;
      open = false;
      for (std::size_t i = 0; i < peers_.size(); ++i) {
        Peer& p = peers_[i];
        moved |= sendSome(p) | receiveSome(p);
        waits[i] = {p.socket.fd(), static_cast<short>((p.sent < p.out ? POLLOUT : 0) | (p.got < p.in ? POLLIN : 0)), 0};
        open |= waits[i].events != 0;
      }
      if (open && !moved) poll(waits.data(), waits.size(), 100);
    }
  }

  std::span<std::byte> output() override { return in_.span(); }

 private:
  struct Peer {
    Socket socket;
    int rank;
    std::size_t out, in;
    std::size_t sent = 0, got = 0;
  };

  void connectAll() {
    Session& session = *context_.session;
    Socket listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address = loopback(0);
    socklen_t length = sizeof address;
    auto* plain = reinterpret_cast<sockaddr*>(&address);
    if (bind(listener.fd(), plain, length) != 0 || listen(listener.fd(), context_.options->ranks) != 0 ||
        getsockname(listener.fd(), plain, &length) != 0)
      failed("cannot listen on 127.0.0.1");
    session.group(context_.group).ranks[context_.rank].port = address.sin_port;
    session.meet(context_.group);
    std::size_t expected = 0;
    for (Peer& p : peers_) {
      if (p.rank > context_.rank) {
        ++expected;
        continue;
      }
      p.socket = Socket(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
      sockaddr_in there = loopback(session.group(context_.group).ranks[p.rank].port);
      const std::int32_t self = context_.rank;
      if (connect(p.socket.fd(), reinterpret_cast<sockaddr*>(&there), sizeof there) != 0 ||
          send(p.socket.fd(), &self, sizeof self, MSG_NOSIGNAL) != sizeof self)
        failed("cannot connect");
    }
    for (; expected > 0; --expected) {
      Socket caller(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
      std::int32_t rank = -1;
      if (caller.fd() < 0 || recv(caller.fd(), &rank, sizeof rank, MSG_WAITALL) != sizeof rank) failed("cannot accept");
      for (Peer& p : peers_)
        if (p.rank == rank) p.socket = std::move(caller);
    }
    const int on = 1;
    for (Peer& p : peers_) setsockopt(p.socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    session.meet(context_.group);
  }

  bool sendSome(Peer& p) {
    if (p.sent == p.out) return false;
    ssize_t n =
        send(p.socket.fd(), out_.data() + p.sent, std::min(kMostAtOnce, p.out - p.sent), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR) failed("cannot send");
    p.sent += n > 0 ? static_cast<std::size_t>(n) : 0;
    return n > 0;
  }

  bool receiveSome(Peer& p) {
    if (p.got == p.in) return false;
    ssize_t n = recv(p.socket.fd(), in_.data() + p.got, std::min(kMostAtOnce, p.in - p.got), MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) failed("cannot receive");
    p.got += n > 0 ? static_cast<std::size_t>(n) : 0;
    return n > 0;
  }

  const CaseContext& context_;
  std::vector<Peer> peers_;
  Buffer out_, in_;
};

}  // namespace

std::vector<Crossing> crossingsOf(const CaseContext& context) {
  const Options& o = *context.options;
  std::vector<Crossing> all;
  for (int peer = 0; peer < o.ranks; ++peer) {
    if (nodeOfRank(peer, o.ranks, o.nodes) == nodeOfRank(context.rank, o.ranks, o.nodes)) continue;
    Crossing one{peer, bytesBetween(context, context.rank, peer), bytesBetween(context, peer, context.rank)};
    if (context.which.op == Op::combine) std::swap(one.out, one.in);
    if (one.out + one.in > 0) all.push_back(one);
  }
  return all;
}

std::unique_ptr<Implementation> makeWire(const CaseContext& context) { return std::make_unique<Wire>(context); }

}  // namespace fusco::bench
