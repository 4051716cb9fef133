#include "shuffle/stream.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusco::bench {
namespace {

constexpr std::size_t kPiece = 4096;  // of a row, kept in the first cache between its places
constexpr std::size_t kBlock = 512;   // elements summed at a time

float bf16ToFloat(std::uint16_t bits) {
  std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// To nearest, ties to even. The sums here are finite.
std::uint16_t floatToBf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class Element>
[[gnu::always_inline]] inline float widen(Element e) {
  if constexpr (sizeof(Element) == 4) return e;
  else return bf16ToFloat(e);
}

template <class Element>
[[gnu::always_inline]] inline Element narrow(float f) {
  if constexpr (sizeof(Element) == 4) return f;
  else return floatToBf16(f);
}

// Adds up one block; inlined into functions that are compiled for different instruction sets.
template <class Element>
[[gnu::always_inline]] inline void sumBlock(const std::byte* const* rows, const float* weights, int count, std::size_t first,
                                            std::size_t elements, Element* out) {
  float sum[kBlock];
  for (std::size_t i = 0; i < elements; ++i) sum[i] = 0;
  for (int k = 0; k < count; ++k) {
    const Element* row = reinterpret_cast<const Element*>(rows[k]) + first;
    float weight = weights[k];
    for (std::size_t i = 0; i < elements; ++i) sum[i] += weight * widen<Element>(row[i]);
  }
  for (std::size_t i = 0; i < elements; ++i) out[i] = narrow<Element>(sum[i]);
}

using SumBlock = void (*)(const std::byte* const*, const float*, int, std::size_t, std::size_t, std::byte*);

template <class Element>
void sumBlockPlain(const std::byte* const* rows, const float* weights, int count, std::size_t first, std::size_t elements,
                   std::byte* out) {
  sumBlock<Element>(rows, weights, count, first, elements, reinterpret_cast<Element*>(out));
}

#if defined(__x86_64__)
template <class Element>
[[gnu::target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")]] void sumBlock512(
    const std::byte* const* rows, const float* weights, int count, std::size_t first, std::size_t elements, std::byte* out) {
  sumBlock<Element>(rows, weights, count, first, elements, reinterpret_cast<Element*>(out));
}

template <class Element>
[[gnu::target("avx2,fma")]] void sumBlock256(const std::byte* const* rows, const float* weights, int count, std::size_t first,
                                             std::size_t elements, std::byte* out) {
  sumBlock<Element>(rows, weights, count, first, elements, reinterpret_cast<Element*>(out));
}
#endif

// _Float16 converts in software where the CPU cannot, so that one loop serves; it is vectorised with f16c.
[[gnu::always_inline]] inline void sumHalves(const std::byte* const* rows, const float* weights, int count, std::size_t first,
                                             std::size_t elements, std::byte* out) {
  float sum[kBlock];
  for (std::size_t i = 0; i < elements; ++i) sum[i] = 0;
  for (int k = 0; k < count; ++k) {
    const _Float16* row = reinterpret_cast<const _Float16*>(rows[k]) + first;
    for (std::size_t i = 0; i < elements; ++i) sum[i] += weights[k] * static_cast<float>(row[i]);
  }
  for (std::size_t i = 0; i < elements; ++i) reinterpret_cast<_Float16*>(out)[i] = static_cast<_Float16>(sum[i]);
}

void sumHalvesPlain(const std::byte* const* rows, const float* weights, int count, std::size_t first, std::size_t elements,
                    std::byte* out) {
  sumHalves(rows, weights, count, first, elements, out);
}

#if defined(__x86_64__)
[[gnu::target("avx512f,avx512bw,avx512vl,f16c")]] void sumHalves512(const std::byte* const* rows, const float* weights,
                                                                    int count, std::size_t first, std::size_t elements,
                                                                    std::byte* out) {
  float sum[kBlock];
  std::size_t whole = elements / 16 * 16;
  for (std::size_t i = 0; i < whole; i += 16) {
    __m512 total = _mm512_setzero_ps();
    for (int k = 0; k < count; ++k) {
      // The masked forms, since g++ 12 warns of its own header in the plain ones.
      const auto* at = reinterpret_cast<const __m256i*>(rows[k] + 2 * (first + i));
      total = _mm512_fmadd_ps(_mm512_set1_ps(weights[k]), _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(at)), total);
    }
    _mm512_storeu_ps(sum + i, total);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i),
                        _mm512_maskz_cvtps_ph(0xffff, total, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  if (whole < elements) sumHalves(rows, weights, count, first + whole, elements - whole, out + 2 * whole);
}

[[gnu::target("avx512f")]] void stream512(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}

[[gnu::target("avx512f")]] void fill512(std::byte* to, std::size_t bytes) {
  __m512i value = _mm512_set1_epi8(0x5a);
  for (std::size_t i = 0; i < bytes; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), value);
}

[[gnu::target("avx2")]] void stream256(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) {
    __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), b);
  }
}

[[gnu::target("avx2")]] void fill256(std::byte* to, std::size_t bytes) {
  __m256i value = _mm256_set1_epi8(0x5a);
  for (std::size_t i = 0; i < bytes; i += 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), value);
}
#endif

void copyPlain(std::byte* to, const std::byte* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
void fillPlain(std::byte* to, std::size_t bytes) { std::memset(to, 0x5a, bytes); }

// What this CPU offers. stream and fillStream want a destination aligned to 64 bytes and a multiple of 64.
struct Kernels {
  const char* name = "plain";
  void (*stream)(std::byte*, const std::byte*, std::size_t) = copyPlain;
  void (*fillStream)(std::byte*, std::size_t) = fillPlain;
  SumBlock sumBf16 = sumBlockPlain<std::uint16_t>;
  SumBlock sumF32 = sumBlockPlain<float>;
  SumBlock sumF16 = sumHalvesPlain;

  Kernels() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      name = "avx512";
      stream = stream512;
      fillStream = fill512;
      sumBf16 = sumBlock512<std::uint16_t>;
      sumF32 = sumBlock512<float>;
      sumF16 = sumHalves512;
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      name = "avx2";
      stream = stream256;
      fillStream = fill256;
      sumBf16 = sumBlock256<std::uint16_t>;
      sumF32 = sumBlock256<float>;
    }
#endif
  }
};

const Kernels& kernels() {
  static const Kernels chosen;
  return chosen;
}

void copyAligned(std::byte* to, const std::byte* from, std::size_t bytes, Stores stores) {
  if (stores == Stores::plain) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::size_t head = std::min(bytes, (64 - reinterpret_cast<std::uintptr_t>(to) % 64) % 64);
  std::memcpy(to, from, head);
  std::size_t body = (bytes - head) / 64 * 64;
  kernels().stream(to + head, from + head, body);
  std::memcpy(to + head + body, from + head + body, bytes - head - body);
}

}  // namespace

const char* storeName() { return kernels().name; }

void copyRow(const std::byte* row, std::byte* const* places, int count, std::size_t bytes, Stores stores) {
  for (std::size_t at = 0; at < bytes; at += kPiece) {
    std::size_t part = std::min(kPiece, bytes - at);
    for (int i = 0; i < count; ++i) copyAligned(places[i] + at, row + at, part, stores);
  }
}

void sumRows(const std::byte* const* rows, const float* weights, int count, std::byte* out, std::size_t elements, Type type,
             Stores stores) {
  SumBlock sum = type == Type::bf16 ? kernels().sumBf16 : type == Type::f32 ? kernels().sumF32 : kernels().sumF16;
  std::size_t width = bytesOf(type);
  alignas(64) std::byte block[kBlock * 4];
  for (std::size_t first = 0; first < elements; first += kBlock) {
    std::size_t part = std::min(kBlock, elements - first);
    sum(rows, weights, count, first, part, block);
    copyAligned(out + first * width, block, part * width, stores);
  }
}

void fill(std::byte* out, std::size_t bytes, Stores stores) {
  if (stores == Stores::plain) {
    fillPlain(out, bytes);
    return;
  }
  std::size_t head = std::min(bytes, (64 - reinterpret_cast<std::uintptr_t>(out) % 64) % 64);
  fillPlain(out, head);
  std::size_t body = (bytes - head) / 64 * 64;
  kernels().fillStream(out + head, body);
  fillPlain(out + head + body, bytes - head - body);
}

void storeFence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fusco::bench
