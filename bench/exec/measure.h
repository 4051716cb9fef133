#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fusco::bench {

// What exec_perf measures; rowBytes is a multiple of 256.
struct Options {
  std::size_t tokens = 1024, rowBytes = 14336, topk = 8;
  int rounds = 7;
  bool cpuTime = false;
  std::vector<int> threads{1, 2};
  std::vector<std::string> memory{"private", "private-huge", "memfd", "memfd-huge", "memfd-collapsed", "memfd-hugetlb"};
  std::vector<std::string> impl{"avx512", "avx2", "scalar"};
  std::vector<std::string> ops{"fill", "place", "cast", "sum", "back", "move"};
};

// Measures all operations and implementations of `o` on `threads` ranks in memory of this kind, prints a line for
// each and one for the plain fill beside them, and returns the number of wrong elements.
std::size_t measure(const Options& o, const std::string& kind, int threads);

}  // namespace fusco::bench
