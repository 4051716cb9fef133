// Slices as memory: what is laid out is read back, and what does not fit its slot or contradicts itself is refused.
// Slots here are exactly as large as they say, so that a sanitizer sees a step too far.
#include "engine/slice.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "base/status.h"
#include "engine/fake_fabric.h"

namespace fusco::engine::testing {
namespace {

struct Filled {
  AlignedBytes slot;
  std::size_t slotBytes = 0;
  std::size_t rows = 0, entries = 0, rowBytes = 0;
};

Filled randomSlice(std::mt19937& random) {
  const auto pick = [&](std::size_t low, std::size_t high) {
    return std::uniform_int_distribution<std::size_t>(low, high)(random);
  };
  Filled f;
  f.rows = pick(0, 6);
  f.rowBytes = f.rows == 0 ? 0 : pick(1, 200);
  std::vector<std::uint32_t> first(1, 0);
  for (std::size_t i = 0; i < f.rows; ++i) first.push_back(first.back() + static_cast<std::uint32_t>(pick(0, 3)));
  f.entries = first.back();
  f.slotBytes = (sliceBytes(f.rows, f.entries, f.rowBytes) + 63) / 64 * 64 + 64 * pick(0, 2);
  f.slot = alignedBytes(f.slotBytes, 0x5c);
  Slice slice = layOutSlice(f.slot.get(), SliceKind::rows, f.rows, f.entries, f.rowBytes);
  for (std::size_t i = 0; i <= f.rows; ++i) slice.copies[i] = {static_cast<std::uint32_t>(i * 10), first[i]};
  for (std::size_t e = 0; e < f.entries; ++e) {
    slice.entries[e] = {static_cast<std::uint16_t>(e % 3), static_cast<std::uint16_t>(e),
                        static_cast<std::uint32_t>(e * 7)};
    slice.weights[e] = static_cast<float>(e);
  }
  for (std::size_t i = 0; i < f.rows; ++i)
    std::memset(slice.payload + i * sliceRowStride(f.rowBytes), static_cast<int>(i), f.rowBytes);
  return f;
}

// Reads all that the engine may read of a slice that was accepted. The sum keeps the compiler from leaving it out.
std::uint64_t readAll(const Slice& slice) {
  std::uint64_t sum = 0;
  for (std::uint32_t i = 0; i < slice.header->rows; ++i) {
    sum += slice.copies[i].token;
    for (std::uint32_t e = slice.copies[i].firstEntry; e < slice.copies[i + 1].firstEntry; ++e) {
      sum += slice.entries[e].row + static_cast<std::uint64_t>(slice.weights[e] == 1.0f);
    }
    for (std::size_t b = 0; b < slice.header->rowBytes; ++b) {
      sum += std::to_integer<std::uint64_t>(slice.payload[i * sliceRowStride(slice.header->rowBytes) + b]);
    }
  }
  // Some readers take the payload as one row, whatever the number of rows.
  for (std::size_t b = 0; b < slice.header->rowBytes; ++b) sum += std::to_integer<std::uint64_t>(slice.payload[b]);
  return sum;
}

TEST(Slice, WhatIsLaidOutIsReadBack) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    const Filled f = randomSlice(random);
    const Slice slice = readSlice(f.slot.get(), f.slotBytes);
    ASSERT_EQ(slice.header->rows, f.rows);
    ASSERT_EQ(slice.header->entries, f.entries);
    ASSERT_EQ(slice.header->payloadOffset % 64, 0u);
    for (std::size_t row = 0; row < f.rows; ++row) {
      ASSERT_EQ(slice.copies[row].token, row * 10);
      const std::byte* at = slice.payload + row * sliceRowStride(f.rowBytes);
      ASSERT_EQ(at[0], static_cast<std::byte>(row));
      ASSERT_EQ(at[f.rowBytes - 1], static_cast<std::byte>(row));
    }
    for (std::size_t e = 0; e < f.entries; ++e) {
      ASSERT_EQ(slice.entries[e].row, e * 7);
      ASSERT_EQ(slice.weights[e], static_cast<float>(e));
    }
  }
}

TEST(Slice, DamageIsRefusedOrHarmless) {
  std::mt19937 random(2);
  const auto pick = [&](std::size_t low, std::size_t high) {
    return std::uniform_int_distribution<std::size_t>(low, high)(random);
  };
  int refused = 0, accepted = 0;
  std::uint64_t sum = 0;
  for (int i = 0; i < 30000; ++i) {
    const Filled f = randomSlice(random);
    const std::size_t head = sliceHead(f.rows, f.entries);
    for (std::size_t n = pick(1, 3); n > 0; --n) {
      if (pick(0, 1) == 0) {
        f.slot[pick(0, head - 1)] = static_cast<std::byte>(pick(0, 255));
      } else {
        // A word of the header or of the lists becomes something that hurts most.
        constexpr std::uint32_t kEvil[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0xffffffc0};
        std::memcpy(f.slot.get() + 4 * pick(0, head / 4 - 1), &kEvil[pick(0, 5)], 4);
      }
    }
    try {
      sum += readAll(readSlice(f.slot.get(), f.slotBytes));
      ++accepted;
    } catch (const Error& e) {
      ASSERT_EQ(e.code(), Code::internalError);
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_GT(accepted, 1000);
  EXPECT_NE(sum, 0u);
}

TEST(Slice, NamedDamage) {
  const auto expectRefused = [](auto&& damage) {
    AlignedBytes slot = alignedBytes(1024);
    Slice slice = layOutSlice(slot.get(), SliceKind::rows, 2, 3, 100);
    slice.copies[0] = {0, 0};
    slice.copies[1] = {1, 1};
    slice.copies[2] = {0, 3};
    EXPECT_NO_THROW(readSlice(slot.get(), 1024));
    damage(slice);
    EXPECT_THROW(readSlice(slot.get(), 1024), Error);
  };
  expectRefused([](Slice& s) { s.header->rows = 0x40000000; });
  expectRefused([](Slice& s) { s.header->entries = 0xffffffff; });
  expectRefused([](Slice& s) { s.header->rowBytes = ~std::uint64_t{0}; });
  expectRefused([](Slice& s) { s.header->rowBytes = 2000; });
  expectRefused([](Slice& s) { s.header->payloadOffset += 64; });
  expectRefused([](Slice& s) { s.copies[1].firstEntry = 4; });
  expectRefused([](Slice& s) { s.copies[2].firstEntry = 0; });
  // No entries, but copies that point to some.
  expectRefused([](Slice& s) {
    s = layOutSlice(reinterpret_cast<std::byte*>(s.header), SliceKind::rows, 2, 0, 100);
    s.copies[0] = s.copies[1] = {0, 0};
    s.copies[2] = {0, 9};
  });
  // No rows, but bytes of one.
  expectRefused([](Slice& s) {
    s = layOutSlice(reinterpret_cast<std::byte*>(s.header), SliceKind::counts, 0, 0, 100);
    s.copies[0] = {0, 0};
  });
}

TEST(Slice, RowsThatDoNotFitAreCut) {
  std::mt19937 random(3);
  for (int i = 0; i < 5000; ++i) {
    const std::size_t slotBytes = 64 * (random() % 60 + 4), rowBytes = random() % 9000 + 1, entries = random() % 9;
    if (sliceHead(1, entries) + 64 > slotBytes) {
      EXPECT_THROW(partBytes(rowBytes, entries, slotBytes), Error);
      continue;
    }
    std::size_t at = 0;
    while (at < rowBytes) {
      const std::size_t part = partBytes(rowBytes - at, entries, slotBytes);
      ASSERT_GT(part, 0u);
      ASSERT_LE(sliceBytes(1, entries, part), slotBytes);
      at += part;
      ASSERT_TRUE(at == rowBytes || part % 64 == 0);
    }
    ASSERT_EQ(at, rowBytes);
  }
}

}  // namespace
}  // namespace fusco::engine::testing
