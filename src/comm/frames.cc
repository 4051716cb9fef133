#include "comm/frames.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

namespace fusco::comm {

void Frames::queue(std::uint32_t kind, std::string_view body) { queue(kind, {body}); }

void Frames::queue(std::uint32_t kind, std::initializer_list<std::string_view> parts) {
  Head head{kind, 0};
  for (std::string_view part : parts) head.bytes += static_cast<std::uint32_t>(part.size());
  if (sent_ == out_.size()) {
    out_.clear();
    sent_ = 0;
  }
  out_.append(reinterpret_cast<const char*>(&head), sizeof(head));
  for (std::string_view part : parts) out_.append(part);
}

Frames::State Frames::flush(int socket) {
  while (queued()) {
    const ssize_t sent = ::send(socket, out_.data() + sent_, out_.size() - sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == ENOBUFS)) return State::open;
    if (sent < 0) return State::closed;
    sent_ += static_cast<std::size_t>(sent);
  }
  return State::open;
}

Frames::State Frames::receive(int socket, const Handler& handler, int* error) {
  char buffer[16384];
  for (;;) {
    const ssize_t got = ::recv(socket, buffer, sizeof(buffer), MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return State::open;
    if (got <= 0) {
      if (error != nullptr) *error = got < 0 ? errno : 0;
      return State::closed;
    }
    in_.append(buffer, static_cast<std::size_t>(got));
    std::size_t at = 0;
    while (in_.size() - at >= sizeof(Head)) {
      Head head;
      std::memcpy(&head, in_.data() + at, sizeof(head));
      if (head.bytes > most_) return State::malformed;
      if (in_.size() - at < sizeof(head) + head.bytes) break;
      handler(head.kind, std::string_view(in_).substr(at + sizeof(head), head.bytes));
      at += sizeof(head) + head.bytes;
    }
    in_.erase(0, at);
  }
}

}  // namespace fusco::comm
