// Counters of complete rows: a kernel on another stream reads an expert's rows as soon as its counter says that they
// are there, while the dispatch still runs.
#include <gtest/gtest.h>

#include <cstring>
#include <sstream>

#include "gpu/poll.h"
#include "gpu/space.h"

namespace fusco::test {
namespace {

std::string pollRank(fuscoComm_t comm, int rank, std::size_t rowBytes, std::size_t rowBytes2) {
  constexpr int kRanks = 2, kTopk = 4, kExperts = 16;
  constexpr std::int64_t kTokens = 3000;
  const auto expertOf = [](int source, std::int64_t token, int slot) {
    return (token * 5 + slot * 3 + source + token / 7) % kExperts;
  };
  GpuSpace space, consumer;
  GpuBytes ids(space, kTokens * kTopk * 8), input(space, kTokens * rowBytes), input2(space, kTokens * rowBytes2);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (int k = 0; k < kTopk; ++k) {
      const std::int64_t expert = expertOf(rank, t, k);
      std::memcpy(ids.here.data() + (t * kTopk + k) * 8, &expert, 8);
    }
    fillRow(5, 0, rank, t, input.here.data() + static_cast<std::size_t>(t) * rowBytes, rowBytes);
  }
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  config.expertIds = ids.send();
  config.tokens = kTokens;
  config.topk = kTopk;
  config.experts = kExperts;
  config.expertCounters = 1;
  fuscoPlan_t warm = nullptr, plan = nullptr;
  FUSCO_OK(fuscoPlanCreate(&warm, &config, comm, space.stream()));
  FUSCO_OK(fuscoPlanCreate(&plan, &config, comm, space.stream()));
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  FUSCO_OK(fuscoPlanGetInfo(plan, &info));
  fuscoPlanDeviceInfo_t device = FUSCO_PLAN_DEVICE_INFO_INIT;
  FUSCO_OK(fuscoPlanGetDeviceInfo(plan, &device));
  const auto rows = static_cast<std::size_t>(info.receiveRows);
  const auto experts = static_cast<std::size_t>(info.localExperts);
  GpuBytes output(space, rows * rowBytes), output2(space, rows * rowBytes2), sums(space, experts * 8);
  fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
  args.input = input.send();
  args.output = output.send();
  args.rowBytes = rowBytes;
  args.input2 = input2.send();
  args.output2 = output2.send();
  args.rowBytes2 = rowBytes2;
  // Kernels are loaded when they are launched first, and that waits for what runs.
  FUSCO_OK(fuscoDispatchEx(warm, &args, space.stream()));
  space.settle();
  args.output = output.send();
  CUDA_OK(launchPoll({}, consumer.stream()));
  consumer.settle();
  Poll poll{};
  const volatile std::uint64_t* counters = nullptr;
  FUSCO_OK(fuscoPlanExpertCounters(plan, &counters));
  poll.counters = const_cast<const std::uint64_t*>(counters);
  poll.rows = device.localExpertRows;
  poll.starts = device.localExpertStart;
  poll.experts = info.localExperts;
  poll.tensor = static_cast<const std::uint32_t*>(args.output);
  poll.rowWords = rowBytes / 4;
  poll.sums = static_cast<std::uint64_t*>(sums.send());
  space.settle();
  CUDA_OK(launchPoll(poll, consumer.stream()));
  FUSCO_OK(fuscoDispatchEx(plan, &args, space.stream()));
  consumer.settle();
  space.settle();
  sums.fetch();
  std::vector<std::uint64_t> expected(experts, 0);
  std::vector<std::uint8_t> row(rowBytes);
  for (int source = 0; source < kRanks; ++source) {
    for (std::int64_t t = 0; t < kTokens; ++t) {
      fillRow(5, 0, source, t, row.data(), rowBytes);
      std::uint64_t sum = 0;
      for (std::size_t i = 0; i < rowBytes; i += 4) {
        std::uint32_t word;
        std::memcpy(&word, row.data() + i, 4);
        sum += word;
      }
      for (int k = 0; k < kTopk; ++k) {
        const std::int64_t local = expertOf(source, t, k) - info.firstExpert;
        if (local >= 0 && local < info.localExperts) expected[static_cast<std::size_t>(local)] += sum;
      }
    }
  }
  std::ostringstream wrong;
  for (std::size_t e = 0; e < experts; ++e) {
    std::uint64_t got;
    std::memcpy(&got, sums.here.data() + 8 * e, 8);
    if (got != expected[e]) wrong << "rank " << rank << ": expert " << e << " was read as " << got << "; ";
  }
  FUSCO_OK(fuscoPlanDestroy(plan));
  FUSCO_OK(fuscoPlanDestroy(warm));
  return wrong.str();
}

class GpuCounters : public GpuTest {};

TEST_F(GpuCounters, RowsAreThereWhenTheyAreCounted) {
  for (const std::size_t rowBytes : {std::size_t{14336}, std::size_t{1000}}) {
    for (const std::string& text :
         runGpuRanks(2, [&](fuscoComm_t comm, int rank) { return pollRank(comm, rank, rowBytes, 64); }))
      EXPECT_EQ(text, "");
  }
}

}  // namespace
}  // namespace fusco::test
