#include "plugin/nccl/meeting.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/clock.h"
#include "base/status.h"
#include "plugin/nccl/meeting_wire.h"

namespace fusco::nccl {

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

Tag Tag::derived(std::uint64_t salt) const {
  Tag other = *this;
  // Mixed so that neighbours differ everywhere; the key, not the name, keeps strangers out.
  for (std::uint64_t& word : other.name) {
    std::uint64_t x = word + (salt += 0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    word = x ^ (x >> 31);
  }
  other.port = 0;
  return other;
}

bool writeTag(ncclUniqueId& id, const Tag& tag) {
  const char* const tail = id.internal + Tag::kOffset;
  if (std::any_of(tail, tail + sizeof tag, [](char c) { return c != 0; })) return false;
  std::memcpy(id.internal + Tag::kOffset, &tag, sizeof tag);
  return true;
}

Tag readTag(const ncclUniqueId& id) {
  Tag tag;
  std::memcpy(&tag, id.internal + Tag::kOffset, sizeof tag);
  return tag;
}

namespace wire {

socklen_t nameSocket(const Tag& tag, sockaddr_un& address) {
  address = {};
  address.sun_family = AF_UNIX;
  static constexpr char kHex[] = "0123456789abcdef";
  std::string name = "fusco-nccl-";
  for (const std::uint64_t word : tag.name) {
    for (int shift = 60; shift >= 0; shift -= 4) name += kHex[word >> shift & 15];
  }
  // Abstract: a zero in front, no file.
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

}  // namespace wire

namespace {
constexpr int kTickMs = 20;
}

Meeting::Meeting(const Tag& tag, int rank, int ranks, std::int64_t patienceMs, bool retry,
                 const std::atomic<bool>* cancelled)
    : ranks_(ranks), patienceMs_(patienceMs), cancelled_(cancelled) {
  sockaddr_un address;
  const socklen_t bytes = wire::nameSocket(tag, address);
  const Deadline deadline = Deadline::afterMs(patienceMs);
  for (;;) {
    socket_ = Socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (socket_.get() < 0) fail(Code::systemError, std::string("no socket: ") + std::strerror(errno));
    if (::connect(socket_.get(), reinterpret_cast<sockaddr*>(&address), bytes) == 0) break;
    const bool mayCome = errno == EINTR || errno == EAGAIN || (retry && errno == ECONNREFUSED);
    if (!mayCome || deadline.passed()) {
      fail(Code::remoteError,
           "rank " + std::to_string(rank) + " of " + std::to_string(ranks) +
               " found nobody where the ranks meet: the process that opens the place (that which made "
               "the id, or rank 0) has ended, has no libfusco, or runs on another machine or in "
               "another network namespace");
    }
    if (cancelled_ != nullptr && *cancelled_) fail(Code::remoteError, "given up by an abort");
    ::poll(nullptr, 0, 2);
  }
  wire::Hello hello{};
  hello.magic = wire::Hello::kMagic;
  std::memcpy(hello.key, tag.key, sizeof hello.key);
  hello.rank = rank;
  hello.ranks = ranks;
  hello.patienceMs = patienceMs;
  send(&hello, sizeof hello);
}

void Meeting::send(const void* data, std::size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t sent = ::send(socket_.get(), at, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0)
      fail(Code::remoteError, std::string("the place where the ranks meet closed: ") + std::strerror(errno));
    at += sent;
    bytes -= static_cast<std::size_t>(sent);
  }
}

void Meeting::receive(void* data, std::size_t bytes) {
  char* at = static_cast<char*>(data);
  // The place answers in time; should it be stopped, we do not wait for ever.
  const Deadline deadline = Deadline::afterMs(patienceMs_ + 5000);
  while (bytes > 0) {
    pollfd polled{socket_.get(), POLLIN, 0};
    if (::poll(&polled, 1, kTickMs) <= 0) {
      if (cancelled_ != nullptr && *cancelled_) fail(Code::remoteError, "given up by an abort");
      if (deadline.passed()) fail(Code::remoteError, "no answer from the process that made the id: is it stopped?");
      continue;
    }
    const ssize_t got = ::recv(socket_.get(), at, bytes, 0);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got <= 0) fail(Code::remoteError, "the process that made the id ended while the ranks met");
    at += got;
    bytes -= static_cast<std::size_t>(got);
  }
}

std::vector<std::optional<std::string>> Meeting::exchange(const std::string& words) {
  wire::Head head{static_cast<std::uint32_t>(words.size()), 0};
  std::string message(reinterpret_cast<const char*>(&head), sizeof head);
  message += words;
  send(message.data(), message.size());
  receive(&head, sizeof head);
  std::string body(head.bytes, 0);
  receive(body.data(), body.size());
  if (head.code != 0) fail(Code::invalidUsage, body);
  std::vector<std::optional<std::string>> table(static_cast<std::size_t>(ranks_));
  const std::size_t each = 1 + words.size();
  if (body.size() != each * table.size()) fail(Code::internalError, "malformed answer where the ranks meet");
  for (std::size_t r = 0; r < table.size(); ++r) {
    if (body[r * each] == wire::kThere) table[r] = body.substr(r * each + 1, words.size());
    if (body[r * each] == wire::kElsewhere && elsewhere_ < 0) elsewhere_ = static_cast<int>(r);
  }
  return table;
}

}  // namespace fusco::nccl
