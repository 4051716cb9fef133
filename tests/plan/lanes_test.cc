// How the agreed speeds of lanes follow measurements, and what the balancer makes of them.
#include "plan/lanes.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "plan/balance.h"

namespace fusco::plan {
namespace {

using Rates = std::vector<std::int64_t>;
constexpr std::int64_t kRate = 25'000'000;  // of a healthy lane, bytes a second
const Rates kSilent(2, 0);

TEST(Lanes, AreFullUntilTheyShowOtherwise) {
  LaneSpeeds lanes(2, 3);
  EXPECT_EQ(lanes.speeds(), std::vector<std::int32_t>(6, kFullSpeed));
  lanes.follow(Rates(6, 0), Rates(6, 0));
  EXPECT_EQ(lanes.speeds(), std::vector<std::int32_t>(6, kFullSpeed));
}

TEST(Lanes, AreComparedWithinTheirNodeAndDirection) {
  LaneSpeeds lanes(2, 2);
  // Node 1 is ten times slower than node 0 altogether, and takes in faster than it sends: that is no lane's fault.
  lanes.follow(Rates{kRate, kRate, kRate / 10, kRate / 10}, Rates{kRate, kRate, kRate, kRate});
  EXPECT_EQ(lanes.speeds(), std::vector<std::int32_t>(4, kFullSpeed));
  // What is clearly slow in one direction is slow if it stays so.
  lanes.follow(Rates{kRate, kRate, kRate, kRate / 16}, Rates{kRate / 4, kRate, kRate, kRate});
  EXPECT_EQ(lanes.speeds(), std::vector<std::int32_t>(4, kFullSpeed));
  lanes.follow(Rates{kRate, kRate, kRate, kRate / 8}, Rates{kRate / 4, kRate, kRate, kRate});
  EXPECT_EQ(lanes.speeds(), (std::vector<std::int32_t>{256, 1024, 1024, 128}));
}

// Rates depend on the other end of each way as well: a lane is a little slow only if both directions say so.
TEST(Lanes, AreALittleSlowIfBothDirectionsSaySo) {
  LaneSpeeds lanes(1, 4);
  for (int step = 0; step < 5; ++step) {
    lanes.follow(Rates{kRate / 2, kRate / 2, kRate, kRate / 2}, Rates{kRate, kRate / 2, kRate, 0});
  }
  EXPECT_EQ(lanes.of(0, 0), kFullSpeed);
  EXPECT_NEAR(lanes.of(0, 1), kFullSpeed / 2, kFullSpeed / 6);
  EXPECT_EQ(lanes.of(0, 2), kFullSpeed);
  EXPECT_EQ(lanes.of(0, 3), kFullSpeed);
}

TEST(Lanes, FallAtOnceAndRiseInSteps) {
  LaneSpeeds lanes(1, 2);
  lanes.follow(Rates{kRate / 10, kRate}, Rates{kRate / 10, kRate});
  EXPECT_EQ(lanes.of(0, 0), 102);
  std::vector<std::int32_t> seen;
  for (int step = 0; step < 8; ++step) {
    lanes.follow(Rates{kRate, kRate}, kSilent);
    seen.push_back(lanes.of(0, 0));
  }
  EXPECT_EQ(seen, (std::vector<std::int32_t>{153, 229, 343, 514, 771, 1024, 1024, 1024}));
}

TEST(Lanes, ALaneThatIsTooSlowToBeMeasuredIsTriedAgain) {
  LaneSpeeds lanes(1, 2);
  lanes.follow(Rates{1, kRate}, Rates{1, kRate});
  EXPECT_EQ(lanes.of(0, 0), kLeastSpeed);
  int steps = 0;
  while (lanes.of(0, 0) < kFullSpeed && steps < 100) {
    lanes.follow(Rates{0, kRate}, kSilent);
    ++steps;
  }
  EXPECT_LT(steps, 70);
  EXPECT_GT(steps, 30);
}

// A lane that shows its speed with noise: the agreed one stays near, and the noise of healthy lanes moves nothing.
TEST(Lanes, NoiseMovesNothing) {
  for (unsigned seed = 1; seed <= 50; ++seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> noise(0.88, 1.12);
    LaneSpeeds healthy(1, 4), one(1, 2);
    for (int step = 0; step < 200; ++step) {
      Rates rates, slow;
      for (int lane = 0; lane < 4; ++lane) rates.push_back(static_cast<std::int64_t>(kRate * noise(random)));
      healthy.follow(rates, Rates(4, 0));
      ASSERT_EQ(healthy.speeds(), std::vector<std::int32_t>(4, kFullSpeed)) << "seed " << seed << ", step " << step;
      slow.push_back(static_cast<std::int64_t>(0.1 * kRate * noise(random)));
      slow.push_back(static_cast<std::int64_t>(kRate * noise(random)));
      one.follow(slow, slow);
      ASSERT_NEAR(one.of(0, 0), 102, 40) << "seed " << seed << ", step " << step;
      ASSERT_EQ(one.of(0, 1), kFullSpeed);
    }
  }
}

TEST(Lanes, WaysSideBySideAddUp) {
  const auto rate = [](std::vector<LaneSample> ways) { return together(ways).bytesPerSecond; };
  EXPECT_EQ(rate({}), 0);
  EXPECT_EQ(rate({{1000, 0}}), 0);
  EXPECT_EQ(rate({{1000, 7}, {1000, 8}}), 15);
  // One of two ways is held up elsewhere: the other one had the lane for itself.
  EXPECT_EQ(rate({{1000, 100}, {1000, 900}}), 1000);
  // A small way was over soon, at the rate of a half lane: it says nothing of its own.
  EXPECT_EQ(rate({{10000, 1000}, {100, 500}}), 1010);
  EXPECT_EQ(together(std::vector<LaneSample>{{10000, 1000}, {100, 500}}).bytes, 10100);
}

// The time that a step takes is that of the busiest lane; what it could be at best: all bytes over all lanes. Lanes
// show their true speed when they have carried enough, else nothing.
struct Simulation {
  explicit Simulation(std::vector<double> speedOfLane)
      : speed(std::move(speedOfLane)),
        lanes(2, static_cast<int>(speed.size())),
        topology({0, 0, 1, 1}, lanes.lanes()) {}

  double step() {
    const int count = lanes.lanes();
    std::vector<double> carried(static_cast<std::size_t>(2 * count), 0);
    const std::vector<std::int32_t> loads = {0, 1000, 0, 1000, 1000, 0, 1000, 0};
    for (int source = 0; source < 4; ++source) {
      const int to = 1 - topology.nodeOf(source);
      for (const FlowShare& flow : topology.flowsTo(source, to)) {
        const double copies = 1000.0 * flow.share / 65536;
        carried[static_cast<std::size_t>(topology.nodeOf(source) * count + flow.lane)] += copies;
      }
    }
    double longest = 0, fastest = 0;
    Rates rates;
    for (int node = 0; node < 2; ++node) {
      for (int lane = 0; lane < count; ++lane) {
        const double through = node == 0 ? speed[static_cast<std::size_t>(lane)] : 1;
        const double copies = carried[static_cast<std::size_t>(node * count + lane)];
        longest = std::max(longest, copies / through);
        rates.push_back(copies < 5 ? 0 : static_cast<std::int64_t>(through * kRate));
        if (node == 0) fastest += through;
      }
    }
    lanes.follow(rates, rates);
    balanceFlows(topology, loads, Balance::full, &lanes);
    return longest / std::max(2000.0 / fastest, 2000.0 / count);
  }

  std::vector<double> speed;
  LaneSpeeds lanes;
  Topology topology;
};

TEST(Lanes, TrafficMovesOffASlowLaneAndComesBack) {
  for (const double slowed : {0.5, 0.1, 0.04}) {
    SCOPED_TRACE(slowed);
    Simulation cluster({1, 1});
    for (int step = 0; step < 3; ++step) EXPECT_NEAR(cluster.step(), 1, 0.02);
    cluster.speed[0] = slowed;
    EXPECT_GT(cluster.step(), 1.4);
    EXPECT_LT(cluster.step(), 1.35);
    EXPECT_LT(cluster.step(), 1.2);
    for (int step = 0; step < 20; ++step) ASSERT_LT(cluster.step(), 1.2);  // and stays: nothing oscillates
    cluster.speed[0] = 1;
    for (int step = 0; step < 10; ++step) cluster.step();
    EXPECT_LT(cluster.step(), 1.2);
  }
  // Slower than any lane is thought to be: what it keeps, to be seen, is 1/33 of the traffic.
  Simulation dead({1, 0.001});
  for (int step = 0; step < 5; ++step) dead.step();
  EXPECT_EQ(dead.lanes.of(0, 1), kLeastSpeed);
}

TEST(Lanes, EachTakesInAndSendsByItsSpeed) {
  // 3 nodes of 4 ranks, 2 lanes; lane 1 of node 0 at a quarter.
  Topology topology({0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2}, 2);
  LaneSpeeds lanes(3, 2);
  const Rates shown{4000, 1000, 4000, 4000, 4000, 4000};
  lanes.follow(shown, shown);
  std::vector<std::int32_t> loads(36, 60000);
  balanceFlows(topology, loads, Balance::full, &lanes);
  std::vector<std::int64_t> out(6, 0), in(6, 0);
  for (int source = 0; source < 12; ++source) {
    for (int node = 0; node < 3; ++node) {
      for (const FlowShare& flow : topology.flowsTo(source, node)) {
        const std::int64_t copies = 60000LL * flow.share / 65536;
        out[static_cast<std::size_t>(topology.nodeOf(source) * 2 + flow.lane)] += copies;
        in[static_cast<std::size_t>(node * 2 + laneInto(topology, flow.forwarder))] += copies;
      }
    }
  }
  for (const auto* carried : {&out, &in}) {
    const auto share = [&](int lane) {
      return static_cast<double>((*carried)[static_cast<std::size_t>(lane)]) / (8 * 60000);
    };
    EXPECT_NEAR(share(0), 0.8, 0.02);
    EXPECT_NEAR(share(1), 0.2, 0.02);
    for (int lane = 2; lane < 6; ++lane) EXPECT_NEAR(share(lane), 0.5, 0.02);
  }
}

}  // namespace
}  // namespace fusco::plan
