// Communicators come and go, and the GPU's memory with them.
#include <gtest/gtest.h>

#include <cstring>

#include "gpu/space.h"

namespace fusco::test {
namespace {

std::size_t freeMemory() {
  std::size_t free = 0, total = 0;
  CUDA_OK(cudaDeviceSynchronize());
  CUDA_OK(cudaMemGetInfo(&free, &total));
  return free;
}

class GpuLife : public GpuTest {};

TEST_F(GpuLife, MemoryStaysFlat) {
  const Cases some(1000, 0);
  constexpr int kRanks = 2, kTokens = 64, kTopk = 4, kExperts = 8;
  constexpr std::size_t kRowBytes = 512;
  GpuSpace space;
  std::vector<std::unique_ptr<GpuBytes>> ids, input, output;
  for (int r = 0; r < kRanks; ++r) {
    ids.push_back(std::make_unique<GpuBytes>(space, kTokens * kTopk * 8));
    for (std::int64_t i = 0; i < kTokens * kTopk; ++i) {
      const std::int64_t expert = (i * 3 + r) % kExperts;
      std::memcpy(ids.back()->here.data() + 8 * i, &expert, 8);
    }
    ids.back()->send();
    input.push_back(std::make_unique<GpuBytes>(space, kTokens * kRowBytes));
    output.push_back(std::make_unique<GpuBytes>(space, kRanks * kTokens * kTopk * kRowBytes));
  }
  space.settle();
  const auto round = [&] {
    for (const std::string& text : runGpuRanks(
             kRanks,
             [&](fuscoComm_t comm, int rank) {
               const auto at = static_cast<std::size_t>(rank);
               fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
               config.expertIds = ids[at]->there();
               config.tokens = kTokens;
               config.topk = kTopk;
               config.experts = kExperts;
               config.tickets = config.expertCounters = 1;
               fuscoPlan_t plan = nullptr;
               FUSCO_OK(fuscoPlanCreate(&plan, &config, comm, space.stream()));
               FUSCO_OK(fuscoDispatch(plan, input[at]->there(), output[at]->there(), kRowBytes, space.stream()));
               FUSCO_OK(fuscoPlanDestroy(plan));
               return std::string();
             },
             0, {}, 0, false))
      ASSERT_EQ(text, "");
  };
  const std::int64_t warm = std::min<std::int64_t>(20, some.count / 2);
  for (std::int64_t i = 0; i < warm; ++i) round();
  const std::size_t before = freeMemory();
  for (std::int64_t i = warm; i < some.count; ++i) round();
  const std::size_t after = freeMemory();
  std::printf("%lld communicators: %zu bytes free before, %zu after\n", static_cast<long long>(some.count * kRanks),
              before, after);
  // The driver hands memory out in blocks of 2 MiB.
  EXPECT_LE(before, after + (std::size_t{2} << 20));
}

}  // namespace
}  // namespace fusco::test
