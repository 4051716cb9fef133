// The numbers of which test data is made, for the host and for kernels alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSCO_BENCH_ANYWHERE __host__ __device__
#else
#define FUSCO_BENCH_ANYWHERE
#endif

namespace fusco::bench {

// splitmix64
FUSCO_BENCH_ANYWHERE inline std::uint64_t mixed(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

// The bits of a word that are drawn, and those that are set.
struct Pattern {
  std::uint64_t keep, set;
};

// Word `index` (8 bytes) of the row of that key.
FUSCO_BENCH_ANYWHERE inline std::uint64_t patternWord(const Pattern& pattern, std::uint64_t key, std::uint64_t index) {
  return (mixed(key + index) & pattern.keep) | pattern.set;
}

}  // namespace fusco::bench
