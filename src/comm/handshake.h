// How two ends of a new TCP connection prove to each other that they hold the key, and say what the connection is for.
//
//   caller: magic, purpose, 32 random bytes
//   host:   magic, 32 random bytes, HMAC(key, "host", caller's greeting, host's random bytes)
//   caller: HMAC(key, "caller", the same)
//   host:   taken, or refused
//
// Both random parts are in both proofs, so that nothing captured serves again; the host's proof comes first, so that a
// caller never gives one to a stranger. Nothing is read beyond these messages, nothing is allocated for them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "comm/secret.h"

namespace fusco::comm {

struct Purpose {
  enum Kind : std::uint32_t { records = 1, tree = 2, link = 3, verbsLink = 4 };
  std::uint32_t kind = 0;
  std::int32_t rank = -1;    // the caller's; unknown for records
  std::int32_t channel = 0;  // of links; for records, with the next: whose process the relay runs in
  std::int32_t stream = 0;   // of links

  static Purpose ofProcess(std::uint64_t identity) {
    return {records, -1, static_cast<std::int32_t>(identity), static_cast<std::int32_t>(identity >> 32)};
  }
  std::uint64_t process() const {
    return static_cast<std::uint32_t>(channel) | static_cast<std::uint64_t>(static_cast<std::uint32_t>(stream)) << 32;
  }
};

class Handshake {
 public:
  enum class Side { caller, host };
  enum class Result {
    again,    // not done; wait for waitsFor()
    proved,   // of the host: the caller holds the key; answer it
    taken,    // of the caller: done
    refused,  // of the caller: the host holds the key and does not want this connection
    failed,   // it is no holder of the key, or has hung up
  };

  Handshake(Side side, const std::uint8_t key[32], Purpose purpose = {});

  // It points into itself.
  Handshake(const Handshake&) = delete;
  Handshake& operator=(const Handshake&) = delete;

  // The caller's, on a new connection.
  void restart(Purpose purpose);
  // Goes on as far as the connected, non-blocking socket lets it.
  Result step(int socket);
  short waitsFor() const;  // POLLIN or POLLOUT
  // The caller's. For the host: once proved.
  const Purpose& purpose() const { return greeting_.purpose; }
  // The host's last word.
  static void answer(int socket, bool take);

 private:
  struct Greeting {
    std::uint64_t magic;
    Purpose purpose;
    std::uint8_t random[32];
  };
  struct Reply {
    std::uint64_t magic;
    std::uint8_t random[32];
    Digest proof;
  };
  static constexpr std::uint64_t kMagic = 0x314B485343535546;  // "FUSCSHK1"
  static constexpr std::uint32_t kTaken = 0x4B4F2121, kRefused = 0x4F4E2121;

  void expect(void* data, std::size_t bytes, bool sending);
  Digest proofOf(const char* who) const;
  bool finishPart(Result* result);

  const Side side_;
  std::uint8_t key_[32];
  Greeting greeting_{};
  Reply reply_{};
  Digest proof_{};
  std::uint32_t verdict_ = 0;
  int part_ = 0;
  bool sending_ = false;
  std::uint8_t* data_ = nullptr;
  std::size_t left_ = 0;
};

}  // namespace fusco::comm
