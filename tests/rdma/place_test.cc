// Rows that are written to where they belong, past the ring (FUSCO_IB_PLACE_ROWS=1), in the soft-RoCE machine: by a
// link, and in whole shuffles; and what the ways to send rows cost in requests.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/clock.h"
#include "rdma/pair.h"
#include "transport/local/window.h"

namespace fusco::transport {
namespace {

using testing::VerbsPair;

// Before the library reads its settings.
const int kSet = setenv("FUSCO_IB_PLACE_ROWS", "1", 1);

// A window of this process, gone at the end with what the NICs know of it.
struct Memory {
  Memory(VerbsPair& from, std::size_t size) : pair(from), bytes(size) {
    address = static_cast<std::byte*>(allocateWindow(bytes));
    for (std::size_t i = 0; i < bytes; ++i) address[i] = static_cast<std::byte>(i * 2654435761u >> 20);
  }
  ~Memory() {
    for (const auto& nics : pair.nics) nics->forgetWindow(findWindow(address, 1)->id);
    removeWindow(address);
  }
  VerbsPair& pair;
  std::size_t bytes;
  std::byte* address = nullptr;
};

// Opens one piece from the second end to the first, under a tag.
void open(VerbsPair& pair, std::uint64_t tag, const Memory& memory) {
  const Segment piece{memory.address, memory.bytes};
  pair.b().openPlaces(tag, {&piece, 1});
  ASSERT_TRUE(pair.await(0, [&] { return !pair.a().placesOf(tag).empty(); }));
  EXPECT_EQ(pair.a().placesOf(tag)[0], memory.bytes);
}

PostedLink::Arrival arrivalOf(VerbsPair& pair) {
  PostedLink::Arrival arrival;
  EXPECT_TRUE(pair.await(1, [&] { return (arrival = pair.b().peekHead()).slot != nullptr; })) << pair.link(0).failure();
  return arrival;
}

constexpr std::size_t kRow = 8192, kRows = 12, kHead = 1024;

struct Rows {
  std::vector<Segment> from;
  std::vector<PostedLink::Target> to;
};

// Every other row of the source, to rows of the destination in another order: none follows another.
Rows rowsOf(std::byte* source) {
  Rows rows;
  for (std::size_t r = 0; r < kRows; ++r) {
    rows.from.push_back({source + 2 * r * kRow, kRow});
    rows.to.push_back({0, (2 * (kRows - 1 - r) + 1) * kRow});
  }
  return rows;
}

void postPlaced(VerbsPair& pair, const Rows& rows, std::byte head) {
  std::byte* slot = nullptr;
  ASSERT_TRUE(pair.await(0, [&] { return (slot = pair.a().acquire()) != nullptr; }));
  std::memset(slot, static_cast<int>(head), kHead);
  pair.a().postPlaced(kHead, rows.from, rows.to);
}

void expectPlaced(const Memory& into, const Rows& rows) {
  for (std::size_t r = 0; r < kRows; ++r)
    EXPECT_EQ(std::memcmp(into.address + rows.to[r].offset, rows.from[r].address, kRow), 0) << r;
}

TEST(VerbsPlaces, RowsGoToWhereTheyBelong) {
  ASSERT_EQ(kSet, 0);
  VerbsPair pair(2, std::size_t{1} << 18);
  ASSERT_TRUE(pair.a().opensPlaces());
  Memory source(pair, 2 * kRows * kRow), into(pair, 2 * kRows * kRow);
  std::memset(into.address, 0, into.bytes);
  EXPECT_TRUE(pair.a().placesOf(7).empty());
  open(pair, 7, into);
  EXPECT_TRUE(pair.a().placesOf(6).empty()) << "under another tag";

  const auto before = pair.link(0).counts();
  const Rows rows = rowsOf(source.address);
  postPlaced(pair, rows, std::byte{7});
  PostedLink::Arrival arrival = arrivalOf(pair);
  EXPECT_TRUE(arrival.placed);
  EXPECT_FALSE(arrival.whole);
  EXPECT_EQ(arrival.slot[kHead - 1], std::byte{7});
  EXPECT_EQ(arrival.slot[kHead], std::byte{0}) << "no row in the slot";
  expectPlaced(into, rows);
  for (std::size_t r = 0; r < kRows; ++r) EXPECT_EQ(into.address[2 * r * kRow], std::byte{0}) << "between the rows";
  pair.b().release();
  ASSERT_TRUE(pair.await(0, [&] { return pair.a().drained(); }));
  auto after = pair.link(0).counts();
  EXPECT_EQ(after.workRequests - before.workRequests, kRows + 2) << "a row each, the head, the notice";
  EXPECT_EQ(after.posts - before.posts, 1u);
  EXPECT_EQ(after.sendsDone - before.sendsDone, 1u);
  EXPECT_EQ(after.bytesPlaced - before.bytesPlaced, kRows * kRow);
  EXPECT_EQ(after.bytesGathered - before.bytesGathered, kRows * kRow);

  // From memory that is no window they are taken by way of the slot, by as many requests.
  std::vector<std::byte> plain(source.address, source.address + source.bytes);
  std::memset(into.address, 0, into.bytes);
  const Rows others = rowsOf(plain.data());
  postPlaced(pair, others, std::byte{8});
  EXPECT_TRUE(arrivalOf(pair).placed);
  expectPlaced(into, others);
  pair.b().release();
  EXPECT_EQ(pair.link(0).counts().workRequests - after.workRequests, kRows + 2);
  EXPECT_EQ(pair.link(0).counts().bytesGathered, after.bytesGathered);

  // Rows that follow each other here and there are one; the ring goes on beside.
  after = pair.link(0).counts();
  Rows following;
  for (std::size_t r = 0; r < kRows; ++r) {
    following.from.push_back({source.address + r * kRow, kRow});
    following.to.push_back({0, r * kRow});
  }
  postPlaced(pair, following, std::byte{9});
  EXPECT_TRUE(arrivalOf(pair).placed);
  expectPlaced(into, following);
  pair.b().release();
  EXPECT_EQ(pair.link(0).counts().workRequests - after.workRequests, 3u);
  ASSERT_TRUE(pair.await(0, [&] { return pair.a().acquire() != nullptr; }));
  pair.a().post(64);
  arrival = arrivalOf(pair);
  EXPECT_TRUE(arrival.whole);
  EXPECT_FALSE(arrival.placed);
  pair.b().release();

  // What was not opened is refused here, before a NIC sees it.
  ASSERT_TRUE(pair.await(0, [&] { return pair.a().acquire() != nullptr; }));
  const Segment row{source.address, kRow};
  for (const PostedLink::Target bad : {PostedLink::Target{1, 0}, {0, into.bytes - kRow + 1}, {0, ~std::uint64_t{0}}})
    EXPECT_THROW(pair.a().postPlaced(kHead, {&row, 1}, {&bad, 1}), Error);
}

TEST(VerbsPlaces, EachTagOpensAnew) {
  VerbsPair pair(1, 65536);
  Memory one(pair, 4 * kRow), other(pair, 8 * kRow);
  for (std::uint64_t tag = 1; tag < 12; ++tag) open(pair, tag, tag % 2 == 0 ? one : other);
  // Memory of which nobody knows anything is not opened, nor is nothing.
  std::vector<std::byte> plain(kRow);
  const Segment pieces[2] = {{plain.data(), plain.size()}, {nullptr, 0}};
  pair.b().openPlaces(12, pieces);
  ASSERT_TRUE(pair.await(0, [&] { return pair.a().placesOf(12).size() == 2; }));
  EXPECT_EQ(pair.a().placesOf(12)[0], 0u);
  EXPECT_EQ(pair.a().placesOf(12)[1], 0u);
  EXPECT_TRUE(pair.a().placesOf(11).empty());
}

// Keys go with a queue pair: what it had not brought comes by the ring of the next one, which is told of the places,
// too.
TEST(VerbsPlaces, AnotherQueuePairBringsThemByTheRing) {
  VerbsPair pair(2, std::size_t{1} << 18, {"=rxe0,rxe1", "=rxe2,rxe3"});
  Memory source(pair, 2 * kRows * kRow), into(pair, 2 * kRows * kRow);
  open(pair, 7, into);
  const Rows rows = rowsOf(source.address);
  std::byte* slot = nullptr;
  ASSERT_TRUE(pair.await(0, [&] { return (slot = pair.a().acquire()) != nullptr; }));
  std::memset(slot, 7, kHead);
  pair.link(0).breakQueuePair();
  pair.a().postPlaced(kHead, rows.from, rows.to);
  const PostedLink::Arrival arrival = arrivalOf(pair);
  EXPECT_TRUE(arrival.whole);
  EXPECT_EQ(arrival.slot[0], std::byte{7});
  for (std::size_t r = 0; r < kRows; ++r)
    EXPECT_EQ(std::memcmp(arrival.slot + kHead + r * kRow, rows.from[r].address, kRow), 0) << r;
  pair.b().release();
  EXPECT_EQ(pair.link(0).moves(), 1);
  ASSERT_TRUE(pair.await(0, [&] { return !pair.a().placesOf(7).empty(); }));
  std::memset(into.address, 0, into.bytes);
  postPlaced(pair, rows, std::byte{8});
  EXPECT_TRUE(arrivalOf(pair).placed);
  expectPlaced(into, rows);
  pair.b().release();
}

// What a MiB of rows costs by the three ways, for slices of several sizes. Times are soft-RoCE's in an emulator.
TEST(VerbsPlaces, RequestsOfAMegabyte) {
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  std::printf("slice KiB, row bytes: requests a MiB (us a MiB) packed; gathered; placed\n");
  for (const std::size_t slice : {std::size_t{1} << 16, std::size_t{1} << 18, kMiB}) {
    VerbsPair pair(2, slice + kHead);
    Memory source(pair, 2 * kMiB), into(pair, 2 * kMiB);
    std::vector<std::byte> plain(2 * kMiB);
    std::uint64_t tag = 0;
    for (const std::size_t row : {std::size_t{4096}, std::size_t{14336}}) {
      const std::size_t perSlice = slice / row, count = kMiB / row;
      std::string line;
      for (const char* const way : {"packed", "gathered", "placed"}) {
        const bool packed = way[0] == 'p' && way[1] == 'a', placed = way[1] == 'l';
        if (placed) open(pair, ++tag, into);
        std::byte* const from = packed ? plain.data() : source.address;
        const auto before = pair.link(0).counts();
        const std::int64_t begin = nowNs();
        std::size_t slices = 0;
        for (std::size_t at = 0; at < count; at += perSlice, ++slices) {
          std::vector<Segment> rows;
          std::vector<PostedLink::Target> targets;
          for (std::size_t r = at; r < std::min(count, at + perSlice); ++r) {
            // In no order that would let two be one.
            const std::size_t elsewhere = (r * 7 + 3) % count;
            rows.push_back({from + 2 * elsewhere * (kMiB / count / 64 * 64), row});
            targets.push_back({0, 2 * r * (kMiB / count / 64 * 64)});
          }
          ASSERT_TRUE(pair.await(0, [&] { return pair.a().acquire() != nullptr; }));
          if (placed) {
            pair.a().postPlaced(kHead, rows, targets);
          } else {
            pair.a().postRows(kHead, rows);
          }
          ASSERT_TRUE(pair.await(1, [&] { return pair.b().peek() != nullptr; }));
          EXPECT_EQ(pair.b().peekHead().placed, placed);
          pair.b().release();
        }
        ASSERT_TRUE(pair.await(0, [&] { return pair.a().drained(); }));
        const double us = static_cast<double>(nowNs() - begin) / 1000;
        const auto after = pair.link(0).counts();
        const std::uint64_t requests = after.workRequests - before.workRequests;
        EXPECT_EQ(after.bytesGathered - before.bytesGathered, packed ? 0 : count * row);
        EXPECT_EQ(after.bytesPlaced - before.bytesPlaced, placed ? count * row : 0);
        if (packed) {
          EXPECT_EQ(requests, 2 * slices);
        } else if (placed) {
          EXPECT_EQ(requests, count + 2 * slices);
        } else {
          EXPECT_LE(requests, 3 * slices + count / 15);
        }
        line += (line.empty() ? "" : "; ") + std::to_string(requests) + " (" + std::to_string(std::lround(us)) + ")";
      }
      std::printf("%zu, %zu: %s\n", slice >> 10, row, line.c_str());
    }
  }
}

}  // namespace
}  // namespace fusco::transport
