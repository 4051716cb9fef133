// The host executor for CPUs with AVX2, FMA and F16C.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "exec/host.h"
#include "exec/host_numbers.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fusco::exec {
namespace {

struct Simd {
  static constexpr std::size_t kLanes = 8;
  static constexpr std::size_t kRowVectors = 8;
  static constexpr const char* kName = "avx2";
  using Bytes = __m256i;
  using Floats = __m256;

  static Bytes load(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void stream(std::byte* p, Bytes v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v); }
  static Bytes zeroBytes() { return _mm256_setzero_si256(); }
  static void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

  static Floats zeroFloats() { return _mm256_setzero_ps(); }
  static Floats broadcast(float x) { return _mm256_set1_ps(x); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static void storeFloats(float* p, Floats v) { _mm256_storeu_ps(p, v); }

  template <RowType kType>
  static Floats loadFloats(const std::byte* p) {
    if constexpr (kType == RowType::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (kType == RowType::f16) return _mm256_cvtph_ps(narrow);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
  }

  template <RowType kType>
  static void storePair(std::byte* p, Floats low, Floats high, bool streaming) {
    low = canonical(low);
    high = canonical(high);
    if constexpr (kType == RowType::f32) {
      store(p, _mm256_castps_si256(low), streaming);
      store(p + 32, _mm256_castps_si256(high), streaming);
    } else if constexpr (kType == RowType::f16) {
      const __m128i a = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m128i b = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      store(p, _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1), streaming);
    } else {  // packing works within halves; the permutation puts the quarters in order
      const __m256i packed = _mm256_packus_epi32(roundToBf16(low), roundToBf16(high));
      store(p, _mm256_permute4x64_epi64(packed, 0xd8), streaming);
    }
  }

  // The largest |x| of a group, leaving out infinities and NaN, as BF16 bits: those order like the numbers.
  static std::uint16_t largestFinite(const std::byte* row) {
    __m256i largest = _mm256_setzero_si256();
    for (std::size_t i = 0; i < kScaleGroup; i += 16) {
      const __m256i magnitude = _mm256_and_si256(load(row + 2 * i), _mm256_set1_epi16(0x7fff));
      const __m256i finite = _mm256_cmpgt_epi16(_mm256_set1_epi16(0x7f80), magnitude);
      largest = _mm256_max_epu16(largest, _mm256_and_si256(magnitude, finite));
    }
    const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    const __m128i ones =
        _mm_set1_epi16(-1);  // there is a minimum over lanes, so the maximum is that of the complements
    return static_cast<std::uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(half, ones)), 0));
  }

  // 32 elements; the steps are those of floatToE4m3. Packing works within halves, so the quarters are put in order
  // last.
  static void castToE4m3(std::byte* codes, const std::byte* row, Floats divisor) {
    __m256i code[4];
    for (std::size_t i = 0; i < 4; ++i)
      code[i] = e4m3Codes(_mm256_div_ps(loadFloats<RowType::bf16>(row + 2 * i * kLanes), divisor));
    const __m256i packed =
        _mm256_packus_epi16(_mm256_packus_epi32(code[0], code[1]), _mm256_packus_epi32(code[2], code[3]));
    const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), ordered);
  }

 private:
  static __m256i e4m3Codes(Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i magnitude =
        _mm256_min_epu32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x43e00000));
    const __m256i small =
        _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p14f))),
                         _mm256_set1_epi32(0x46800000));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(0x7ffff - (120 << 23))), odd);
    const __m256i isSmall = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), magnitude);
    const __m256i code = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 20), small, isSmall);
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_or_si256(sign, code), _mm256_set1_epi32(0x7f), nan);
  }

  static Floats canonical(Floats x) {
    const Floats nan = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(kQuietNan)));
    return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }

  static __m256i roundToBf16(Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  }

  static void store(std::byte* p, Bytes v, bool streaming) {
    if (streaming)
      stream(p, v);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
};

}  // namespace
}  // namespace fusco::exec

#include "exec/host_vector_executor.h"

namespace fusco::exec {
Executor* avx2Executor() {
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
Executor* avx2Executor() { return nullptr; }
}  // namespace fusco::exec

#endif
