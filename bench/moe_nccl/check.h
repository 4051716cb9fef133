// What a rank's output must be.
#pragma once

#include "moe_nccl/device.h"
#include "shuffle/routing.h"

namespace fusco::bench::moe {

// Elements that are wrong in some tokens (all of them would take longer than the benchmark), against sums made here in
// float64 from the tokens and the experts' matrices alone. An element is wrong beyond two roundings to BF16: of the
// expert's row, and of the sum.
std::uint64_t wrongAgainstReference(const Shape& shape, const Routing& routing, const std::uint16_t* y);

}  // namespace fusco::bench::moe
