#include "plan/frame.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "world.h"

namespace fusco::plan {
namespace {

using testing::Arena;
using testing::World;

TEST(Frame, isWhatPlansOfTheShapeHaveInCommon) {
  std::mt19937 random(5);
  for (int i = 0; i < 500; ++i) {
    const World world = testing::randomWorld(random);
    const std::vector<Arena> arenas = planAll(world, naive(world));
    for (int rank = 0; rank < world.topology.ranks(); ++rank) {
      RoutingMap shape = world.map(rank);
      shape.ids = nullptr;
      const Frame frame = makeFrame(shape, world.topology, rank, world.options);
      const View plan = view(arenas[rank].get());
      ArenaHeader head = *plan.header;
      head.tokensUsed = head.copies = head.entries = head.dropped = head.receiveRows = 0;
      ASSERT_EQ(std::memcmp(&head, &frame.header, sizeof head), 0) << describe(world);

      ASSERT_EQ(static_cast<int>(frame.homes.size()), world.experts);
      for (int expert = 0; expert < world.experts; ++expert) {
        const int home = world.topology.rankOfExpert(expert, world.experts);
        ASSERT_EQ(frame.homes[expert] & 0xffff, static_cast<std::uint32_t>(world.topology.localIndex(home)));
        ASSERT_EQ(frame.homes[expert] >> 16, static_cast<std::uint32_t>(world.topology.nodeOf(home)));
      }

      ASSERT_EQ(static_cast<int>(frame.flows.size()), head.flows) << describe(world);
      std::vector<std::uint64_t> first(world.topology.nodes(), ~0ull), copies(world.topology.nodes(), 0);
      for (int f = 0; f < head.flows; ++f) {
        const Flow& flow = plan.flows[f];
        first[flow.node] = std::min<std::uint64_t>(first[flow.node], flow.copyBegin);
        copies[flow.node] += flow.copyEnd - flow.copyBegin;
      }
      for (int f = 0; f < head.flows; ++f) {
        const Flow& flow = plan.flows[f];
        const Flow& part = frame.flows[f];
        ASSERT_EQ(part.node, flow.node);
        ASSERT_EQ(part.forwarder, flow.forwarder);
        ASSERT_EQ(part.lane, flow.lane);
        ASSERT_EQ(first[flow.node] + copies[flow.node] * part.copyBegin / 65536, flow.copyBegin) << describe(world);
        ASSERT_EQ(first[flow.node] + copies[flow.node] * part.copyEnd / 65536, flow.copyEnd) << describe(world);
      }
    }
  }
}

}  // namespace
}  // namespace fusco::plan
