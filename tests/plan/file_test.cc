// Plans as values: stored, replayed, compared, printed.
#include "plan/file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/status.h"
#include "plan/compare.h"
#include "plan/print.h"
#include "world.h"

namespace fusco::plan::testing {
namespace {

PlanFile recordOf(const World& world, const Expected& expected, int rank) {
  return record(world.map(rank), world.topology, rank, world.options, expected.exchanged[rank]);
}

TEST(PlanFile, ReplayGivesAnEqualPlan) {
  for (unsigned seed = 1; seed <= 300; ++seed) {
    std::mt19937 random(seed);
    const World world = randomWorld(random);
    const Expected expected = naive(world);
    const std::vector<Arena> arenas = planAll(world, expected);
    for (int rank = 0; rank < world.topology.ranks(); ++rank) {
      std::stringstream stream;
      save(recordOf(world, expected, rank), stream);
      const PlanFile file = load(stream);
      const OwnedArena again = replay(file);
      ASSERT_EQ(firstDifference(arenas[rank].get(), again.get()), "") << "seed " << seed << ": " << describe(world);
      ASSERT_EQ(encode(file), stream.str());
    }
  }
}

// Refuses or plans; anything else is for the sanitizers to find.
bool survives(const std::string& bytes) {
  try {
    replay(decode(bytes));
    return true;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::invalidArgument) << error.what();
    return false;
  }
}

TEST(PlanFile, ShortenedFilesAreRefused) {
  std::mt19937 random(12);
  const World world = randomWorld(random);
  const std::string bytes = encode(recordOf(world, naive(world), 0));
  ASSERT_TRUE(survives(bytes));
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    ASSERT_FALSE(survives(bytes.substr(0, length))) << length;
  }
  EXPECT_FALSE(survives(bytes + '\0'));
}

TEST(PlanFile, DamagedFilesDoNoHarm) {
  int accepted = 0, refused = 0;
  for (unsigned seed = 1; seed <= 60; ++seed) {
    std::mt19937 random(seed);
    const World world = randomWorld(random);
    const std::string good = encode(recordOf(world, naive(world), 0));
    for (int round = 0; round < 150; ++round) {
      std::string bad = good;
      const int flips = 1 + static_cast<int>(random() % 3);
      for (int i = 0; i < flips; ++i) {
        const std::size_t place = random() % bad.size();
        if (random() % 2 == 0) {
          bad[place] = static_cast<char>(random());
        } else {  // lengths and counts that matter
          static constexpr std::int32_t kValues[] = {-1, 0, 1, INT32_MAX, INT32_MIN, 1 << 24};
          const std::int32_t value = kValues[random() % std::size(kValues)];
          if (place + 4 <= bad.size()) std::memcpy(bad.data() + place, &value, 4);
        }
      }
      ++(survives(bad) ? accepted : refused);
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_GT(refused, 0);
}

TEST(PlanFile, SaysWhatIsWrong) {
  try {
    decode("not a plan at all");
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "plan file, byte 1: this is no plan file");
  }
  std::stringstream closed;
  closed.setstate(std::ios::badbit);
  std::mt19937 random(1);
  const World world = randomWorld(random);
  EXPECT_THROW(save(recordOf(world, naive(world), 0), closed), Error);
  EXPECT_THROW(load(closed), Error);
}

World twoNodes() {
  World world;
  world.topology = Topology({0, 1});
  world.topk = 2;
  world.experts = 4;
  world.tokens = {2, 0};
  world.wide = {{3, 1, 2, 3}, {}};
  world.narrow.resize(2);
  world.weights = {{0.5f, 0.25f, 1.0f, 2.0f}, {}};
  return world;
}

TEST(PlanCompare, TheFirstDifferenceInWords) {
  World world = twoNodes();
  const Expected expected = naive(world);
  const std::vector<Arena> good = planAll(world, expected);
  EXPECT_TRUE(planEqual(good[0].get(), good[0].get()));
  EXPECT_EQ(firstDifference(good[0].get(), good[1].get()), "capacity in tokens: 2 and 0");

  World other = world;
  other.weights[0][3] = 3;
  EXPECT_EQ(firstDifference(good[0].get(), planAll(other, expected)[0].get()), "weight of entry 3: 2 and 3");
  other = world;
  other.wide[0][2] = 0;
  const Expected otherExpected = naive(other);
  EXPECT_EQ(firstDifference(good[0].get(), planAll(other, otherExpected)[0].get()), "copies: 3 and 4");
  other = world;
  std::swap(other.wide[0][2], other.wide[0][3]);
  EXPECT_EQ(firstDifference(good[0].get(), planAll(other, naive(other))[0].get()),
            "entry 2: local rank 0, slot 0, row 0 and local rank 0, slot 0, row 2");
}

TEST(PlanCompare, WhatCapacityLeavesUnusedDoesNotCount) {
  const World world = twoNodes();
  std::vector<Arena> one = planAll(world, naive(world)), other = planAll(world, naive(world));
  const ArenaOffsets offsets = arenaOffsets(*view(one[0].get()).header);
  static_cast<std::byte*>(one[0].get())[offsets.entries - 1] = std::byte{1};  // behind the last copy
  EXPECT_TRUE(planEqual(one[0].get(), other[0].get()));
  static_cast<std::byte*>(one[0].get())[offsets.entries] = std::byte{7};
  EXPECT_FALSE(planEqual(one[0].get(), other[0].get()));
}

TEST(PlanPrint, Text) {
  const World world = twoNodes();
  const std::vector<Arena> arenas = planAll(world, naive(world));
  EXPECT_EQ(printText(arenas[0].get(), 1),
            "plan of rank 0 of 2 (node 0 of 2): 2 tokens, top-2 of 4 experts, expert order, dedup node\n"
            "  sends 3 copies with 4 entries, 0 dropped; receives 1 rows for 2 experts; " +
                std::to_string(arenas[0].bytes) +
                " bytes\n"
                "  local expert 0: rows 0 to 0\n"
                "  local expert 1: rows 0 to 1\n"
                "  flow 0: node 0 by forwarder 0, lane 0: copies 0 to 1\n"
                "    token 0 -> [rank 0 slot 1 row 0 weight 0.25]\n"
                "  flow 1: node 1 by forwarder 1, lane 0: copies 1 to 3\n"
                "    token 0 -> [rank 0 slot 0 row 1 weight 0.5]\n"
                "    ... 1 more\n");
}

TEST(PlanPrint, JsonHoldsAll) {
  for (unsigned seed = 1; seed <= 50; ++seed) {
    std::mt19937 random(seed);
    const World world = randomWorld(random);
    const std::vector<Arena> arenas = planAll(world, naive(world));
    for (const Arena& arena : arenas) {
      const View plan = view(arena.get());
      const std::string text = printJson(arena.get());
      const auto json = nlohmann::ordered_json::parse(text);
      ASSERT_EQ(text, json.dump()) << "as a library for JSON writes it";
      ASSERT_EQ(json["ranks"], plan.header->ranks);
      ASSERT_EQ(json["entries"], plan.header->entries);
      ASSERT_EQ(json["rows_of_key"].size(), json["row_base_of_key"].size());
      ASSERT_EQ(json["local_expert_start"].size(), plan.header->localExperts + 1u);
      ASSERT_EQ(json["local_expert_start"].back(), plan.localExpertStart[plan.header->localExperts]);
      std::int64_t copies = 0, entries = 0;
      for (const auto& flow : json["flow_list"]) {
        for (const auto& copy : flow["copies"]) {
          ASSERT_EQ(copy["token"], plan.copies[copies++].token);
          for (const auto& entry : copy["entries"]) {
            ASSERT_EQ(entry[2], plan.entries[entries].row);
            ASSERT_EQ(entry[3], plan.weights[entries]);
            ASSERT_EQ(entry[4], (plan.entries[entries].slot & kDuplicate) != 0);
            ++entries;
          }
        }
      }
      ASSERT_EQ(copies, plan.header->copies);
      ASSERT_EQ(entries, plan.header->entries);
    }
  }
}

}  // namespace
}  // namespace fusco::plan::testing
