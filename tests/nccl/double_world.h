// Where the ranks of the double's communicators meet: in shared memory that a number names, as the real init brings its
// ranks together. Splits, shrinks and growths come to numbers of their own.
#pragma once

#include <cstdint>
#include <vector>

namespace fusco::test {

// All `ranks` come here once and see each other's words. Empty: somebody did not come within 30 s.
std::vector<std::uint64_t> meetAt(std::uint64_t place, int rank, int ranks, std::uint64_t words);

std::uint64_t newPlace();
std::uint64_t mixed(std::uint64_t place, std::uint64_t salt);

}  // namespace fusco::test
