// Numbers: the cast to FP8 against a reference in doubles, results that repeat bit by bit, partial sums in FP32, and
// counters that grow while rows arrive.
#include "shuffle/numbers.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "api/worlds.h"

namespace fusco::test {
namespace {

constexpr std::size_t kElements = 384;

// BF16 rows of all magnitudes, with zeros, subnormals, infinities and NaN here and there.
std::vector<std::uint16_t> bf16Rows(int rank, std::int64_t tokens) {
  std::vector<std::uint16_t> rows(static_cast<std::size_t>(tokens) * kElements);
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::uint16_t* row = rows.data() + static_cast<std::size_t>(t) * kElements;
    fillRow(99, 0, rank, t, reinterpret_cast<std::uint8_t*>(row), kElements * 2);
    for (std::size_t i = 0; i < kElements; ++i) {
      // Exponents near each other in most rows, so that rounding matters.
      if (t % 4 != 0) row[i] = static_cast<std::uint16_t>((row[i] & 0x83ff) | 0x3c00);
      if (t % 7 == 3 && i % 50 == 0) row[i] = 0;
      if (t % 7 == 5 && i % 60 == 0) row[i] = i % 120 == 0 ? 0x7f80 : 0xff80;
      if (t % 7 == 6 && i % 70 == 0) row[i] = 0x7fc1;
      if (t % 9 == 8) row[i] = static_cast<std::uint16_t>(row[i] & 0x80ff);  // tiny: below the floor of the scale
    }
  }
  return rows;
}

struct CastRow {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
};
CastRow castReference(const std::uint16_t* row) {
  CastRow out;
  for (std::size_t group = 0; group < kElements; group += 128) {
    std::vector<double> x(128);
    double largest = 0;
    for (std::size_t i = 0; i < 128; ++i) {
      const std::uint16_t bits = row[group + i];
      const bool special = (bits & 0x7f80) == 0x7f80;
      x[i] = !special ? decode(kBf16, bits) : (bits & 0x7f) != 0 ? NAN : (bits & 0x8000) != 0 ? -INFINITY : INFINITY;
      if (!special) largest = std::max(largest, std::fabs(x[i]));
    }
    // Both divisions are those of FP32.
    const float scale = std::max(static_cast<float>(largest), 1e-4f) / 448.0f;
    out.scales.push_back(scale);
    for (const double value : x) {
      const double quotient = static_cast<float>(value) / scale;
      if (std::isnan(quotient)) {
        out.codes.push_back(0x7f);
      } else {
        const double rounded = std::fabs(quotient) >= 448 ? std::copysign(448.0, quotient) : roundTo(kE4m3, quotient);
        out.codes.push_back(static_cast<std::uint8_t>(encode(kE4m3, rounded)));
      }
    }
  }
  return out;
}

TEST(Numbers, castToFp8BitByBit) {
  runEverywhere([](Rank& self) {
    constexpr std::int64_t kTokens = 70;
    std::vector<CastRow> cast;  // by source and token
    for (int source = 0; source < self.ranks(); ++source) {
      const std::vector<std::uint16_t> sent = bf16Rows(source, kTokens);
      for (std::size_t t = 0; t < kTokens; ++t) cast.push_back(castReference(sent.data() + t * kElements));
    }
    for (const int dedup : {fuscoDedupNone, fuscoDedupNode, fuscoDedupFull, fuscoDedupAuto}) {
      fuscoComm_t comm = self.connect(dedup);
      Routing routing(kTokens, 3, 2 * self.ranks());
      routing.config.tickets = 1;
      routing.config.dedup = dedup;
      fuscoPlan_t plan = routing.make(comm);
      const auto rows = static_cast<std::size_t>(receiveRows(plan));
      const std::vector<std::uint16_t> in = bf16Rows(self.rank(), kTokens);
      for (const bool window : {false, true}) {
        std::vector<std::uint8_t> privateRows(rows * kElements + 1);
        std::vector<float> scales(rows * kElements / 128 + 1, -1.0f);
        void* memory = nullptr;
        FUSCO_OK(fuscoMemAlloc(&memory, rows * kElements + 1));
        fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
        args.input = in.data();
        args.output = window ? memory : privateRows.data();
        args.rowBytes = kElements * 2;
        args.cast = fuscoCastBf16ToFp8e4m3;
        args.outputScales = scales.data();
        FUSCO_OK(fuscoDispatchEx(plan, &args, nullptr));
        const fuscoTicket_t* tickets = nullptr;
        FUSCO_OK(fuscoPlanTickets(plan, &tickets));
        for (std::size_t row = 0; row < rows; ++row) {
          const CastRow& expected = cast[static_cast<std::size_t>(tickets[row].source * kTokens + tickets[row].token)];
          const auto* got = static_cast<const std::uint8_t*>(args.output) + row * kElements;
          const auto [right, wrong] = std::mismatch(expected.codes.begin(), expected.codes.end(), got);
          if (right != expected.codes.end()) {
            require(false, "row " + std::to_string(row) + " element " + std::to_string(wrong - got) + " is " +
                               std::to_string(*wrong) + ", expected " + std::to_string(*right));
          }
          REQUIRE(std::memcmp(scales.data() + row * 3, expected.scales.data(), 12) == 0);
        }
        REQUIRE(scales.back() == -1.0f);
        FUSCO_OK(fuscoMemFree(memory));
      }
      FUSCO_OK(fuscoPlanDestroy(plan));
      leave(comm);
    }
  });
}

TEST(Numbers, twoRunsOfOnePlanAreBitIdentical) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    const Routing routing(64, 4, 3 * self.ranks());
    fuscoPlan_t plan = routing.make(comm);
    const auto rows = static_cast<std::size_t>(receiveRows(plan));
    std::vector<std::uint16_t> in(64 * 512), mid(rows * 512), first(64 * 512), out(64 * 512);
    fillRow(3, 0, self.rank(), 0, reinterpret_cast<std::uint8_t*>(in.data()), in.size() * 2);
    for (auto& x : in) x = static_cast<std::uint16_t>((x & 0x83ff) | 0x3c00);
    FUSCO_OK(fuscoDispatch(plan, in.data(), mid.data(), 1024, nullptr));
    FUSCO_OK(fuscoCombine(plan, mid.data(), first.data(), 512, fuscoBfloat16, nullptr));
    for (int run = 0; run < 10; ++run) {
      if (self.rank() == run % self.ranks()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (run % 2 == 0) FUSCO_OK(fuscoDispatch(plan, in.data(), mid.data(), 1024, nullptr));
      FUSCO_OK(fuscoCombine(plan, mid.data(), out.data(), 512, fuscoBfloat16, nullptr));
      REQUIRE(out == first);
    }
    FUSCO_OK(fuscoPlanDestroy(plan));
    leave(comm);
  });
}

// A partial that BF16 cannot hold: FP32 partials keep it, at twice the bytes.
TEST(Numbers, partialsInFp32) {
  runWell(kTwoNodes, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(16, 2, 4);
    for (std::size_t i = 0; i < routing.ids.size(); ++i)
      routing.ids[i] = 2 * (1 - self.rank()) + static_cast<int>(i % 2);  // all to the other node
    std::vector<float> weights(32, 1.0f);
    for (std::size_t i = 1; i < weights.size(); i += 2) weights[i] = 0x1p-9f;
    std::vector<std::uint16_t> in(16 * 128, 0x3f80), mid(32 * 128), out(16 * 128),
        bias(16 * 128, 0xbf80);  // ones, minus one
    routing.config.weights = weights.data();
    fuscoPlan_t plan = routing.make(comm);
    REQUIRE(receiveRows(plan) == 32);
    FUSCO_OK(fuscoDispatch(plan, in.data(), mid.data(), 256, nullptr));
    std::uint64_t wire[3];
    for (const int fp32 : {0, 1}) {
      fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
      FUSCO_OK(fuscoCommGetStatistics(comm, &statistics));
      wire[fp32] = statistics.wireBytes;
      fuscoCombineArgs_t args = FUSCO_COMBINE_INIT;
      args.input = mid.data();
      args.output = out.data();
      args.elements = 128;
      args.bias = bias.data();
      args.partialsFp32 = fp32;
      FUSCO_OK(fuscoCombineEx(plan, &args, nullptr));
      FUSCO_OK(fuscoCommGetStatistics(comm, &statistics));
      wire[fp32] = statistics.wireBytes - wire[fp32];
      const std::uint16_t expected = fp32 != 0 ? 0x3b00 : 0;  // 1 + 2^-9 - 1
      for (const std::uint16_t x : out) REQUIRE(x == expected);
    }
    REQUIRE(wire[1] > wire[0] * 3 / 2 && wire[1] < wire[0] * 2);
    FUSCO_OK(fuscoPlanDestroy(plan));
    leave(comm);
  });
}

// A consumer watches: counters only grow, and rows that they count are there.
TEST(Numbers, expertCountersGrowAsRowsArrive) {
  for (const World& world : {kThreads, kTwoNodes, kThreadNodes}) {
    runWell(world, [](Rank& self) {
      fuscoComm_t comm = self.connect();
      constexpr std::int64_t kTokens = 1500;
      Routing routing(kTokens, 2, 2 * self.ranks());
      routing.config.expertCounters = 1;
      fuscoPlan_t plan = routing.make(comm);
      fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
      FUSCO_OK(fuscoPlanGetInfo(plan, &info));
      const volatile std::uint64_t* counters = nullptr;
      FUSCO_OK(fuscoPlanExpertCounters(plan, &counters));
      void* memory = nullptr;
      FUSCO_OK(fuscoMemAlloc(&memory, static_cast<std::size_t>(info.receiveRows) * 4096));
      std::vector<std::uint8_t> in(kTokens * 4096, 0x77);
      for (int run = 0; run < 3; ++run) {
        fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
        args.input = in.data();
        args.output = memory;
        args.rowBytes = 4096;
        self.barrier();
        std::atomic<bool> over{false};
        std::string wrong;
        std::thread watcher([&] {
          std::vector<std::uint64_t> last(static_cast<std::size_t>(info.localExperts), 0);
          // A run begins by setting the counters to zero one by one: each may fall once, whatever the others are.
          std::vector<bool> mayFall(last.size(), run > 0);
          while (!over) {
            for (std::size_t e = 0; e < last.size(); ++e) {
              const std::uint64_t now = __atomic_load_n(&counters[e], __ATOMIC_ACQUIRE);
              if (now < last[e] && mayFall[e]) mayFall[e] = false, last[e] = 0;
              if (now < last[e])
                wrong = "a counter fell from " + std::to_string(last[e]) + " to " + std::to_string(now);
              last[e] = now;
              if (now > static_cast<std::uint64_t>(info.localExpertRows[e])) wrong = "a counter is beyond its rows";
            }
          }
        });
        const fuscoResult_t result = fuscoDispatchEx(plan, &args, nullptr);
        over = true;
        watcher.join();
        FUSCO_OK(result);
        require(wrong.empty(), wrong);
        for (int e = 0; e < info.localExperts; ++e)
          REQUIRE(counters[e] == static_cast<std::uint64_t>(info.localExpertRows[e]));
      }
      FUSCO_OK(fuscoMemFree(memory));
      FUSCO_OK(fuscoPlanDestroy(plan));
      leave(comm);
    });
  }
}

}  // namespace
}  // namespace fusco::test
