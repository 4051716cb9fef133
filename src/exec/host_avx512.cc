// The host executor for CPUs with AVX-512 (F, BW, DQ, VL).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "exec/host.h"
#include "exec/host_numbers.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header initialises its "undefined" vectors with themselves and then warns about them.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace fusco::exec {
namespace {

struct Simd {
  static constexpr std::size_t kLanes = 16;
  static constexpr std::size_t kRowVectors = 8;
  static constexpr const char* kName = "avx512";
  using Bytes = __m512i;
  using Floats = __m512;

  static Bytes load(const std::byte* p) { return _mm512_loadu_si512(p); }
  static void stream(std::byte* p, Bytes v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v); }
  static Bytes zeroBytes() { return _mm512_setzero_si512(); }
  static void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

  static Floats zeroFloats() { return _mm512_setzero_ps(); }
  static Floats broadcast(float x) { return _mm512_set1_ps(x); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static void storeFloats(float* p, Floats v) { _mm512_storeu_ps(p, v); }

  template <RowType kType>
  static Floats loadFloats(const std::byte* p) {
    if constexpr (kType == RowType::f32) return _mm512_loadu_ps(p);
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kType == RowType::f16) return _mm512_cvtph_ps(narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }

  template <RowType kType>
  static void storePair(std::byte* p, Floats low, Floats high, bool streaming) {
    low = canonical(low);
    high = canonical(high);
    if constexpr (kType == RowType::f32) {
      store(p, _mm512_castps_si512(low), streaming);
      store(p + 64, _mm512_castps_si512(high), streaming);
    } else {
      store(p, _mm512_inserti64x4(_mm512_castsi256_si512(narrow<kType>(low)), narrow<kType>(high), 1), streaming);
    }
  }

  // The largest |x| of a group, leaving out infinities and NaN, as BF16 bits: those order like the numbers.
  static std::uint16_t largestFinite(const std::byte* row) {
    __m512i largest = _mm512_setzero_si512();
    for (std::size_t i = 0; i < kScaleGroup; i += 32) {
      const __m512i magnitude = _mm512_and_si512(load(row + 2 * i), _mm512_set1_epi16(0x7fff));
      const __mmask32 finite = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x7f80));
      largest = _mm512_mask_max_epu16(largest, finite, largest, magnitude);
    }
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i ones =
        _mm_set1_epi16(-1);  // there is a minimum over lanes, so the maximum is that of the complements
    return static_cast<std::uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, ones)), 0));
  }

  // 64 elements; the steps are those of floatToE4m3.
  static void castToE4m3(std::byte* codes, const std::byte* row, Floats divisor) {
    for (std::size_t i = 0; i < 4; ++i) {
      const Floats x = _mm512_div_ps(loadFloats<RowType::bf16>(row + 2 * i * kLanes), divisor);
      const __m512i bits = _mm512_castps_si512(x);
      const __m512i magnitude =
          _mm512_min_epu32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x43e00000));
      const __m512i small =
          _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(0x1p14f))),
                           _mm512_set1_epi32(0x46800000));
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
      const __m512i rounded =
          _mm512_add_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7ffff - (120 << 23))), odd);
      const __mmask16 isSmall = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x3c800000));
      const __m512i code = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 20), isSmall, small);
      const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
      const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      const __m512i all = _mm512_mask_mov_epi32(_mm512_or_si512(sign, code), nan, _mm512_set1_epi32(0x7f));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * kLanes), _mm512_cvtepi32_epi8(all));
    }
  }

 private:
  static Floats canonical(Floats x) {
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(x, nan, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(kQuietNan))));
  }

  template <RowType kType>
  static __m256i narrow(Floats x) {
    if constexpr (kType == RowType::f16) return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }

  static void store(std::byte* p, Bytes v, bool streaming) {
    if (streaming)
      stream(p, v);
    else
      _mm512_storeu_si512(p, v);
  }
};

}  // namespace
}  // namespace fusco::exec

#include "exec/host_vector_executor.h"

namespace fusco::exec {
Executor* avx512Executor() {
  static VectorExecutor executor;
  return &executor;
}
}  // namespace fusco::exec

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace fusco::exec {
Executor* avx512Executor() { return nullptr; }
}  // namespace fusco::exec

#endif
