// What the key of a unique id is used for: proofs and names that only its holders can make.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace fusco::comm {

using Digest = std::array<std::uint8_t, 32>;

// HMAC-SHA-256 of the parts, each preceded by its length.
Digest keyedDigest(const std::uint8_t key[32], std::initializer_list<std::string_view> parts);

// A name for an abstract socket: nobody without the key can tell to what it belongs.
std::string keyedName(const char* prefix, const std::uint8_t key[32], std::uint64_t number);

template <typename T>
std::string_view bytesOf(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

}  // namespace fusco::comm
