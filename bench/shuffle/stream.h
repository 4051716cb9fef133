// The best that this CPU can do with rows in memory, written for the limit alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shuffle/options.h"

namespace fusco::bench {

enum class Stores { nonTemporal, plain };

// "avx512", "avx2" or "plain": what the functions below use on this CPU.
const char* storeName();

// Copies a row to each of `places`; the row is read from memory once.
void copyRow(const std::byte* row, std::byte* const* places, int count, std::size_t bytes, Stores stores);
// out = sum of weights[k] * rows[k] in FP32, rounded once. Types bf16, f16, f32.
void sumRows(const std::byte* const* rows, const float* weights, int count, std::byte* out, std::size_t elements, Type type,
             Stores stores);
void fill(std::byte* out, std::size_t bytes, Stores stores);
// Needed after non-temporal stores, before anyone is told that they are done.
void storeFence();

}  // namespace fusco::bench
