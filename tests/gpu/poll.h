// A kernel that consumes rows of experts while a dispatch is still bringing others.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace fusco::test {

struct Poll {
  const std::uint64_t* counters;  // [experts]
  const std::int32_t* rows;       // [experts]: that will arrive
  const std::int32_t* starts;     // [experts + 1]
  int experts;
  const std::uint32_t* tensor;
  std::size_t rowWords;
  std::uint64_t* sums;  // [experts]: of all words of its rows, or of none if they did not come within five seconds
};

// Waits for one expert after the other, from the last to the first, and adds up the words of its rows as soon as they
// are complete.
cudaError_t launchPoll(const Poll& poll, cudaStream_t stream);

}  // namespace fusco::test
