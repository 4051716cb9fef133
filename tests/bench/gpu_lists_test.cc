// What shuffle_perf --device cuda works out without a GPU: data, which rank is where, and the lists of a staged
// shuffle.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "shuffle/cuda/deal.h"
#include "shuffle/cuda/staged_lists.h"
#include "shuffle/data.h"

namespace fusco::bench::gpu {
namespace {

using testing::ElementsAre;

TEST(GpuBench, KernelsMakeTheDataThatTheHostMakes) {
  for (const Type type : {Type::u8, Type::bf16, Type::f16, Type::f32}) {
    std::vector<std::byte> row(8 * 37);
    fillRow(row.data(), 1234567, 0, row.size(), type);
    for (std::size_t word = 0; word < row.size() / 8; ++word) {
      std::uint64_t got = 0;
      std::memcpy(&got, row.data() + 8 * word, 8);
      EXPECT_EQ(got, patternWord(patternOf(type), 1234567, word));
    }
  }
}

TEST(GpuBench, RanksAreDealtToGpus) {
  EXPECT_EQ(gpusFor(0, 8, 4), 4);
  EXPECT_EQ(gpusFor(0, 1, 8), 1);
  EXPECT_EQ(gpusFor(2, 8, 8), 2);
  EXPECT_EQ(gpusFor(4, 2, 8), 2);
  std::vector<int> of;
  for (int rank = 0; rank < 5; ++rank) of.push_back(gpuOfRank(rank, 5, 2));
  EXPECT_THAT(of, ElementsAre(0, 0, 0, 1, 1));
  // What a GPU may use is dealt to its ranks, all of it.
  EXPECT_EQ(smsOfRank(8, 0, 8, 1), 1);
  EXPECT_EQ(smsOfRank(4, 7, 8, 1), 0);
  std::vector<int> sms;
  for (int rank = 0; rank < 5; ++rank) sms.push_back(smsOfRank(10, rank, 5, 2));
  EXPECT_THAT(sms, ElementsAre(4, 3, 3, 5, 5));
}

TEST(GpuBench, RowsOfARankBeginAtAnAlignedByte) {
  std::vector<std::int64_t> all;
  const std::vector<Place> places = placesOf({10, 0, 33, 7}, 1000, 2, all);
  ASSERT_EQ(places.size(), 4u);
  EXPECT_EQ(places[0].first, 0);
  EXPECT_EQ(places[1].first, 32);  // 32 rows of 1000 bytes are a multiple of 256
  EXPECT_EQ(places[2].first, 0);
  EXPECT_EQ(places[3].first, 64);
  EXPECT_THAT(all, ElementsAre(32, 96));
  EXPECT_EQ(places[3].rows, 7);
  placesOf({3, 5}, 14336, 1, all);
  EXPECT_THAT(all, ElementsAre(8));
}

TEST(GpuBench, WorkersRunSideBySideAndTellOfFailures) {
  Workers workers(4);
  std::atomic<int> met{0};
  workers.each([&](int) {
    ++met;
    while (met < 4) std::this_thread::yield();
  });
  EXPECT_EQ(met, 4);
  EXPECT_THROW(workers.each([](int rank) {
    if (rank == 2) throw std::runtime_error("rank 2");
  }),
               std::runtime_error);
  std::atomic<int> sum{0};
  workers.each([&](int rank) { sum += rank; });
  EXPECT_EQ(sum, 6);
}

// Tokens packed, pieces brought over, rows sorted: what must come out is the naive shuffle's.
TEST(GpuBench, StagesWalkedThroughGiveExpertOrder) {
  for (const char* text : {"uniform", "masked", "one-expert", "zipf:1.2"}) {
    RoutingOptions options;
    options.text = text;
    options.ranks = 3;
    options.topk = 4;
    options.experts = 11;
    const ShuffleMap map = naiveShuffle(RoutingSource(options), 57, 3);
    const StagedLists lists = stagedLists(map);
    const auto name = [&](int source, std::int64_t slot) { return source * 100000 + slot; };
    std::vector<std::vector<std::int64_t>> packed(3), arrived(3);
    for (int s = 0; s < 3; ++s) {
      packed[s].assign(static_cast<std::size_t>(lists.rowsPacked(s)), -1);
      for (std::size_t slot = 0; slot < lists.packed[s].size(); ++slot) {
        EXPECT_EQ(lists.packed[s][slot] < 0, map.row[s][slot] < 0);
        if (lists.packed[s][slot] >= 0)
          packed[s].at(static_cast<std::size_t>(lists.packed[s][slot])) = name(s, static_cast<std::int64_t>(slot));
      }
      EXPECT_EQ(std::count(packed[s].begin(), packed[s].end(), -1), 0) << text;
    }
    for (int d = 0; d < 3; ++d) {
      arrived[d].assign(static_cast<std::size_t>(map.rowsOf(d)), -1);
      for (int s = 0; s < 3; ++s)
        for (std::int64_t i = 0; i < lists.count[s][d]; ++i)
          arrived[d].at(static_cast<std::size_t>(lists.arriveAt[d][s] + i)) =
              packed[s].at(static_cast<std::size_t>(lists.sendAt[s][d] + i));
      for (std::size_t row = 0; row < map.received[d].size(); ++row) {
        const Slot& slot = map.received[d][row];
        EXPECT_EQ(arrived[d].at(static_cast<std::size_t>(lists.arrived[d][row])),
                  name(slot.source, slot.token * map.topk + slot.slot))
            << text;
      }
    }
  }
}

TEST(GpuBench, CopiesARankAreCountedOnce) {
  RoutingOptions options;
  options.text = "one-expert";
  options.ranks = 4;
  options.topk = 8;
  options.experts = 16;
  const auto copies = distinctCopies(naiveShuffle(RoutingSource(options), 10, 4));
  for (int source = 0; source < 4; ++source) EXPECT_THAT(copies[source], ElementsAre(0, 0, 10, 0));
}

}  // namespace
}  // namespace fusco::bench::gpu
