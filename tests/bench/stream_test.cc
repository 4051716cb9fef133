// The limit's loops against plain ones, at odd sizes and places.
#include "shuffle/stream.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "shuffle/data.h"

namespace fusco::bench {
namespace {

TEST(Stream, CopiesARowToAllItsPlaces) {
  for (Stores stores : {Stores::nonTemporal, Stores::plain})
    for (std::size_t bytes : {1, 63, 64, 257, 1000, 4096, 14336, 14337})
      for (std::size_t shift : {0, 5}) {
        std::vector<std::byte> row(bytes), memory(4 * (bytes + 200), std::byte{0x77});
        fillRow(row.data(), 4, 0, bytes, Type::u8);
        std::vector<std::byte*> places;
        for (std::size_t i = 0; i < 3; ++i) {
          auto at = reinterpret_cast<std::uintptr_t>(memory.data() + i * (bytes + 200));
          places.push_back(reinterpret_cast<std::byte*>((at + 63) / 64 * 64 + shift));
        }
        copyRow(row.data(), row.data(), places.data(), 3, bytes, stores);
        storeFence();
        for (std::byte* place : places) {
          EXPECT_EQ(differing(place, row.data(), bytes, 1), 0u) << bytes;
          EXPECT_EQ(place[bytes], std::byte{0x77});
        }
      }
}

TEST(Stream, SumsInFp32WithOneRounding) {
  for (Type type : {Type::bf16, Type::f16, Type::f32})
    for (std::size_t elements : {1, 31, 64, 500, 513, 1024, 1111})
      for (int count : {0, 1, 8, 70}) {
        std::size_t bytes = elements * bytesOf(type);
        std::vector<std::vector<std::byte>> rows(static_cast<std::size_t>(count), std::vector<std::byte>(bytes));
        std::vector<const std::byte*> pointers;
        std::vector<float> weights;
        for (int k = 0; k < count; ++k) {
          fillRow(rows[k].data(), static_cast<std::uint64_t>(k), 0, bytes, type);
          pointers.push_back(rows[k].data());
          weights.push_back(0.1f + 0.05f * static_cast<float>(k));
        }
        std::vector<std::byte> out(bytes + 1, std::byte{0x77});
        sumRows(pointers.data(), weights.data(), count, pointers.data(), count, out.data(), elements, type,
                Stores::nonTemporal);
        storeFence();
        EXPECT_EQ(out[bytes], std::byte{0x77});
        for (std::size_t i = 0; i < elements; ++i) {
          double sum = 0, magnitude = 0;
          for (int k = 0; k < count; ++k) {
            double product = weights[k] * toDouble(rows[k].data() + i * bytesOf(type), type);
            sum += product;
            magnitude += std::fabs(product);
          }
          ASSERT_NEAR(toDouble(out.data() + i * bytesOf(type), type), sum,
                      (roundingUnit(type) + count * 0x1p-24) * magnitude)
              << nameOf(type) << " " << elements << " " << count << " " << i;
        }
      }
}

TEST(Stream, FillsAllOfIt) {
  std::vector<std::byte> memory(5000, std::byte{0});
  fill(memory.data() + 3, 4990, Stores::nonTemporal);
  storeFence();
  EXPECT_EQ(memory[2], std::byte{0});
  EXPECT_EQ(memory[4993], std::byte{0});
  for (std::size_t i = 3; i < 4993; ++i) ASSERT_EQ(memory[i], std::byte{0x5a});
}

}  // namespace
}  // namespace fusco::bench
