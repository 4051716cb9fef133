#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "cases.h"
#include "exec/host_numbers.h"

namespace fusco::exec {
namespace {

// A format by its fields alone: `exponentBits`, `mantissaBits`; the value of a code in double.
struct Format {
  int exponentBits, mantissaBits, bias;
  bool infinities;  // e4m3 has none: its top exponent is used for numbers, the last code is NaN
  double value(std::uint32_t code) const {
    const std::uint32_t exponent = (code >> mantissaBits) & ((1u << exponentBits) - 1);
    const std::uint32_t mantissa = code & ((1u << mantissaBits) - 1);
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissaBits);
    return std::ldexp((1u << mantissaBits) + mantissa, static_cast<int>(exponent) - bias - mantissaBits);
  }
  std::uint32_t lastFinite() const {
    const std::uint32_t top = 1u << (exponentBits + mantissaBits);
    return infinities ? top - (1u << mantissaBits) - 1 : top - 2;
  }
  // The nearest code to |x| by search, ties to the even code; `lastFinite() + 1` for what rounds to infinity.
  std::uint32_t nearest(double x) const {
    std::uint32_t low = 0, high = lastFinite() + 1;  // value(low) <= x
    while (high - low > 1) (value((low + high) / 2) <= x ? low : high) = (low + high) / 2;
    const double below = x - value(low), above = value(low + 1) - x;
    return below < above || (below == above && low % 2 == 0) ? low : low + 1;
  }
};

const Format kBf16{8, 7, 127, true}, kF16{5, 10, 15, true}, kE4m3{4, 3, 7, false};

// Floats of every exponent, dense around the boundaries between codes.
void forFloats(const std::function<void(float)>& test) {
  std::mt19937 random(5);
  for (std::uint32_t high = 0; high < 0x7f80; ++high)
    for (std::uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      test(std::bit_cast<float>(high << 16 | low));
  for (int i = 0; i < 200000; ++i) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isfinite(x)) test(std::fabs(x));
  }
  for (std::uint32_t code = 0; code < kF16.lastFinite(); ++code) {
    const float middle = static_cast<float>((kF16.value(code) + kF16.value(code + 1)) / 2);
    for (float x : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 1e9f)}) test(x);
  }
}

TEST(Numbers, Bf16IsTheNearest) {
  forFloats([](float x) {
    ASSERT_EQ(floatToBf16(x), kBf16.nearest(x)) << x;
    ASSERT_EQ(floatToBf16(-x), kBf16.nearest(x) | 0x8000u) << x;
  });
}

TEST(Numbers, F16IsTheNearest) {
  forFloats([](float x) {
    ASSERT_EQ(floatToF16(x), kF16.nearest(x)) << x;
    ASSERT_EQ(floatToF16(-x), kF16.nearest(x) | 0x8000u) << x;
  });
}

TEST(Numbers, E4m3IsTheNearestAndSaturates) {
  forFloats([](float x) {
    const std::uint32_t code = x >= 448.0f ? 0x7eu : kE4m3.nearest(x);
    ASSERT_EQ(floatToE4m3(x), code) << x;
    ASSERT_EQ(floatToE4m3(-x), code | 0x80u) << x;
  });
  EXPECT_EQ(floatToE4m3(std::numeric_limits<float>::infinity()), 0x7e);
  EXPECT_EQ(floatToE4m3(std::numeric_limits<float>::quiet_NaN()), 0x7f);
}

TEST(Numbers, NarrowToFloatIsExact) {
  for (std::uint32_t code = 0; code <= kF16.lastFinite(); ++code) {
    ASSERT_EQ(f16ToFloat(static_cast<std::uint16_t>(code)), kF16.value(code));
    ASSERT_EQ(f16ToFloat(static_cast<std::uint16_t>(code | 0x8000)), -kF16.value(code));
  }
  for (std::uint32_t code = 0; code <= kBf16.lastFinite(); ++code)
    ASSERT_EQ(bf16ToFloat(static_cast<std::uint16_t>(code)), kBf16.value(code));
  EXPECT_TRUE(std::isinf(f16ToFloat(0x7c00)));
  EXPECT_TRUE(std::isnan(f16ToFloat(0x7c01)));
}

TEST(Numbers, EveryNanBecomesTheQuietOne) {
  for (std::uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    EXPECT_EQ(floatToBf16(std::bit_cast<float>(bits)), 0x7fc0);
    EXPECT_EQ(floatToF16(std::bit_cast<float>(bits)), 0x7e00);
    EXPECT_EQ(canonicalBits(std::bit_cast<float>(bits)), kQuietNan);
  }
}

}  // namespace
}  // namespace fusco::exec
