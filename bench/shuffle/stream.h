// The best that this CPU can do with rows in memory, written for the limit alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shuffle/options.h"

namespace fusco::bench {

enum class Stores { nonTemporal, plain };

// "avx512", "avx2" or "plain": what the functions below use on this CPU.
const char* storeName();

// Copies a row to each of `places`; the row is read from memory once. `next` is the row that will be copied after it:
// it is fetched meanwhile (may be `row` itself).
void copyRow(const std::byte* row, const std::byte* next, std::byte* const* places, int count, std::size_t bytes,
             Stores stores);
// out = sum of weights[k] * rows[k] in FP32, rounded once. Types bf16, f16, f32. `next`: the first `nextCount` rows of
// the sum that will follow; they are fetched meanwhile.
void sumRows(const std::byte* const* rows, const float* weights, int count, const std::byte* const* next, int nextCount,
             std::byte* out, std::size_t elements, Type type, Stores stores);
void fill(std::byte* out, std::size_t bytes, Stores stores);
// Needed after non-temporal stores, before anyone is told that they are done.
void storeFence();

}  // namespace fusco::bench
