#include "transport/tcp/stream.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>

namespace fusco::transport {

namespace {

constexpr std::size_t kMostPieces = 1024;  // IOV_MAX

TcpMoved moved(ssize_t result) {
  if (result >= 0) return {static_cast<std::size_t>(result), 0};
  return {0, errno};
}

}  // namespace

TcpSent sentBy(int socket) {
  tcp_info info{};
  socklen_t bytes = sizeof(info);
  if (::getsockopt(socket, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0) return {};
  // Kernels before 4.9 know less.
  if (bytes < offsetof(tcp_info, tcpi_rwnd_limited) + sizeof(info.tcpi_rwnd_limited)) return {};
  const std::uint64_t us = info.tcpi_busy_time - std::min<std::uint64_t>(info.tcpi_busy_time, info.tcpi_rwnd_limited);
  return {info.tcpi_bytes_acked, static_cast<std::int64_t>(us) * 1000};
}

void TcpOutgoing::begin(const TcpFrame& frame) {
  frame_ = frame;
  pieces_.clear();
  pieces_.push_back({&frame_, sizeof(frame_)});
  at_ = 0;
  partly_ = false;
}

void TcpOutgoing::add(const void* address, std::size_t bytes) {
  if (bytes == 0) return;
  iovec& last = pieces_.back();
  if (static_cast<const std::byte*>(last.iov_base) + last.iov_len == address && pieces_.size() > 1) {
    last.iov_len += bytes;
    return;
  }
  pieces_.push_back({const_cast<void*>(address), bytes});
}

void TcpOutgoing::advance(std::size_t bytes) {
  while (bytes > 0) {
    iovec& piece = pieces_[at_];
    const std::size_t step = std::min(bytes, piece.iov_len);
    piece.iov_base = static_cast<std::byte*>(piece.iov_base) + step;
    piece.iov_len -= step;
    bytes -= step;
    partly_ = true;
    if (piece.iov_len == 0) ++at_;
  }
}

bool TcpMoved::again() const { return error == EAGAIN || error == EWOULDBLOCK || error == ENOBUFS || error == ENOMEM; }

TcpMoved sendPieces(int socket, std::span<iovec> pieces) {
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = std::min(pieces.size(), kMostPieces);
  ssize_t result;
  do {
    result = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (result < 0 && errno == EINTR);
  return moved(result);
}

TcpMoved receiveBytes(int socket, void* to, std::size_t bytes) {
  ssize_t result;
  do {
    result = ::recv(socket, to, bytes, MSG_DONTWAIT);
  } while (result < 0 && errno == EINTR);
  return moved(result);
}

TcpMoved receivePieces(int socket, std::span<iovec> pieces) {
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = std::min(pieces.size(), kMostPieces);
  ssize_t result;
  do {
    result = ::recvmsg(socket, &message, MSG_DONTWAIT);
  } while (result < 0 && errno == EINTR);
  return moved(result);
}

}  // namespace fusco::transport
