// What a communicator on a GPU holds beyond the caller's tensors: no more than fuscoWorkspaceSize says, and at least
// nine tenths of that.
#include <gtest/gtest.h>

#include <cstring>

#include "gpu/space.h"

namespace fusco::test {
namespace {

struct Shape {
  int ranks;
  std::int64_t tokens;
  int topk, experts, layout;
  bool capacity, tickets;
};

void PrintTo(const Shape& shape, std::ostream* out) {
  *out << shape.ranks << "_ranks_" << shape.tokens << "_tokens_layout_" << shape.layout
       << (shape.capacity ? "_capacity" : "");
}

class GpuMemory : public GpuTest, public ::testing::WithParamInterface<Shape> {};

std::string held(const Shape& shape, fuscoComm_t comm, int rank) {
  constexpr std::size_t kRowBytes = 256;
  const auto slots = static_cast<std::size_t>(shape.tokens * shape.topk);
  GpuSpace space;
  GpuBytes ids(space, slots * 8);
  for (std::size_t i = 0; i < slots; ++i) {
    const std::int64_t expert = (static_cast<std::int64_t>(i) * 5 + rank) % shape.experts;
    std::memcpy(ids.here.data() + 8 * i, &expert, 8);
  }
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  config.expertIds = ids.send();
  config.tokens = shape.tokens;
  config.topk = shape.topk;
  config.experts = shape.experts;
  config.layout = shape.layout;
  config.tickets = shape.tickets;
  config.dedup = fuscoDedupNode;  // what rows that cross a link once need is not in the formula
  if (shape.layout == fuscoLayoutSlotted) config.maxTokens = shape.tokens;
  if (shape.capacity) config.capacityRows = shape.tokens * shape.ranks;
  if (shape.capacity) config.capacityPolicy = fuscoCapacityDrop;
  const std::int64_t local = (shape.experts + shape.ranks - 1) / shape.ranks;
  const std::int64_t rows = shape.layout == fuscoLayoutSlotted ? local * shape.ranks * shape.tokens
                            : shape.capacity                   ? config.capacityRows
                                                               : shape.tokens * shape.topk * shape.ranks;
  GpuBytes input(space, static_cast<std::size_t>(shape.tokens) * kRowBytes);
  GpuBytes output(space, static_cast<std::size_t>(rows) * kRowBytes);
  input.send();
  fuscoPlan_t plan = nullptr;
  FUSCO_OK(fuscoPlanCreate(&plan, &config, comm, space.stream()));
  for (int run = 0; run < 2; ++run) {
    FUSCO_OK(fuscoDispatch(plan, input.there(), output.there(), kRowBytes, space.stream()));
    FUSCO_OK(fuscoCombine(plan, output.there(), input.there(), kRowBytes / 2, fuscoBfloat16, space.stream()));
  }
  space.settle();
  fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
  FUSCO_OK(fuscoCommGetStatistics(comm, &statistics));
  fuscoConfig_t onGpu = FUSCO_CONFIG_INIT;
  onGpu.device = fuscoDeviceCuda;
  std::size_t bytes = 0;
  FUSCO_OK(fuscoWorkspaceSize(&onGpu, &config, shape.ranks, 1, kRowBytes, 0, &bytes));
  FUSCO_OK(fuscoPlanDestroy(plan));
  const std::string text = "held " + std::to_string(statistics.workspaceBytes) + ", formula " + std::to_string(bytes);
  if (rank == 0)
    std::printf("%lld tokens, layout %d: %s\n", static_cast<long long>(shape.tokens), shape.layout, text.c_str());
  const auto most = static_cast<double>(statistics.workspaceBytes) * 1.1;
  return bytes >= statistics.workspaceBytes && static_cast<double>(bytes) <= most ? "" : text;
}

TEST_P(GpuMemory, IsWhatTheFormulaSays) {
  const Shape shape = GetParam();
  for (const std::string& text :
       runGpuRanks(shape.ranks, [&](fuscoComm_t comm, int rank) { return held(shape, comm, rank); }))
    EXPECT_EQ(text, "");
}

INSTANTIATE_TEST_SUITE_P(Shapes, GpuMemory,
                         ::testing::Values(Shape{4, 4096, 8, 64, fuscoLayoutExpertOrder, false, false},
                                           Shape{8, 1024, 8, 256, fuscoLayoutExpertOrder, true, true},
                                           Shape{4, 128, 8, 64, fuscoLayoutSlotted, false, false},
                                           Shape{4, 4096, 8, 64, fuscoLayoutRankOrder, true, false},
                                           Shape{2, 16, 2, 8, fuscoLayoutExpertOrder, false, false}));

}  // namespace
}  // namespace fusco::test
