// Numbers narrower than float, by explicit bit arithmetic: the definition that every instruction set has to meet bit by
// bit. Rounding is to nearest even; every NaN becomes the one quiet NaN of its type, so that results can be compared as
// bits.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "exec/executor.h"

namespace fusco::exec {

inline constexpr std::uint32_t kQuietNan = 0x7fc00000u;

// Cast to FP8 e4m3: elements that share a scale, the largest finite value, and the smallest |x| that a scale follows.
inline constexpr std::size_t kScaleGroup = 128;
inline constexpr float kFp8Max = 448.0f;
inline constexpr float kFp8Floor = 1e-4f;

// Back: partial sums of a dot product. Element i goes to partial i mod 32.
inline constexpr std::size_t kDotLanes = 32;

inline std::uint32_t canonicalBits(float x) { return x != x ? kQuietNan : std::bit_cast<std::uint32_t>(x); }

inline float bf16ToFloat(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

inline std::uint16_t floatToBf16(float x) {
  const std::uint32_t bits = canonicalBits(x);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16ToFloat(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1fu;
  const std::uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: an exact multiple of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
  }
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline std::uint16_t floatToF16(float x) {
  const std::uint32_t bits = canonicalBits(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7e00u;
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the multiple of 2^-24, rounded, in the low bits
    const std::uint32_t sum = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f);
    return static_cast<std::uint16_t>(sign | (sum - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

// Saturating: everything beyond 448, infinities included, becomes 448. NaN is 0x7f.
inline std::uint8_t floatToE4m3(float x) {
  if (x != x) return 0x7f;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 24) & 0x80u;
  if (magnitude > 0x43e00000u) magnitude = 0x43e00000u;  // 448
  if (magnitude < 0x3c800000u) {  // below 2^-6: multiples of 2^-9, the unit in the last place of 2^14
    const std::uint32_t sum = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f);
    return static_cast<std::uint8_t>(sign | (sum - 0x46800000u));
  }
  const std::uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - (120u << 23);
  return static_cast<std::uint8_t>(sign | (rounded >> 20));
}

// Element `i` of a row, which may lie at any address.
inline float loadElement(const void* row, std::size_t i, RowType type) {
  const std::byte* p = static_cast<const std::byte*>(row);
  if (type == RowType::f32) {
    float x;
    std::memcpy(&x, p + 4 * i, 4);
    return x;
  }
  std::uint16_t bits;
  std::memcpy(&bits, p + 2 * i, 2);
  return type == RowType::bf16 ? bf16ToFloat(bits) : f16ToFloat(bits);
}

inline void storeElement(std::byte* row, std::size_t i, RowType type, float x) {
  if (type == RowType::f32) {
    const std::uint32_t bits = canonicalBits(x);
    std::memcpy(row + 4 * i, &bits, 4);
  } else {
    const std::uint16_t bits = type == RowType::bf16 ? floatToBf16(x) : floatToF16(x);
    std::memcpy(row + 2 * i, &bits, 2);
  }
}

// The partial sums of a dot product, folded in halves: p[i] += p[i + 16], then 8, 4, 2, 1.
inline float foldDot(float* partials) {
  for (std::size_t half = kDotLanes / 2; half > 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) partials[i] += partials[i + half];
  return std::bit_cast<float>(canonicalBits(partials[0]));
}

}  // namespace fusco::exec
