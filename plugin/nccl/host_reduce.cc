// Reductions of host mode: plain, in rank order, the same bits every time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "plugin/nccl/host.h"

namespace fusco::nccl {

namespace {

// Floating-point formats of 8 and 16 bits, by their fields; computed with in FP32.
// 8-bit formats saturate, as NVIDIA's conversions do.
template <typename Bits, int kExponentBits, int kMantissaBits, bool kHasInfinity>
struct SmallFloat {
  Bits bits;

  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr unsigned kMantissaMask = (1u << kMantissaBits) - 1;
  static constexpr unsigned kExponentMask = (1u << kExponentBits) - 1;
  static constexpr unsigned kSign = 1u << (kExponentBits + kMantissaBits);
  // The largest finite value, and the quiet NaN.
  static constexpr unsigned kLargest =
      kHasInfinity ? (kExponentMask << kMantissaBits) - 1 : (kExponentMask << kMantissaBits | kMantissaMask) - 1;
  static constexpr unsigned kNan = kHasInfinity ? (kExponentMask << kMantissaBits | 1u << (kMantissaBits - 1))
                                                : (kExponentMask << kMantissaBits | kMantissaMask);

  float value() const {
    const unsigned exponent = bits >> kMantissaBits & kExponentMask;
    const unsigned mantissa = bits & kMantissaMask;
    float magnitude;
    if (kHasInfinity && exponent == kExponentMask) {
      magnitude = mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    } else if (!kHasInfinity && (bits & (kSign - 1)) == kNan) {
      magnitude = std::numeric_limits<float>::quiet_NaN();
    } else if (exponent == 0) {
      magnitude = std::ldexp(static_cast<float>(mantissa), 1 - kBias - kMantissaBits);
    } else {
      magnitude = std::ldexp(static_cast<float>(mantissa | 1u << kMantissaBits),
                             static_cast<int>(exponent) - kBias - kMantissaBits);
    }
    return bits & kSign ? -magnitude : magnitude;
  }

  static SmallFloat of(float value) {
    const unsigned sign = std::signbit(value) ? kSign : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return {static_cast<Bits>(kNan)};
    unsigned result;
    if (std::isinf(magnitude)) {
      result = sizeof(Bits) > 1 ? kLargest + 1 : kLargest;
    } else {
      int exponent = 0;
      std::frexp(magnitude, &exponent);  // magnitude = m * 2^exponent, m in [0.5, 1)
      exponent = std::max(exponent - 1, 1 - kBias);
      // Rounded to nearest, ties to even, by the mode of the processor.
      const float scaled = std::nearbyint(std::ldexp(magnitude, kMantissaBits - exponent));
      const auto whole = static_cast<unsigned>(scaled);
      // A mantissa that rounds up carries into the exponent by itself.
      result = whole + (static_cast<unsigned>(exponent + kBias - 1) << kMantissaBits);
      if (magnitude == 0) result = 0;
      if (result > kLargest) result = sizeof(Bits) > 1 ? kLargest + 1 : kLargest;
    }
    return {static_cast<Bits>(result | sign)};
  }
};
using Half = SmallFloat<std::uint16_t, 5, 10, true>;
using Bfloat = SmallFloat<std::uint16_t, 8, 7, true>;
using E4m3 = SmallFloat<std::uint8_t, 4, 3, false>;
using E5m2 = SmallFloat<std::uint8_t, 5, 2, true>;

template <typename T>
auto load(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return value;
  } else {
    return value.value();
  }
}

template <typename A>
A combine(ncclRedOp_t operation, A a, A b) {
  switch (operation) {
    case ncclProd:
      if constexpr (std::is_integral_v<A>) {
        return static_cast<A>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
      } else {
        return a * b;
      }
    case ncclMax:
      if constexpr (std::is_floating_point_v<A>) return std::fmax(a, b);
      return a < b ? b : a;
    case ncclMin:
      if constexpr (std::is_floating_point_v<A>) return std::fmin(a, b);
      return b < a ? b : a;
    default:
      if constexpr (std::is_integral_v<A>) {
        return static_cast<A>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
      } else {
        return a + b;
      }
  }
}

// As in NCCL: integers wrap in their type while they are summed, and are then divided towards zero.
template <typename A>
A divide(A sum, std::size_t ranks) {
  if constexpr (std::is_integral_v<A>) {
    // Eight bits hold no larger number of ranks than 127 or 255.
    using Wide = std::conditional_t<std::is_signed_v<A>, std::int64_t, std::uint64_t>;
    return static_cast<A>(static_cast<Wide>(sum) / static_cast<Wide>(ranks));
  } else {
    return sum / static_cast<A>(ranks);
  }
}

template <typename T>
void reduceAs(ncclRedOp_t operation, const std::vector<const void*>& inputs, void* output, std::size_t count) {
  const std::size_t ranks = inputs.size();
  for (std::size_t i = 0; i < count; ++i) {
    const auto at = [&](std::size_t r) {
      T value;
      std::memcpy(&value, static_cast<const char*>(inputs[r]) + i * sizeof(T), sizeof(T));
      return load(value);
    };
    auto sum = at(0);
    using Sum = decltype(sum);
    for (std::size_t r = 1; r < ranks; ++r) sum = combine<Sum>(operation, sum, at(r));
    if (operation == ncclAvg) sum = divide<Sum>(sum, ranks);
    T result;
    if constexpr (std::is_arithmetic_v<T>) {
      result = sum;
    } else {
      result = T::of(sum);
    }
    std::memcpy(static_cast<char*>(output) + i * sizeof(T), &result, sizeof(T));
  }
}

}  // namespace

void reduceInOrder(ncclDataType_t type, ncclRedOp_t operation, const std::vector<const void*>& inputs, void* output,
                   std::size_t count) {
  switch (type) {
    case ncclInt8:
      return reduceAs<std::int8_t>(operation, inputs, output, count);
    case ncclUint8:
      return reduceAs<std::uint8_t>(operation, inputs, output, count);
    case ncclInt32:
      return reduceAs<std::int32_t>(operation, inputs, output, count);
    case ncclUint32:
      return reduceAs<std::uint32_t>(operation, inputs, output, count);
    case ncclInt64:
      return reduceAs<std::int64_t>(operation, inputs, output, count);
    case ncclUint64:
      return reduceAs<std::uint64_t>(operation, inputs, output, count);
    case ncclFloat16:
      return reduceAs<Half>(operation, inputs, output, count);
    case ncclFloat32:
      return reduceAs<float>(operation, inputs, output, count);
    case ncclFloat64:
      return reduceAs<double>(operation, inputs, output, count);
    case ncclBfloat16:
      return reduceAs<Bfloat>(operation, inputs, output, count);
    case ncclFloat8e4m3:
      return reduceAs<E4m3>(operation, inputs, output, count);
    case ncclFloat8e5m2:
      return reduceAs<E5m2>(operation, inputs, output, count);
    default:
      fail(Code::invalidArgument, "data type " + std::to_string(static_cast<int>(type)) + " does not exist");
  }
}

}  // namespace fusco::nccl
