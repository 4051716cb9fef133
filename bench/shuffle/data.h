// The data that is moved: a stated function of where it belongs, so that any rank can say what any byte must be.
//
// Word j (8 bytes) of a row is mix(key + j), with the bits of each element restricted to finite numbers of magnitude
// 0.5 to 2 (types of bytes: any bits). The key tells rows apart: dispatch input by (rank, token), combine input by
// (rank, token, slot), send buffers by rank.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shuffle/options.h"
#include "shuffle/pattern.h"

namespace fusco::bench {

Pattern patternOf(Type type);
std::uint64_t tokenKey(std::uint64_t seed, int rank, std::int64_t token);
std::uint64_t slotKey(std::uint64_t seed, int rank, std::int64_t token, int slot);
std::uint64_t bufferKey(std::uint64_t seed, int rank);

// Bytes [offset, offset + bytes) of the row of that key. offset is a multiple of the element size.
void fillRow(std::byte* out, std::uint64_t key, std::size_t offset, std::size_t bytes, Type type);

// Makes a buffer unlike any result before a checked run.
void poison(std::byte* out, std::size_t bytes);

// Elements of two rows that differ.
std::uint64_t differing(const std::byte* a, const std::byte* b, std::size_t bytes, std::size_t elementBytes);

double toDouble(const std::byte* element, Type type);
// One unit of rounding of the type: 2^-8 for bfloat16, 2^-11 for half, 2^-24 for float.
double roundingUnit(Type type);

}  // namespace fusco::bench
