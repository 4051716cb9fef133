// The oracle must say what is right, and above all what is wrong.
#include "shuffle/oracle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

namespace fusco::bench {
namespace {

constexpr std::uint64_t kSeed = 3;

ShuffleMap smallMap(int ranks, std::int64_t tokens, int topk, int experts) {
  return naiveShuffle(RoutingSource({"uniform", ranks, 1, topk, experts, false, false, kSeed}), tokens, ranks);
}

// A correct dispatch, by another way than the oracle's: row after row of the output.
std::vector<std::byte> dispatched(const ShuffleMap& map, int rank, std::size_t rowBytes, Type type) {
  std::vector<std::byte> out(static_cast<std::size_t>(map.rowsOf(rank)) * rowBytes);
  for (std::size_t i = 0; i < map.received[rank].size(); ++i)
    fillRow(out.data() + i * rowBytes, tokenKey(kSeed, map.received[rank][i].source, map.received[rank][i].token), 0,
            rowBytes, type);
  return out;
}

std::vector<std::byte> combined(const ShuffleMap& map, int rank, std::size_t hidden) {
  std::vector<std::byte> out(static_cast<std::size_t>(map.routing[rank].tokens) * hidden * 4), row(hidden * 4);
  for (std::int64_t t = 0; t < map.routing[rank].tokens; ++t)
    for (std::size_t i = 0; i < hidden; ++i) {
      float sum = 0;
      for (int k = 0; k < map.topk; ++k) {
        fillRow(row.data(), slotKey(kSeed, rank, t, k), 0, hidden * 4, Type::f32);
        float x;
        std::memcpy(&x, row.data() + 4 * i, 4);
        sum += map.routing[rank].weights[static_cast<std::size_t>(t) * map.topk + k] * x;
      }
      std::memcpy(out.data() + (static_cast<std::size_t>(t) * hidden + i) * 4, &sum, 4);
    }
  return out;
}

TEST(Oracle, ExpertOrderByHand) {
  // Two ranks, three experts (0 and 1 on rank 0, 2 on rank 1), two tokens each.
  std::string file = testing::TempDir() + "by_hand.jsonl";
  FILE* stream = std::fopen(file.c_str(), "w");
  std::fputs("[1, 0]\n[2, -1]\n[0, 2]\n[1, 1]\n", stream);
  std::fclose(stream);
  ShuffleMap map = naiveShuffle(RoutingSource({"trace:" + file, 2, 1, 2, 3, false, false, 1}), 2, 2);
  std::remove(file.c_str());
  auto slots = [&](int rank) {
    std::vector<std::vector<int>> out;
    for (const Slot& s : map.received[rank]) out.push_back({s.source, s.token, s.slot});
    return out;
  };
  using V = std::vector<std::vector<int>>;
  EXPECT_EQ(slots(0), (V{{0, 0, 1}, {1, 0, 0}, {0, 0, 0}, {1, 1, 0}, {1, 1, 1}}));
  EXPECT_EQ(slots(1), (V{{0, 1, 0}, {1, 0, 1}}));
  EXPECT_EQ(map.row[0], (std::vector<std::int32_t>{2, 0, 0, -1}));
  EXPECT_EQ(map.row[1], (std::vector<std::int32_t>{1, 1, 3, 4}));
  EXPECT_EQ(map.busiestRows(), 5);
  EXPECT_EQ(map.busiestSlots(), 4);
}

TEST(Oracle, FindsOneWrongByteInDispatch) {
  for (Type type : {Type::u8, Type::bf16, Type::f32}) {
    ShuffleMap map = smallMap(3, 20, 4, 7);
    std::size_t rowBytes = 60;
    for (int rank = 0; rank < 3; ++rank) {
      std::vector<std::byte> out = dispatched(map, rank, rowBytes, type);
      EXPECT_EQ(wrongInDispatch(map, rank, out.data(), rowBytes, type, kSeed), 0u);
      for (std::size_t at : {std::size_t{0}, out.size() / 2, out.size() - 1}) {
        out[at] ^= std::byte{1};
        EXPECT_EQ(wrongInDispatch(map, rank, out.data(), rowBytes, type, kSeed), 1u) << at;
        out[at] ^= std::byte{1};
      }
    }
  }
}

TEST(Oracle, FindsRowsThatHaveChangedPlaces) {
  ShuffleMap map = smallMap(2, 30, 2, 8);
  std::vector<std::byte> out = dispatched(map, 0, 64, Type::u8);
  std::swap_ranges(out.begin(), out.begin() + 64, out.end() - 64);
  EXPECT_GT(wrongInDispatch(map, 0, out.data(), 64, Type::u8, kSeed), 64u);
}

TEST(Oracle, FindsUnwrittenRows) {
  ShuffleMap map = smallMap(2, 30, 2, 8);
  std::vector<std::byte> out = dispatched(map, 1, 64, Type::bf16);
  poison(out.data() + 128, 64);
  EXPECT_GT(wrongInDispatch(map, 1, out.data(), 64, Type::bf16, kSeed), 16u);
}

TEST(Oracle, CombineToleratesRoundingAndNothingElse) {
  ShuffleMap map = smallMap(2, 10, 4, 8);
  std::size_t hidden = 33;
  std::vector<std::byte> out = combined(map, 1, hidden);
  EXPECT_EQ(wrongInCombine(map, 1, out.data(), 33, Type::f32, 1, kSeed), 0u);
  auto at = [&](std::size_t i) { return reinterpret_cast<float*>(out.data()) + i; };
  float keep = *at(40);
  *at(40) = keep + 0.01f;
  EXPECT_EQ(wrongInCombine(map, 1, out.data(), 33, Type::f32, 1, kSeed), 1u);
  *at(40) = NAN;
  EXPECT_EQ(wrongInCombine(map, 1, out.data(), 33, Type::f32, 1, kSeed), 1u);
  *at(40) = keep;
  poison(out.data(), out.size());
  EXPECT_GT(wrongInCombine(map, 1, out.data(), 33, Type::f32, 1, kSeed), 300u);
}

TEST(Oracle, MovesCoverEveryReceivedByteOnce) {
  for (Op op : {Op::alltoallv, Op::gathersend, Op::sendrecv})
    for (int ranks : {1, 2, 5}) {
      MoveMap map = naiveMoves(op, 10000, 2, 28, ranks, kSeed);
      for (int rank = 0; rank < ranks; ++rank) {
        std::vector<int> written(map.receiveBytes[rank], 0);
        std::vector<std::byte> out(map.receiveBytes[rank]);
        for (int source = 0; source < ranks; ++source)
          for (const Move& m : map.moves[source]) {
            EXPECT_LE(m.from + m.bytes, map.sendBytes[source]);
            if (m.destination != rank) continue;
            for (std::uint64_t i = 0; i < m.bytes; ++i) ++written.at(m.to + i);
            fillRow(out.data() + m.to, bufferKey(kSeed, source), m.from, m.bytes, Type::bf16);
          }
        EXPECT_THAT(written, testing::Each(1));
        EXPECT_EQ(wrongInMoves(map, rank, out.data(), Type::bf16, kSeed), 0u);
        out[out.size() / 3] ^= std::byte{4};
        EXPECT_EQ(wrongInMoves(map, rank, out.data(), Type::bf16, kSeed), 1u);
      }
    }
}

TEST(Data, IsFiniteAndOfModestSize) {
  std::vector<std::byte> row(4096);
  for (Type type : {Type::bf16, Type::f16, Type::f32}) {
    fillRow(row.data(), 12345, 0, row.size(), type);
    for (std::size_t i = 0; i < row.size(); i += bytesOf(type)) {
      double value = std::fabs(toDouble(row.data() + i, type));
      EXPECT_GE(value, 0.5);
      EXPECT_LE(value, 2.0);
    }
  }
}

TEST(Data, APartIsThatPartOfTheWhole) {
  std::vector<std::byte> whole(333), part(100);
  fillRow(whole.data(), 9, 0, whole.size(), Type::u8);
  for (std::size_t offset : {0, 1, 7, 8, 50, 233}) {
    fillRow(part.data(), 9, offset, part.size(), Type::u8);
    EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + static_cast<std::ptrdiff_t>(offset))) << offset;
  }
}

}  // namespace
}  // namespace fusco::bench
