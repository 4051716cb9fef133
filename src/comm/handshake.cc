#include "comm/handshake.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "transport/local/socket.h"

namespace fusco::comm {

Handshake::Handshake(Side side, const std::uint8_t key[32], Purpose purpose) : side_(side) {
  std::memcpy(key_, key, sizeof(key_));
  if (side == Side::caller) {
    restart(purpose);
  } else {
    expect(&greeting_, sizeof(greeting_), false);
  }
}

void Handshake::restart(Purpose purpose) {
  part_ = 0;
  greeting_.magic = kMagic;
  greeting_.purpose = purpose;
  transport::randomBytes(greeting_.random, sizeof(greeting_.random));
  expect(&greeting_, sizeof(greeting_), true);
}

short Handshake::waitsFor() const { return sending_ ? POLLOUT : POLLIN; }

void Handshake::expect(void* data, std::size_t bytes, bool sending) {
  data_ = static_cast<std::uint8_t*>(data);
  left_ = bytes;
  sending_ = sending;
}

Digest Handshake::proofOf(const char* who) const {
  return keyedDigest(key_, {who, bytesOf(greeting_), bytesOf(reply_.random)});
}

Handshake::Result Handshake::step(int socket) {
  for (;;) {
    while (left_ > 0) {
      const ssize_t moved = sending_ ? ::send(socket, data_, left_, MSG_NOSIGNAL | MSG_DONTWAIT)
                                     : ::recv(socket, data_, left_, MSG_DONTWAIT);
      if (moved < 0 && errno == EINTR) continue;
      if (moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Result::again;
      if (moved <= 0) return Result::failed;
      data_ += moved;
      left_ -= static_cast<std::size_t>(moved);
      // Rubbish is known by its first bytes.
      if (part_ == 0 && side_ == Side::host && sizeof(greeting_) - left_ >= sizeof(greeting_.magic) &&
          greeting_.magic != kMagic) {
        return Result::failed;
      }
    }
    Result result = Result::again;
    if (finishPart(&result)) return result;
  }
}

// What follows after the part that is complete. True: the handshake is over, with *result.
bool Handshake::finishPart(Result* result) {
  const int part = part_++;
  if (side_ == Side::host) {
    if (part == 0) {
      reply_.magic = kMagic;
      transport::randomBytes(reply_.random, sizeof(reply_.random));
      reply_.proof = proofOf("host");
      expect(&reply_, sizeof(reply_), true);
      return false;
    }
    if (part == 1) {
      expect(&proof_, sizeof(proof_), false);
      return false;
    }
    const Digest wanted = proofOf("caller");
    *result = transport::sameSecret(proof_.data(), wanted.data(), wanted.size()) ? Result::proved : Result::failed;
    return true;
  }
  switch (part) {
    case 0:
      expect(&reply_, sizeof(reply_), false);
      return false;
    case 1: {
      const Digest wanted = proofOf("host");
      if (reply_.magic != kMagic || !transport::sameSecret(reply_.proof.data(), wanted.data(), wanted.size())) {
        *result = Result::failed;
        return true;
      }
      proof_ = proofOf("caller");
      expect(&proof_, sizeof(proof_), true);
      return false;
    }
    case 2:
      expect(&verdict_, sizeof(verdict_), false);
      return false;
    default:
      *result = verdict_ == kTaken ? Result::taken : verdict_ == kRefused ? Result::refused : Result::failed;
      return true;
  }
}

// Four bytes always fit into the buffer of a connection on which this side has sent little; if not, the caller sees a
// connection that ends.
void Handshake::answer(int socket, bool take) {
  const std::uint32_t verdict = take ? kTaken : kRefused;
  (void)!::send(socket, &verdict, sizeof(verdict), MSG_NOSIGNAL | MSG_DONTWAIT);
}

}  // namespace fusco::comm
