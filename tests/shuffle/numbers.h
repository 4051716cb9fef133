// Narrow floating-point types as arithmetic on doubles: nothing here shares a line or a trick with src/exec.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fusco/fusco.h"

namespace fusco::test {

// `precision` bits with the leading one, exponents of normal numbers from emin; exponent field of `exponentBits`.
struct Narrow {
  int precision;
  int emin;
  int exponentBits;
};
inline constexpr Narrow kBf16{8, -126, 8};
inline constexpr Narrow kF16{11, -14, 5};
inline constexpr Narrow kE4m3{4, -6, 4};

// The nearest value of the type, ties to even; overflow is not looked at.
inline double roundTo(const Narrow& type, double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent = std::ilogb(x);
  if (exponent < type.emin) exponent = type.emin;
  const double unit = std::ldexp(1.0, exponent - type.precision + 1);
  return std::nearbyint(x / unit) * unit;
}

// Bits of a value that the type has.
inline std::uint32_t encode(const Narrow& type, double x) {
  const int fraction = type.precision - 1;
  const std::uint32_t sign = std::signbit(x) ? 1u << (type.exponentBits + fraction) : 0;
  x = std::fabs(x);
  if (x < std::ldexp(1.0, type.emin)) return sign | static_cast<std::uint32_t>(std::ldexp(x, fraction - type.emin));
  const int exponent = std::ilogb(x);
  const auto mantissa = static_cast<std::uint32_t>(std::ldexp(x, fraction - exponent)) - (1u << fraction);
  return sign | static_cast<std::uint32_t>(exponent - type.emin + 1) << fraction | mantissa;
}

inline double decode(const Narrow& type, std::uint32_t bits) {
  const int fraction = type.precision - 1;
  const double sign = bits >> (type.exponentBits + fraction) & 1 ? -1 : 1;
  const int field = static_cast<int>(bits >> fraction & ((1u << type.exponentBits) - 1));
  const double mantissa = bits & ((1u << fraction) - 1);
  if (field == 0) return sign * std::ldexp(mantissa, type.emin - fraction);
  return sign * std::ldexp(mantissa + (1u << fraction), field - 1 + type.emin - fraction);
}

// Elements of rows that are summed: BF16, FP16 or FP32.
inline std::size_t elementSize(fuscoDataType_t type) { return type == fuscoFloat32 ? 4 : 2; }
inline float roundElement(fuscoDataType_t type, float x) {
  return type == fuscoFloat32 ? x : static_cast<float>(roundTo(type == fuscoBfloat16 ? kBf16 : kF16, x));
}
inline void putElement(fuscoDataType_t type, std::uint8_t* row, std::size_t i, float x) {
  if (type == fuscoFloat32) {
    std::memcpy(row + 4 * i, &x, 4);
  } else {
    const auto bits = static_cast<std::uint16_t>(encode(type == fuscoBfloat16 ? kBf16 : kF16, x));
    std::memcpy(row + 2 * i, &bits, 2);
  }
}
inline float getElement(fuscoDataType_t type, const std::uint8_t* row, std::size_t i) {
  if (type == fuscoFloat32) {
    float x;
    std::memcpy(&x, row + 4 * i, 4);
    return x;
  }
  std::uint16_t bits;
  std::memcpy(&bits, row + 2 * i, 2);
  return static_cast<float>(decode(type == fuscoBfloat16 ? kBf16 : kF16, bits));
}

}  // namespace fusco::test
