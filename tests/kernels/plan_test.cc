// The planning kernels against the host's planner, byte for byte.
#include <gtest/gtest.h>

#include <cstdlib>
#include <sstream>

#include "kernels/gpu_plans.h"

namespace fusco::kernels::testing {
namespace {

using plan::testing::Arena;
using plan::testing::World;

class PlanKernels : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!hasGpu()) GTEST_SKIP() << "no GPU here: cudaGetDeviceCount finds none";
  }
};

int cases(int usual) {
  const char* text = std::getenv("FUSCO_TEST_CASES");
  return text != nullptr ? std::atoi(text) : usual;
}

std::string words(const World& world, Way way, std::int64_t capacity, int blocks) {
  std::ostringstream text;
  text << describe(world) << "; way " << static_cast<int>(way) << ", arena for " << capacity << " tokens, " << blocks
       << " blocks; tokens";
  for (const auto tokens : world.tokens) text << ' ' << tokens;
  return text.str();
}

// Plans three routing maps of one shape, one after the other in the same memory.
void compareWorlds(int seed, int size) {
  std::mt19937 random(seed);
  World world = makeWorld(random, size);
  const int blocks = std::uniform_int_distribution<int>(0, 3)(random) * 40;
  std::int64_t capacity = -1;
  if (std::uniform_int_distribution<int>(0, 1)(random) != 0) {
    capacity = *std::max_element(world.tokens.begin(), world.tokens.end());
    if (world.options.layout != plan::Layout::slotted) capacity += std::uniform_int_distribution<int>(0, 50)(random);
  }
  GpuPlans plans(world, capacity, blocks);
  ASSERT_TRUE(planFits(plans.args(0))) << describe(world);
  for (int step = 0; step < 3; ++step) {
    const auto way = static_cast<Way>(std::uniform_int_distribution<int>(0, 4)(random));
    if (step > 0 && capacity >= 0) world = makeWorld(random, size, &world);
    const std::string about =
        "seed " + std::to_string(seed) + ", step " + std::to_string(step) + ": " + words(world, way, capacity, blocks);
    plans.bring(world);
    plans.plan(way);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << about;
    const std::vector<Arena> expected = hostPlans(world);
    for (int rank = 0; rank < world.topology.ranks(); ++rank) {
      ASSERT_EQ(plans.difference(rank, expected[rank].get(), expected[rank].bytes), "")
          << "rank " << rank << ", " << about;
      ASSERT_EQ(plans.status(rank).code, PlanStatus::ok) << "rank " << rank << ", " << about;
    }
  }
}

TEST_F(PlanKernels, smallWorldsAreTheHosts) {
  for (int seed = 0; seed < cases(300); ++seed) {
    ASSERT_NO_FATAL_FAILURE(compareWorlds(seed, 300));
  }
}

TEST_F(PlanKernels, worldsOfManyTilesAreTheHosts) {
  for (int seed = 0; seed < cases(300); ++seed) {
    ASSERT_NO_FATAL_FAILURE(compareWorlds(10000 + seed, 6000));
  }
}

TEST_F(PlanKernels, largeWorldsAreTheHosts) {
  for (int seed = 0; seed < cases(300) / 6; ++seed) {
    ASSERT_NO_FATAL_FAILURE(compareWorlds(20000 + seed, 60000));
  }
}

World worldOf(int ranks, int tokens, int topk, int experts) {
  World world;
  world.topology = plan::Topology(std::vector<int>(ranks, 0));
  world.topk = topk;
  world.experts = experts;
  std::mt19937 random(1);
  for (int rank = 0; rank < ranks; ++rank) {
    std::vector<std::int64_t> ids(static_cast<std::size_t>(tokens) * topk);
    for (auto& id : ids) id = std::uniform_int_distribution<int>(0, experts - 1)(random);
    world.tokens.push_back(tokens);
    world.narrow.emplace_back(ids.begin(), ids.end());
    world.weights.emplace_back(ids.size(), 0.5f);
    world.wide.push_back(std::move(ids));
  }
  return world;
}

TEST_F(PlanKernels, anIdOutOfRangeCountsAsNoneAndIsReported) {
  for (const Way way : {Way::whole, Way::together, Way::apart}) {
    for (const int tokens : {20, 700}) {
      World world = worldOf(4, tokens, 5, 9);
      GpuPlans plans(world, -1, 0);
      World bad = world;
      bad.wide[2][5 * 11 + 3] = 9;
      bad.wide[2][5 * 17 + 1] = -2;
      bad.wide[3][5 * 0 + 4] = std::int64_t{1} << 32;  // an expert in its lower half
      world.wide[2][5 * 11 + 3] = world.wide[2][5 * 17 + 1] = world.wide[3][4] = -1;
      for (const bool isBad : {true, false, true}) {
        plans.bring(isBad ? bad : world);
        plans.plan(way);
        const std::vector<Arena> expected = hostPlans(world);
        for (int rank = 0; rank < 4; ++rank) {
          EXPECT_EQ(plans.difference(rank, expected[rank].get(), expected[rank].bytes), "");
          const PlanStatus status = plans.status(rank);
          if (!isBad) {
            EXPECT_EQ(status.code, PlanStatus::ok);
          } else if (rank < 2) {
            EXPECT_EQ(status.code, PlanStatus::badIdElsewhere);
            EXPECT_EQ(status.rank, 2);
          } else {
            EXPECT_EQ(status.code, PlanStatus::badId);
            EXPECT_EQ(status.token, rank == 2 ? 11 : 0);
            EXPECT_EQ(status.slot, rank == 2 ? 3 : 4);
            EXPECT_EQ(status.id, rank == 2 ? 9 : std::int64_t{1} << 32);
          }
        }
      }
    }
  }
}

TEST_F(PlanKernels, aNumberOfTokensBeyondTheArenaSendsNothing) {
  for (const Way way : {Way::whole, Way::together}) {
    for (const std::int64_t wrong : {std::int64_t{-1}, std::int64_t{51}, std::int64_t{1} << 40}) {
      World world = worldOf(3, 50, 4, 7);
      GpuPlans plans(world, 50, 0);
      plans.bring(world);
      check(cudaMemcpy(const_cast<std::int64_t*>(plans.args(1).rank[0].tokensUsed), &wrong, sizeof wrong,
                       cudaMemcpyHostToDevice),
            "cudaMemcpy");
      plans.plan(way);
      world.tokens[1] = 0;
      const std::vector<Arena> expected = hostPlans(world);
      for (int rank = 0; rank < 3; ++rank) {
        EXPECT_EQ(plans.difference(rank, expected[rank].get(), expected[rank].bytes), "");
        EXPECT_EQ(plans.status(rank).code, rank == 1 ? PlanStatus::tooManyTokens : PlanStatus::ok);
      }
    }
  }
}

TEST_F(PlanKernels, rowsPastThirtyOneBitsLeaveAnEmptyPlan) {
  for (const Way way : {Way::whole, Way::together, Way::apart}) {
    for (const int tokens : {10, 1000}) {
      World world = worldOf(2, tokens, 4, 8);
      world.options.alignment = 1 << 30;  // four experts of a rank
      GpuPlans plans(world, -1, 0);
      plans.args(0).alignment = world.options.alignment;
      for (int i = 0; i < 2; ++i) {
        check(cudaMemset(plans.args(0).rank[i].arena, 0xab, 64), "cudaMemset");
        check(cudaMemcpy(const_cast<void*>(plans.args(0).rank[i].ids), world.wide[i].data(), world.wide[i].size() * 8,
                         cudaMemcpyHostToDevice),
              "cudaMemcpy");
      }
      plans.plan(way);
      for (int rank = 0; rank < 2; ++rank) {
        EXPECT_EQ(plans.status(rank).code, PlanStatus::tooManyRows);
        const plan::ArenaHeader header = plans.header(rank);
        EXPECT_EQ(header.copies, 0);
        EXPECT_EQ(header.entries, 0);
        EXPECT_EQ(header.receiveRows, 0);
      }
    }
  }
}

TEST_F(PlanKernels, rowsWithoutCapacityAreTold) {
  for (const int tokens : {16, 2000}) {
    World world = worldOf(2, tokens, 4, 8);
    const std::vector<Arena> exact = hostPlans(world);
    world.options.capacityRows = 30;
    GpuPlans plans(world, -1, 0);
    plans.bring(world);
    plans.plan(Way::whole);
    const std::vector<Arena> expected = hostPlans(world);
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(plans.difference(rank, expected[rank].get(), expected[rank].bytes), "");
      EXPECT_EQ(plans.status(rank).wantedRows, plan::view(exact[rank].get()).header->receiveRows);
    }
  }
}

TEST_F(PlanKernels, whatDoesNotFitIsSaid) {
  const World world = worldOf(1, 1, 1, 1);
  GpuPlans plans(world, -1, 0);
  PlanArgs args = plans.args(0);
  EXPECT_TRUE(planFits(args));
  args.topk = kMaxPlanTopk + 1;
  EXPECT_FALSE(planFits(args));
  EXPECT_EQ(launchPlan(args, nullptr), cudaErrorInvalidValue);
  args.topk = 1;
  args.experts = 60000;
  EXPECT_FALSE(planFits(args));
  EXPECT_EQ(launchPlanCount(args, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace fusco::kernels::testing
