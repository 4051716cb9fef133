#include "shuffle/data.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "shuffle/routing.h"

namespace fusco::bench {
namespace {

double halfToDouble(std::uint16_t bits) {
  int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                     : exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace

Pattern patternOf(Type type) {
  switch (type) {
    case Type::bf16:
      return {0x80ff80ff80ff80ffu, 0x3f003f003f003f00u};
    case Type::f16:
      return {0x87ff87ff87ff87ffu, 0x3800380038003800u};
    case Type::f32:
      return {0x80ffffff80ffffffu, 0x3f0000003f000000u};
    case Type::u8:
    case Type::fp8:
      break;
  }
  return {~std::uint64_t{0}, 0};
}

std::uint64_t tokenKey(std::uint64_t seed, int rank, std::int64_t token) {
  return mix(mix(seed ^ 0x70ce) + (static_cast<std::uint64_t>(rank) << 40) + static_cast<std::uint64_t>(token));
}

std::uint64_t slotKey(std::uint64_t seed, int rank, std::int64_t token, int slot) {
  return mix(tokenKey(seed ^ 0x5107, rank, token) + static_cast<std::uint64_t>(slot));
}

std::uint64_t bufferKey(std::uint64_t seed, int rank) { return tokenKey(seed ^ 0xb0ff, rank, 0); }

void fillRow(std::byte* out, std::uint64_t key, std::size_t offset, std::size_t bytes, Type type) {
  const Pattern pattern = patternOf(type);
  auto word = [&](std::size_t index) { return patternWord(pattern, key, index); };
  std::size_t done = 0;
  while (done < bytes) {
    std::size_t at = offset + done, inside = at % 8;
    if (inside == 0 && bytes - done >= 8) {
      std::size_t words = (bytes - done) / 8, first = at / 8;
      for (std::size_t i = 0; i < words; ++i) {
        std::uint64_t value = word(first + i);
        std::memcpy(out + done + 8 * i, &value, 8);
      }
      done += 8 * words;
      continue;
    }
    std::uint64_t value = word(at / 8);
    std::size_t part = std::min<std::size_t>(8 - inside, bytes - done);
    std::memcpy(out + done, reinterpret_cast<const std::byte*>(&value) + inside, part);
    done += part;
  }
}

void poison(std::byte* out, std::size_t bytes) {
  if (bytes > 0) std::memset(out, 0xa5, bytes);
}

std::uint64_t differing(const std::byte* a, const std::byte* b, std::size_t bytes, std::size_t elementBytes) {
  if (std::memcmp(a, b, bytes) == 0) return 0;
  std::uint64_t count = 0;
  for (std::size_t i = 0; i < bytes; i += elementBytes)
    count += std::memcmp(a + i, b + i, std::min(elementBytes, bytes - i)) != 0;
  return count;
}

double toDouble(const std::byte* element, Type type) {
  if (type == Type::f32) {
    float value;
    std::memcpy(&value, element, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, element, 2);
  if (type == Type::f16) return halfToDouble(bits);
  std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

double roundingUnit(Type type) {
  switch (type) {
    case Type::bf16:
      return 0x1p-8;
    case Type::f16:
      return 0x1p-11;
    default:
      return 0x1p-24;
  }
}

}  // namespace fusco::bench
