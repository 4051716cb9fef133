// Sixteen-byte vectors of BF16, FP16 and FP32 numbers, to and from FP32. One rounding, to nearest even; every NaN that
// is written is the type's quiet NaN, as from the host executors.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace fusco::kernels {

struct Bf16 {
  static constexpr int kPerVector = 8;
  using Element = unsigned short;
  __device__ static float load(Element x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
  // The first and the second number of a word: one instruction each.
  __device__ static float low(unsigned word) { return __uint_as_float(word << 16); }
  __device__ static float high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }
  // Both rounded; neither is a NaN.
  __device__ static unsigned roundPair(float first, float second) {
#if __CUDA_ARCH__ >= 900
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#else
    return round(first) | static_cast<unsigned>(round(second)) << 16;
#endif
  }
  __device__ static Element round(float x) {
#if __CUDA_ARCH__ >= 900
    Element bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return x != x ? Element{0x7fc0} : bits;
#else
    if (x != x) return 0x7fc0;
    const unsigned bits = __float_as_uint(x);
    return static_cast<Element>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  }
};

struct F16 {
  static constexpr int kPerVector = 8;
  using Element = unsigned short;
  __device__ static float load(Element x) { return __half2float(__ushort_as_half(x)); }
  __device__ static float low(unsigned word) { return load(static_cast<Element>(word & 0xffffu)); }
  __device__ static float high(unsigned word) { return load(static_cast<Element>(word >> 16)); }
  __device__ static unsigned roundPair(float first, float second) {
    return round(first) | static_cast<unsigned>(round(second)) << 16;
  }
  __device__ static Element round(float x) {
    if (x != x) return 0x7e00;
    return __half_as_ushort(__float2half_rn(x));
  }
};

struct F32 {
  static constexpr int kPerVector = 4;
  using Element = unsigned;
  __device__ static float load(Element x) { return __uint_as_float(x); }
  __device__ static Element round(float x) { return x != x ? 0x7fc00000u : __float_as_uint(x); }
};

// The same numbers at addresses that need not be multiples of their size.
template <typename Number>
struct Anywhere : Number {
  static constexpr bool kAnywhere = true;
};
template <typename Number>
constexpr bool kIsAnywhere = requires { Number::kAnywhere; };

// kBytes of a row: 16 where the row allows it, else one element.
template <typename Number, int kBytes>
struct Pack {
  using Element = typename Number::Element;
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(Element));
  union {
    uint4 whole;
    Element elements[16 / sizeof(Element)];
  };
  __device__ float at(int i) const {
    if constexpr (kBytes == 16 && sizeof(Element) == 2) {
      const unsigned word = i / 2 == 0 ? whole.x : i / 2 == 1 ? whole.y : i / 2 == 2 ? whole.z : whole.w;
      return i % 2 == 0 ? Number::low(word) : Number::high(word);
    } else {
      return Number::load(elements[i]);
    }
  }
  __device__ void round(const float (&numbers)[kCount]) {
    if constexpr (kBytes == 16 && sizeof(Element) == 2) {
      bool isNan = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) isNan |= numbers[i] != numbers[i];
      if (!isNan) {
        whole = {Number::roundPair(numbers[0], numbers[1]), Number::roundPair(numbers[2], numbers[3]),
                 Number::roundPair(numbers[4], numbers[5]), Number::roundPair(numbers[6], numbers[7])};
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = Number::round(numbers[i]);
  }
  __device__ void read(const std::byte* from) {
    if constexpr (kBytes == 16) {
      whole = __ldcs(reinterpret_cast<const uint4*>(from));
    } else if constexpr (kIsAnywhere<Number>) {
      elements[0] = 0;
      for (unsigned i = 0; i < sizeof(Element); ++i)
        elements[0] |= static_cast<Element>(static_cast<unsigned>(from[i]) << (8 * i));
    } else {
      elements[0] = __ldcs(reinterpret_cast<const Element*>(from));
    }
  }
  __device__ void write(std::byte* to) const {
    if constexpr (kBytes == 16) {
      __stcs(reinterpret_cast<uint4*>(to), whole);
    } else if constexpr (kIsAnywhere<Number>) {
      for (unsigned i = 0; i < sizeof(Element); ++i) to[i] = static_cast<std::byte>(elements[0] >> (8 * i));
    } else {
      __stcs(reinterpret_cast<Element*>(to), elements[0]);
    }
  }
};

}  // namespace fusco::kernels
