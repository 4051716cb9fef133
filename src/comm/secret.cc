#include "comm/secret.h"

#include <sodium/crypto_auth_hmacsha256.h>

namespace fusco::comm {

Digest keyedDigest(const std::uint8_t key[32], std::initializer_list<std::string_view> parts) {
  crypto_auth_hmacsha256_state state;
  crypto_auth_hmacsha256_init(&state, key, 32);
  for (std::string_view part : parts) {
    const std::uint64_t bytes = part.size();
    crypto_auth_hmacsha256_update(&state, reinterpret_cast<const unsigned char*>(&bytes), sizeof(bytes));
    crypto_auth_hmacsha256_update(&state, reinterpret_cast<const unsigned char*>(part.data()), part.size());
  }
  Digest digest;
  static_assert(sizeof(digest) == crypto_auth_hmacsha256_BYTES);
  crypto_auth_hmacsha256_final(&state, digest.data());
  return digest;
}

std::string keyedName(const char* prefix, const std::uint8_t key[32], std::uint64_t number) {
  const Digest digest = keyedDigest(key, {prefix, bytesOf(number)});
  static constexpr char kHex[] = "0123456789abcdef";
  std::string name = prefix;
  for (int i = 0; i < 16; ++i) {
    name += kHex[digest[static_cast<std::size_t>(i)] >> 4];
    name += kHex[digest[static_cast<std::size_t>(i)] & 15];
  }
  return name;
}

}  // namespace fusco::comm
