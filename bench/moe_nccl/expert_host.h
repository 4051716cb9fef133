// Experts on the host: y = relu(x A) B, or a scaling where there is no inner dimension. Made small, not fast: what is
// measured is what happens between them.
#pragma once

#include <cstdint>
#include <vector>

#include "moe_nccl/device.h"

namespace fusco::bench::moe {

// An element of expert e's matrix `which` (0: A, 1: B): inner unit f, hidden element j.
float expertWeight(const Shape& shape, int expert, int which, int f, std::int64_t j);
float expertScale(int expert);

class HostExperts {
 public:
  explicit HostExperts(const Shape& shape);
  void run(const std::uint16_t* rows, std::uint16_t* results, const std::int64_t* starts);

 private:
  const Shape shape_;
  std::vector<float> in_, out_;  // [local expert, inner, hidden]
};

}  // namespace fusco::bench::moe
