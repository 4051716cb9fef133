// Averages of host mode over more ranks than a test would start.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "plugin/nccl/host.h"

namespace fusco::nccl {
namespace {

template <typename T>
T averageOf(ncclDataType_t type, const std::vector<T>& values) {
  std::vector<const void*> inputs;
  for (const T& value : values) inputs.push_back(&value);
  T result{77};
  reduceInOrder(type, ncclAvg, inputs, &result, 1);
  return result;
}

// A sum as it stands in the type when ranks have wrapped it, brought by rank 0 alone.
template <typename T>
void expectQuotients(ncclDataType_t type) {
  using Limits = std::numeric_limits<T>;
  for (const int ranks : {1, 2, 127, 128, 129, 200, 255, 256, 257, 300, 512, 70000}) {
    for (const T sum : {Limits::min(), static_cast<T>(Limits::min() + 1), static_cast<T>(-1), T{0}, T{1}, T{100},
                        static_cast<T>(Limits::max() - 1), Limits::max()}) {
      std::vector<T> values(static_cast<std::size_t>(ranks), T{0});
      values[0] = sum;
      // Holds every type, whatever its sign.
      const __int128 want = static_cast<__int128>(sum) / ranks;
      EXPECT_EQ(static_cast<__int128>(averageOf(type, values)), want) << ranks << " ranks, sum " << +sum;
    }
  }
}

TEST(Average, dividesIntegersByAnyNumberOfRanks) {
  expectQuotients<std::int8_t>(ncclInt8);
  expectQuotients<std::uint8_t>(ncclUint8);
  expectQuotients<std::int32_t>(ncclInt32);
  expectQuotients<std::uint32_t>(ncclUint32);
  expectQuotients<std::int64_t>(ncclInt64);
  expectQuotients<std::uint64_t>(ncclUint64);
}

// As NCCL has it: 200 times 3 is 88 in eight bits.
TEST(Average, sumsIntegersInTheirType) {
  EXPECT_EQ(averageOf(ncclInt8, std::vector<std::int8_t>(200, 3)), 88 / 200);
  EXPECT_EQ(averageOf(ncclUint8, std::vector<std::uint8_t>(3, 200)), 88 / 3);
  EXPECT_EQ(averageOf(ncclInt8, std::vector<std::int8_t>(3, 100)), 44 / 3);
  EXPECT_EQ(averageOf(ncclInt32, std::vector<std::int32_t>(2, 1 << 30)), std::numeric_limits<std::int32_t>::min() / 2);
}

TEST(Average, dividesFloats) {
  EXPECT_EQ(averageOf(ncclFloat32, std::vector<float>(300, 1.5f)), 1.5f);
  EXPECT_EQ(averageOf(ncclFloat64, std::vector<double>(300, 1.5)), 1.5);
}

template <typename T>
T reduced(ncclDataType_t type, ncclRedOp_t operation, T first, T second) {
  T result{77};
  reduceInOrder(type, operation, {&first, &second}, &result, 1);
  return result;
}

// As in NCCL, whoever has it: a number that is not one is passed over.
template <typename T>
void expectNumbers(ncclDataType_t type, T none, T low, T high) {
  for (const ncclRedOp_t operation : {ncclMax, ncclMin}) {
    EXPECT_EQ(reduced(type, operation, none, high), high) << type;
    EXPECT_EQ(reduced(type, operation, low, none), low) << type;
    EXPECT_EQ(reduced(type, operation, low, high), operation == ncclMax ? high : low) << type;
  }
}

TEST(Extremes, passOverWhatIsNoNumber) {
  expectNumbers<float>(ncclFloat32, std::nanf(""), -1, 2);
  expectNumbers<double>(ncclFloat64, std::nan(""), -1, 2);
  expectNumbers<std::uint16_t>(ncclFloat16, 0x7e00, 0xbc00, 0x4000);
  expectNumbers<std::uint16_t>(ncclBfloat16, 0x7fc0, 0xbf80, 0x4000);
  expectNumbers<std::uint8_t>(ncclFloat8e4m3, 0x7f, 0xb8, 0x40);
  expectNumbers<std::uint8_t>(ncclFloat8e5m2, 0x7e, 0xbc, 0x40);
  EXPECT_TRUE(std::isnan(reduced(ncclFloat32, ncclMax, std::nanf(""), std::nanf(""))));
}

}  // namespace
}  // namespace fusco::nccl
