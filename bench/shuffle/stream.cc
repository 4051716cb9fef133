#include "shuffle/stream.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusco::bench {
namespace {

constexpr std::size_t kPiece = 1024;  // bytes of a row that are written to one place after the other
constexpr std::size_t kBlock = 512;   // elements summed at a time; the next block is fetched meanwhile
constexpr int kMostAhead = 64;        // rows fetched ahead

// A part of a sum: elements [first, first + elements) of each row.
struct Block {
  const std::byte* const* rows;
  const std::byte* const* ahead;  // where what is needed next begins, for each row
  const float* weights;
  int count;
  std::size_t first, elements;
  std::byte* out;
};
using SumBlock = void (*)(const Block&);

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

// ---- sums on any CPU, and the rest of a block on all
// --------------------------------------------------------------------

void sumBf16From(const Block& b, std::size_t begin) {
  for (std::size_t i = begin; i < b.elements; ++i) {
    float sum = 0;
    for (int k = 0; k < b.count; ++k)
      sum += b.weights[k] * bf16ToFloat(reinterpret_cast<const std::uint16_t*>(b.rows[k])[b.first + i]);
    reinterpret_cast<std::uint16_t*>(b.out)[i] = floatToBf16(sum);
  }
}

template <class Element>
void sumFrom(const Block& b, std::size_t begin) {
  for (std::size_t i = begin; i < b.elements; ++i) {
    float sum = 0;
    for (int k = 0; k < b.count; ++k)
      sum += b.weights[k] * static_cast<float>(reinterpret_cast<const Element*>(b.rows[k])[b.first + i]);
    reinterpret_cast<Element*>(b.out)[i] = static_cast<Element>(sum);
  }
}

void sumBf16Plain(const Block& b) { sumBf16From(b, 0); }
void sumF32Plain(const Block& b) { sumFrom<float>(b, 0); }
void sumF16Plain(const Block& b) { sumFrom<_Float16>(b, 0); }

void streamPlain(std::byte* to, const std::byte* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
void fillPlain(std::byte* to, std::size_t bytes) { std::memset(to, 0x5a, bytes); }

#if defined(__x86_64__)

// ---- vectors: inlined into functions that are compiled for different instruction sets
// -----------------------------------

struct Vectors512 {
  typedef std::uint32_t Words __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));
};
struct Vectors256 {
  typedef std::uint32_t Words __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));
};

template <std::size_t kBytes>
[[gnu::always_inline]] inline void fetch(const std::byte* at) {
  for (std::size_t i = 0; i < kBytes; i += 64) __builtin_prefetch(at + i);
}

// Two vectors of bfloat16 at a time. One is the upper half of a float, so that a 32-bit word holds two: one of them is
// found by a shift, the other by a mask. Returns how many elements were summed.
template <class Vectors>
[[gnu::always_inline]] inline std::size_t sumBf16Vectors(const Block& b) {
  using Words = typename Vectors::Words;
  using Floats = typename Vectors::Floats;
  constexpr std::size_t kWidth = sizeof(Words);
  std::size_t i = 0;
  for (; i + kWidth <= b.elements; i += kWidth) {
    Floats even0{}, odd0{}, even1{}, odd1{};
    for (int k = 0; k < b.count; ++k) {
      const std::byte* at = b.rows[k] + 2 * (b.first + i);
      fetch<2 * kWidth>(b.ahead[k] + 2 * i);
      Words w0, w1;
      std::memcpy(&w0, at, kWidth);
      std::memcpy(&w1, at + kWidth, kWidth);
      even0 += b.weights[k] * reinterpret_cast<Floats>(w0 << 16);
      odd0 += b.weights[k] * reinterpret_cast<Floats>(w0 & 0xffff0000u);
      even1 += b.weights[k] * reinterpret_cast<Floats>(w1 << 16);
      odd1 += b.weights[k] * reinterpret_cast<Floats>(w1 & 0xffff0000u);
    }
    Words e0 = reinterpret_cast<Words>(even0), o0 = reinterpret_cast<Words>(odd0);
    Words e1 = reinterpret_cast<Words>(even1), o1 = reinterpret_cast<Words>(odd1);
    e0 += 0x7fff + ((e0 >> 16) & 1);
    o0 += 0x7fff + ((o0 >> 16) & 1);
    e1 += 0x7fff + ((e1 >> 16) & 1);
    o1 += 0x7fff + ((o1 >> 16) & 1);
    Words r0 = (e0 >> 16) | (o0 & 0xffff0000u), r1 = (e1 >> 16) | (o1 & 0xffff0000u);
    std::memcpy(b.out + 2 * i, &r0, kWidth);
    std::memcpy(b.out + 2 * i + kWidth, &r1, kWidth);
  }
  return i;
}

template <class Vectors>
[[gnu::always_inline]] inline std::size_t sumF32Vectors(const Block& b) {
  using Floats = typename Vectors::Floats;
  constexpr std::size_t kWidth = sizeof(Floats);
  std::size_t i = 0;
  for (; i + kWidth / 2 <= b.elements; i += kWidth / 2) {
    Floats sum0{}, sum1{};
    for (int k = 0; k < b.count; ++k) {
      const std::byte* at = b.rows[k] + 4 * (b.first + i);
      fetch<2 * kWidth>(b.ahead[k] + 4 * i);
      Floats f0, f1;
      std::memcpy(&f0, at, kWidth);
      std::memcpy(&f1, at + kWidth, kWidth);
      sum0 += b.weights[k] * f0;
      sum1 += b.weights[k] * f1;
    }
    std::memcpy(b.out + 4 * i, &sum0, kWidth);
    std::memcpy(b.out + 4 * i + kWidth, &sum1, kWidth);
  }
  return i;
}

#define FOR_AVX512 [[gnu::target("avx512f,avx512bw,avx512vl")]]
#define FOR_AVX2 [[gnu::target("avx2,fma,f16c")]]

FOR_AVX512 void sumBf16With512(const Block& b) { sumBf16From(b, sumBf16Vectors<Vectors512>(b)); }
FOR_AVX512 void sumF32With512(const Block& b) { sumFrom<float>(b, sumF32Vectors<Vectors512>(b)); }
FOR_AVX2 void sumBf16With256(const Block& b) { sumBf16From(b, sumBf16Vectors<Vectors256>(b)); }
FOR_AVX2 void sumF32With256(const Block& b) { sumFrom<float>(b, sumF32Vectors<Vectors256>(b)); }

FOR_AVX512 void sumF16With512(const Block& b) {
  std::size_t i = 0;
  for (; i + 32 <= b.elements; i += 32) {
    __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
    for (int k = 0; k < b.count; ++k) {
      const auto* at = reinterpret_cast<const __m256i*>(b.rows[k] + 2 * (b.first + i));
      fetch<64>(b.ahead[k] + 2 * i);
      __m512 weight = _mm512_set1_ps(b.weights[k]);
      // The masked forms, since g++ 12 warns of its own header in the plain ones.
      sum0 = _mm512_fmadd_ps(weight, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(at)), sum0);
      sum1 = _mm512_fmadd_ps(weight, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(at + 1)), sum1);
    }
    auto* to = reinterpret_cast<__m256i*>(b.out + 2 * i);
    _mm256_storeu_si256(to, _mm512_maskz_cvtps_ph(0xffff, sum0, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm256_storeu_si256(to + 1, _mm512_maskz_cvtps_ph(0xffff, sum1, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  sumFrom<_Float16>(b, i);
}

FOR_AVX2 void sumF16With256(const Block& b) {
  std::size_t i = 0;
  for (; i + 16 <= b.elements; i += 16) {
    __m256 sum0 = _mm256_setzero_ps(), sum1 = _mm256_setzero_ps();
    for (int k = 0; k < b.count; ++k) {
      const auto* at = reinterpret_cast<const __m128i*>(b.rows[k] + 2 * (b.first + i));
      fetch<32>(b.ahead[k] + 2 * i);
      __m256 weight = _mm256_set1_ps(b.weights[k]);
      sum0 = _mm256_fmadd_ps(weight, _mm256_cvtph_ps(_mm_loadu_si128(at)), sum0);
      sum1 = _mm256_fmadd_ps(weight, _mm256_cvtph_ps(_mm_loadu_si128(at + 1)), sum1);
    }
    auto* to = reinterpret_cast<__m128i*>(b.out + 2 * i);
    _mm_storeu_si128(to, _mm256_cvtps_ph(sum0, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(to + 1, _mm256_cvtps_ph(sum1, _MM_FROUND_TO_NEAREST_INT));
  }
  sumFrom<_Float16>(b, i);
}

// ---- non-temporal stores: destinations aligned to 64 bytes, bytes a multiple of 64
// ----------------------------------------

FOR_AVX512 void stream512(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}

FOR_AVX2 void stream256(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}

FOR_AVX512 void fill512(std::byte* to, std::size_t bytes) {
  __m512i value = _mm512_set1_epi8(0x5a);
  for (std::size_t i = 0; i < bytes; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), value);
}

FOR_AVX2 void fill256(std::byte* to, std::size_t bytes) {
  __m256i value = _mm256_set1_epi8(0x5a);
  for (std::size_t i = 0; i < bytes; i += 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), value);
}

// Four lines of a row are kept in registers for all places: the write-combining buffers then drain whole lines, place
// by place, at nearly the rate of a plain fill. Bytes a multiple of 256.
FOR_AVX512 void spread512(const std::byte* row, const std::byte* next, std::byte* const* places, int count,
                          std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 256) {
    __m512i v0 = _mm512_loadu_si512(row + i), v1 = _mm512_loadu_si512(row + i + 64);
    __m512i v2 = _mm512_loadu_si512(row + i + 128), v3 = _mm512_loadu_si512(row + i + 192);
    fetch<256>(next + i);
    for (int k = 0; k < count; ++k) {
      auto* to = reinterpret_cast<__m512i*>(places[k] + i);
      _mm512_stream_si512(to, v0);
      _mm512_stream_si512(to + 1, v1);
      _mm512_stream_si512(to + 2, v2);
      _mm512_stream_si512(to + 3, v3);
    }
  }
}

FOR_AVX2 void spread256(const std::byte* row, const std::byte* next, std::byte* const* places, int count,
                        std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 256) {
    __m256i v[8];
    for (int j = 0; j < 8; ++j) v[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i) + j);
    fetch<256>(next + i);
    for (int k = 0; k < count; ++k)
      for (int j = 0; j < 8; ++j) _mm256_stream_si256(reinterpret_cast<__m256i*>(places[k] + i) + j, v[j]);
  }
}
#endif

// What this CPU offers.
struct Kernels {
  const char* name = "plain";
  void (*stream)(std::byte*, const std::byte*, std::size_t) = streamPlain;
  void (*fillStream)(std::byte*, std::size_t) = fillPlain;
  void (*spread)(const std::byte*, const std::byte*, std::byte* const*, int, std::size_t) = nullptr;
  SumBlock sumBf16 = sumBf16Plain, sumF32 = sumF32Plain, sumF16 = sumF16Plain;

  Kernels() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      *this = {"avx512", stream512, fill512, spread512, sumBf16With512, sumF32With512, sumF16With512};
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      *this = {"avx2", stream256, fill256, spread256, sumBf16With256, sumF32With256, sumF16With256};
#endif
  }
  Kernels(const char* n, decltype(stream) s, decltype(fillStream) f, decltype(spread) p, SumBlock b, SumBlock w,
          SumBlock h)
      : name(n), stream(s), fillStream(f), spread(p), sumBf16(b), sumF32(w), sumF16(h) {}
};

const Kernels& kernels() {
  static const Kernels chosen;
  return chosen;
}

void copyPiece(std::byte* to, const std::byte* from, std::size_t bytes, Stores stores) {
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

void copyRow(const std::byte* row, const std::byte* next, std::byte* const* places, int count, std::size_t bytes,
             Stores stores) {
  std::size_t done = 0;
  bool aligned =
      std::all_of(places, places + count, [](std::byte* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; });
  if (stores == Stores::nonTemporal && aligned && kernels().spread != nullptr) {
    done = bytes / 256 * 256;
    kernels().spread(row, next, places, count, done);
  }
  for (; done < bytes; done += kPiece)
    for (int i = 0; i < count; ++i) copyPiece(places[i] + done, row + done, std::min(kPiece, bytes - done), stores);
}

void sumRows(const std::byte* const* rows, const float* weights, int count, const std::byte* const* next, int nextCount,
             std::byte* out, std::size_t elements, Type type, Stores stores) {
  SumBlock sum = type == Type::bf16 ? kernels().sumBf16 : type == Type::f32 ? kernels().sumF32 : kernels().sumF16;
  std::size_t width = bytesOf(type);
  alignas(64) std::byte block[kBlock * 4];
  const std::byte* ahead[kMostAhead];
  for (std::size_t first = 0; first < elements; first += kBlock) {
    std::size_t part = std::min(kBlock, elements - first);
    bool last = first + kBlock >= elements;
    for (int k = 0; k < std::min(count, kMostAhead); ++k)
      ahead[k] = !last ? rows[k] + (first + kBlock) * width : k < nextCount ? next[k] : rows[k] + first * width;
    Block b{rows, count <= kMostAhead ? ahead : rows, weights, count, first, part, block};
    sum(b);
    copyPiece(out + first * width, block, part * width, stores);
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
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

}  // namespace fusco::bench
