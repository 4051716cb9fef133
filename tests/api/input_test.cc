// What is wrong with an argument is said, nothing is moved, and the communicator stays usable.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "api/worlds.h"

namespace fusco::test {
namespace {

constexpr std::size_t kHuge = std::numeric_limits<std::size_t>::max() / 2;

TEST(Input, idOutOfRangeIsNamedWhereItIs) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    for (const std::int64_t bad : {8, -2, 1 << 30}) {
      Routing routing(5, 3, 8);
      if (self.rank() == 1) routing.ids[2 * 3 + 1] = bad;
      auto* plan = reinterpret_cast<fuscoPlan_t>(1);
      const std::string text =
          EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoInvalidArgument);
      REQUIRE(plan == nullptr);
      if (self.rank() == 1) {
        requireContains(text, "token 2");
        requireContains(text, "slot 1");
        requireContains(text, std::to_string(bad));
      } else {
        requireContains(text, "rank 1");
      }
      shuffleWorks(self, comm);
    }
    leave(comm);
  });
}

// Without a count round only the rank itself sees its ids.
TEST(Input, idOutOfRangeInTheSlottedLayout) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(5, 2, 8);
    routing.config.layout = fuscoLayoutSlotted;
    routing.config.maxTokens = 5;
    if (self.rank() == 1) routing.ids[7] = 9;
    fuscoPlan_t plan = nullptr;
    if (self.rank() == 1) {
      requireContains(EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoInvalidArgument),
                      "token 3");
    } else {
      FUSCO_OK(fuscoPlanCreate(&plan, &routing.config, comm, nullptr));
      FUSCO_OK(fuscoPlanDestroy(plan));
    }
    shuffleWorks(self, comm);
    leave(comm);
  });
}

Case plainCase(int ranks, const std::vector<std::int64_t>& tokens, int topk, int experts,
               const std::function<std::int64_t(int, std::int64_t, int)>& id) {
  Case c = randomCase(1, ranks);
  c.seed = 12;
  c.experts = experts;
  c.topk = topk;
  c.layout = fuscoLayoutExpertOrder;
  c.dedup = fuscoDedupAuto;
  c.alignment = 1;
  c.zeroFill = 0;
  c.capacityRows = 0;
  c.maxTokens = 0;
  c.tokens = tokens;
  for (int r = 0; r < ranks; ++r) {
    const std::int64_t count = tokens[static_cast<std::size_t>(r)];
    auto& ids = c.ids[static_cast<std::size_t>(r)];
    ids.clear();
    for (std::int64_t t = 0; t < count; ++t) {
      for (int k = 0; k < topk; ++k) ids.push_back(id(r, t, k));
    }
    c.weights[static_cast<std::size_t>(r)].assign(static_cast<std::size_t>(count * topk), 0.75f);
  }
  return c;
}

TEST(Input, edgesThatAreLegal) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    const int n = self.ranks();
    const auto all = [&](std::int64_t tokens) {
      return std::vector<std::int64_t>(static_cast<std::size_t>(n), tokens);
    };
    std::vector<std::int64_t> some = all(0);
    some.back() = 17;
    const std::vector<Case> cases = {
        plainCase(n, all(0), 2, 8, [](int, std::int64_t, int) { return 0; }),              // no tokens anywhere
        plainCase(n, some, 2, 8, [](int, std::int64_t t, int k) { return (t + k) % 8; }),  // tokens on one rank only
        plainCase(n, all(9), 3, 8, [](int, std::int64_t, int) { return -1; }),             // nothing is routed
        plainCase(n, all(9), 3, 8, [](int, std::int64_t, int) { return 7; }),  // one expert, three times a token
        plainCase(n, all(9), 1, 1, [](int, std::int64_t, int) { return 0; }),  // fewer experts than ranks
        plainCase(n, all(1), 64, 100,
                  [](int r, std::int64_t, int k) { return (r * 31 + k * 7) % 100; }),  // a wide top-k
        plainCase(n, all(33), 2, 5,
                  [](int r, std::int64_t t, int k) { return (r + 2 * t + k) % 5; }),  // experts do not divide
    };
    for (const Case& c : cases) {
      const std::string wrong = runRank(c, comm, self.rank());
      REQUIRE(wrong.empty() || (std::fputs((wrong + "\n").c_str(), stderr), false));
    }
    leave(comm);
  });
}

TEST(Input, capacityErrorSaysWhatIsNeeded) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(6, 1, self.ranks());
    for (auto& id : routing.ids) id = 1;  // all to rank 1
    routing.config.capacityRows = 5;
    fuscoPlan_t plan = nullptr;
    const std::string text = EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoInvalidArgument);
    requireContains(text, "rank 1 needs " + std::to_string(6 * self.ranks()) + " rows, has 5");
    routing.config.capacityRows = 6 * self.ranks();
    plan = routing.make(comm);
    FUSCO_OK(fuscoPlanDestroy(plan));
    shuffleWorks(self, comm);
    leave(comm);
  });
}

// NaN, infinities and every other pattern arrive bit by bit.
TEST(Input, rowsAreBytes) {
  runWell(kProcesses, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(64, 2, 4);
    fuscoPlan_t plan = routing.make(comm);
    std::vector<std::uint32_t> in(64 * 16), out(static_cast<std::size_t>(receiveRows(plan)) * 16);
    for (std::size_t i = 0; i < in.size(); ++i)
      in[i] = 0x7f800000u + static_cast<std::uint32_t>(i % 16 * 0x10001 + i / 16);
    FUSCO_OK(fuscoDispatch(plan, in.data(), out.data(), 64, nullptr));
    std::size_t found = 0;
    for (std::size_t row = 0; row < out.size() / 16; ++row) {
      for (std::size_t i = 0; i < 16; ++i) found += (out[row * 16 + i] - 0x7f800000u - i * 0x10001) < 64;
    }
    REQUIRE(found == out.size());
    FUSCO_OK(fuscoPlanDestroy(plan));
    leave(comm);
  });
}

TEST(Input, argumentsOfPlansAreChecked) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    const auto refused = [&](auto change, const char* says) {
      Routing routing(4, 2, 8);
      change(routing.config);
      fuscoPlan_t plan = nullptr;
      requireContains(EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoInvalidArgument), says);
    };
    refused([](fuscoPlanConfig_t& c) { c.tokens = -1; }, "tokens is -1");
    refused([](fuscoPlanConfig_t& c) { c.topk = 0; }, "topk is 0");
    refused([](fuscoPlanConfig_t& c) { c.experts = 0; }, "experts is 0");
    refused([](fuscoPlanConfig_t& c) { c.experts = -5; }, "experts is -5");
    refused([](fuscoPlanConfig_t& c) { c.expertIds = nullptr; }, "expertIds is NULL");
    refused([](fuscoPlanConfig_t& c) { c.idType = fuscoFloat32; }, "expertIds are");
    refused([](fuscoPlanConfig_t& c) { c.layout = 3; }, "layout 3");
    refused([](fuscoPlanConfig_t& c) { c.alignment = 0; }, "alignment is 0");
    refused([](fuscoPlanConfig_t& c) { c.capacityRows = -1; }, "capacityRows is -1");
    refused([](fuscoPlanConfig_t& c) { c.dedup = 9; }, "dedup 9");
    refused([](fuscoPlanConfig_t& c) { c.layout = fuscoLayoutSlotted; }, "maxTokens");
    refused([](fuscoPlanConfig_t& c) { c.magic = 1; }, "magic");
    refused([](fuscoPlanConfig_t& c) { c.size = 0; }, "size 0");
    refused([](fuscoPlanConfig_t& c) { c.size += 8; }, "newer");
    // Shapes beyond the formats' 32 bits are refused before memory is asked for.
    refused([](fuscoPlanConfig_t& c) { c.tokens = std::int64_t{1} << 40; }, "tokens");
    refused([](fuscoPlanConfig_t& c) { c.capacityRows = std::int64_t{1} << 40; }, "capacity");
    refused(
        [](fuscoPlanConfig_t& c) {
          c.alignment = 1 << 30;
          c.experts = 1 << 10;
        },
        "2^31");
    EXPECT_CODE(fuscoPlanCreate(nullptr, nullptr, comm, nullptr), fuscoInvalidArgument);
    shuffleWorks(self, comm);
    leave(comm);
  });
}

TEST(Input, tensorsAreChecked) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(8, 1, self.ranks());
    fuscoPlan_t plan = routing.make(comm);
    const auto rows = static_cast<std::size_t>(receiveRows(plan));
    std::vector<float> memory(4096), other(4096), third(4096), fourth(4096);
    const auto dispatch = [&](auto change, const char* says) {
      fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
      args.input = memory.data();
      args.output = other.data();
      args.rowBytes = 64;
      change(args);
      requireContains(EXPECT_CODE(fuscoDispatchEx(plan, &args, nullptr), fuscoInvalidArgument), says);
      requireContains(EXPECT_CODE(fuscoDispatchStart(plan, &args, nullptr), fuscoInvalidArgument), says);
    };
    dispatch([](fuscoDispatchArgs_t& a) { a.input = nullptr; }, "input is NULL");
    dispatch([](fuscoDispatchArgs_t& a) { a.output = nullptr; }, "output is NULL");
    dispatch([](fuscoDispatchArgs_t& a) { a.rowBytes = 0; }, "rowBytes is 0");
    dispatch([](fuscoDispatchArgs_t& a) { a.rowBytes = kHuge; }, "rowBytes");
    dispatch([](fuscoDispatchArgs_t& a) { a.rowBytes2 = 8; }, "input2 is NULL");
    dispatch([&](fuscoDispatchArgs_t& a) { a.rowBytes2 = 8, a.input2 = third.data(); }, "output2 is NULL");
    dispatch([&](fuscoDispatchArgs_t& a) { a.rowBytes2 = kHuge, a.input2 = third.data(), a.output2 = fourth.data(); },
             "rowBytes2");
    dispatch([&](fuscoDispatchArgs_t& a) { a.output = memory.data() + 4; }, "overlap");
    dispatch([&](fuscoDispatchArgs_t& a) { a.rowBytes2 = 64, a.input2 = third.data(), a.output2 = third.data() + 3; },
             "overlap");
    dispatch([&](fuscoDispatchArgs_t& a) { a.rowBytes2 = 64, a.input2 = third.data(), a.output2 = other.data() + 3; },
             "overlap");
    dispatch([&](fuscoDispatchArgs_t& a) { a.rowBytes2 = 64, a.input2 = third.data(), a.output2 = memory.data() + 3; },
             "overlap");
    dispatch([&](fuscoDispatchArgs_t& a) { a.cast = 7; }, "cast 7");
    dispatch(
        [&](fuscoDispatchArgs_t& a) {
          a.cast = fuscoCastBf16ToFp8e4m3, a.rowBytes = 128, a.outputScales = third.data();
        },
        "multiple of 128");
    dispatch([&](fuscoDispatchArgs_t& a) { a.cast = fuscoCastBf16ToFp8e4m3, a.rowBytes = 256; },
             "outputScales is NULL");
    dispatch([&](fuscoDispatchArgs_t& a) { a.magic = 0; }, "magic");
    dispatch([&](fuscoDispatchArgs_t& a) { a.size = 4; }, "size 4");
    const auto combine = [&](auto change, const char* says) {
      fuscoCombineArgs_t args = FUSCO_COMBINE_INIT;
      args.input = memory.data();
      args.output = other.data();
      args.elements = 16;
      args.datatype = fuscoFloat32;
      change(args);
      requireContains(EXPECT_CODE(fuscoCombineEx(plan, &args, nullptr), fuscoInvalidArgument), says);
    };
    combine([](fuscoCombineArgs_t& a) { a.input = nullptr; }, "input is NULL");
    combine([](fuscoCombineArgs_t& a) { a.output = nullptr; }, "output is NULL");
    combine([](fuscoCombineArgs_t& a) { a.elements = 0; }, "elements is 0");
    combine([](fuscoCombineArgs_t& a) { a.elements = kHuge; }, "elements");
    combine([](fuscoCombineArgs_t& a) { a.datatype = fuscoInt32; }, "cannot be summed");
    combine([](fuscoCombineArgs_t& a) { a.datatype = static_cast<fuscoDataType_t>(15); }, "15");
    combine([&](fuscoCombineArgs_t& a) { a.output = memory.data() + 1; }, "overlap");
    combine([&](fuscoCombineArgs_t& a) { a.magic = 0; }, "magic");
    const auto backward = [&](auto change, const char* says) {
      fuscoCombineBackwardArgs_t args = FUSCO_COMBINE_BACKWARD_INIT;
      args.outputGradient = memory.data();
      args.expertRows = other.data();
      args.inputGradient = third.data();
      args.weightGradient = fourth.data();
      args.elements = 16;
      args.datatype = fuscoFloat32;
      change(args);
      requireContains(EXPECT_CODE(fuscoCombineBackward(plan, &args, nullptr), fuscoInvalidArgument), says);
    };
    backward([](fuscoCombineBackwardArgs_t& a) { a.outputGradient = nullptr; }, "NULL");
    backward([](fuscoCombineBackwardArgs_t& a) { a.weightGradient = nullptr; }, "NULL");
    backward([](fuscoCombineBackwardArgs_t& a) { a.inputGradient = nullptr; }, "NULL");
    backward([](fuscoCombineBackwardArgs_t& a) { a.elements = 0; }, "elements is 0");
    backward([&](fuscoCombineBackwardArgs_t& a) { a.inputGradient = other.data() + 1; }, "overlap");
    backward([&](fuscoCombineBackwardArgs_t& a) { a.inputGradient = memory.data() + 1; }, "overlap");
    REQUIRE(rows > 0);
    FUSCO_OK(fuscoPlanDestroy(plan));
    shuffleWorks(self, comm);
    leave(comm);
  });
}

TEST(Input, transfersAreChecked) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    std::vector<std::uint8_t> memory(256);
    const std::int32_t negative[] = {0, -1};
    const std::int64_t far[] = {std::int64_t{1} << 60};
    EXPECT_CODE(fuscoSend(nullptr, 1, fuscoInt8, 0, comm, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoRecv(nullptr, 1, fuscoInt8, 0, comm, nullptr), fuscoInvalidArgument);
    requireContains(EXPECT_CODE(fuscoSend(memory.data(), kHuge, fuscoFloat32, 0, comm, nullptr), fuscoInvalidArgument),
                    "overflow");
    requireContains(EXPECT_CODE(fuscoSend(memory.data(), static_cast<std::size_t>(-1), fuscoInt8, 0, comm, nullptr),
                                fuscoInvalidArgument),
                    "overflow");
    requireContains(
        EXPECT_CODE(fuscoSend(memory.data(), 1, fuscoInt8, self.ranks(), comm, nullptr), fuscoInvalidArgument),
        "peer is");
    requireContains(EXPECT_CODE(fuscoRecv(memory.data(), 1, fuscoInt8, -1, comm, nullptr), fuscoInvalidArgument),
                    "peer is -1");
    EXPECT_CODE(fuscoRecv(memory.data(), 1, static_cast<fuscoDataType_t>(15), 0, comm, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoGatherSend(memory.data(), 2, 8, negative, fuscoInt32, 0, comm, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoGatherSend(memory.data(), 1, 8, far, fuscoInt64, 0, comm, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoScatterRecv(memory.data(), 1, 8, far, fuscoFloat32, 0, comm, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoGatherSend(memory.data(), kHuge, 8, nullptr, fuscoInt32, 0, comm, nullptr), fuscoInvalidArgument);
    const std::vector<std::size_t> counts(2, 8), displacements{0, 8}, huge(2, kHuge);
    const auto all = [&](const void* in, const std::size_t* sends, void* out, const std::size_t* receives) {
      return fuscoAllToAllv(in, sends, displacements.data(), out, receives, displacements.data(), fuscoFloat32, comm,
                            nullptr);
    };
    std::vector<float> in(64), out(64);
    requireContains(EXPECT_CODE(all(in.data(), counts.data(), in.data() + 4, counts.data()), fuscoInvalidArgument),
                    "overlap");
    EXPECT_CODE(all(nullptr, counts.data(), out.data(), counts.data()), fuscoInvalidArgument);
    EXPECT_CODE(all(in.data(), counts.data(), nullptr, counts.data()), fuscoInvalidArgument);
    EXPECT_CODE(all(in.data(), huge.data(), out.data(), counts.data()), fuscoInvalidArgument);
    EXPECT_CODE(all(in.data(), nullptr, out.data(), counts.data()), fuscoInvalidArgument);
    const std::vector<std::size_t> none(2, 0);
    FUSCO_OK(all(nullptr, none.data(), nullptr, none.data()));
    FUSCO_OK(fuscoGroupStart());
    FUSCO_OK(fuscoSend(nullptr, 0, fuscoInt8, self.rank(), comm, nullptr));
    FUSCO_OK(fuscoRecv(nullptr, 0, fuscoInt8, self.rank(), comm, nullptr));
    FUSCO_OK(fuscoGatherSend(nullptr, 0, 16, nullptr, fuscoInt32, 1 - self.rank(), comm, nullptr));
    FUSCO_OK(fuscoScatterRecv(nullptr, 0, 16, nullptr, fuscoInt64, 1 - self.rank(), comm, nullptr));
    FUSCO_OK(fuscoGroupEnd());
    shuffleWorks(self, comm);
    leave(comm);
  });
}

// All ranks get InvalidUsage, with both values. In one node the communicator stays usable.
TEST(Input, ranksThatDisagreeAreToldBothValues) {
  for (const World& world : {kThreads, kProcesses, kStaged}) {
    runWell(world, [](Rank& self) {
      fuscoComm_t comm = self.connect();
      const bool odd = self.rank() == 1;
      // "rank 0 has experts 8, rank 1 has 9", the own value first.
      const auto both = [&](const std::string& text, const std::string& what, const std::string& zero,
                            const std::string& one) {
        requireContains(text, odd ? "rank 1 has " + what + " " + one + ", rank 0 has " + zero
                                  : "rank 0 has " + what + " " + zero + ", rank 1 has " + one);
      };
      const auto plans = [&](auto change, const char* what, const char* zero, const char* one) {
        Routing routing(4, 2, 8);
        if (odd) change(routing.config);
        fuscoPlan_t plan = nullptr;
        const std::string text = EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoInvalidUsage);
        both(text, what, zero, one);
      };
      plans([](fuscoPlanConfig_t& c) { c.experts = 9; }, "experts", "8", "9");
      plans([](fuscoPlanConfig_t& c) { c.topk = 1; }, "topk", "2", "1");
      plans([](fuscoPlanConfig_t& c) { c.layout = fuscoLayoutRankOrder; }, "layout", "0", "1");
      plans([](fuscoPlanConfig_t& c) { c.alignment = 4; }, "alignment", "1", "4");
      plans([](fuscoPlanConfig_t& c) { c.capacityRows = 100; }, "capacity rows", "0", "100");
      Routing routing(4, 2, 8);
      fuscoPlan_t plan = routing.make(comm), second = routing.make(comm);
      const int first = 5;  // plans were tried before
      std::vector<float> in(4096), out(4096);
      std::string text =
          EXPECT_CODE(fuscoDispatch(plan, in.data(), out.data(), odd ? 48 : 64, nullptr), fuscoInvalidUsage);
      both(text, "row bytes", "64", "48");
      text = EXPECT_CODE(fuscoDispatch(odd ? plan : second, in.data(), out.data(), 64, nullptr), fuscoInvalidUsage);
      both(text, "plan", std::to_string(first + 1), std::to_string(first));
      FUSCO_OK(fuscoDispatch(plan, in.data(), out.data(), 64, nullptr));
      text = EXPECT_CODE(odd ? fuscoDispatch(plan, in.data(), out.data(), 64, nullptr)
                             : fuscoCombine(plan, in.data(), out.data(), 16, fuscoFloat32, nullptr),
                         fuscoInvalidUsage);
      both(text, "operation", "combine", "dispatch");
      text = EXPECT_CODE(fuscoCombine(plan, in.data(), out.data(), 16, odd ? fuscoBfloat16 : fuscoFloat16, nullptr),
                         fuscoInvalidUsage);
      both(text, "data type", "6", "9");
      text = EXPECT_CODE(fuscoCombine(plan, in.data(), out.data(), odd ? 16 : 8, fuscoFloat32, nullptr),
                         fuscoInvalidUsage);
      both(text, "row bytes", "32", "64");
      FUSCO_OK(fuscoPlanDestroy(plan));
      FUSCO_OK(fuscoPlanDestroy(second));
      shuffleWorks(self, comm);
      leave(comm);
    });
  }
}

// Across nodes it is found when slices arrive, and the others are told by what breaks the communicator. A new one
// works.
TEST(Input, nodesThatDisagreeAreTold) {
  for (const World& world : {kTwoNodes, kThreadNodes, kMixed}) {
    runWell(world, [](Rank& self) {
      for (int round = 0; round < 2; ++round) {
        fuscoComm_t comm = self.connect(round);
        const bool odd = self.rank() == self.ranks() - 1;
        const Routing routing(8, 2, odd && round == 0 ? 9 : 8);
        std::vector<float> in(4096), out(4096);
        fuscoPlan_t plan = nullptr;
        fuscoResult_t result = fuscoPlanCreate(&plan, &routing.config, comm, nullptr);
        // A rank that is still on its way out of the plan may meet the others' disagreement on the dispatch there.
        if (round == 1 && result == fuscoSuccess) {
          result = fuscoDispatch(plan, in.data(), out.data(), odd ? 48 : 64, nullptr);
        }
        const std::string text = fuscoGetLastError(nullptr);
        require(result == fuscoInvalidUsage, "code " + std::to_string(result) + ": " + text);
        requireContains(text, "all ranks must make the same");
        if (round == 0) requireContains(text, "experts"), requireContains(text, "8"), requireContains(text, "9");
        if (round == 1) requireContains(text, "48"), requireContains(text, "64");
        self.barrier();
        if (plan != nullptr) FUSCO_OK(fuscoPlanDestroy(plan));
        fuscoCommAbort(comm);
        self.barrier();
      }
      fuscoComm_t comm = self.connect(5);
      shuffleWorks(self, comm);
      leave(comm);
    });
  }
}

// The slotted layout has no round of its own: the first dispatch compares. Nobody waits for a time-out.
TEST(Input, slottedPlansThatDisagreeAreTold) {
  struct Difference {
    const char* name;
    void (*make)(fuscoPlanConfig_t& config);
  };
  const std::vector<Difference> differences = {{"max tokens", [](fuscoPlanConfig_t& c) { c.maxTokens = 16; }},
                                               {"experts", [](fuscoPlanConfig_t& c) { c.experts = 9; }},
                                               {"topk", [](fuscoPlanConfig_t& c) { c.topk = 1; }}};
  for (const World& world : {kThreads, kProcesses, kTwoNodes, kThreadNodes}) {
    for (const Difference& difference : differences) {
      runWell(world, [&](Rank& self) {
        fuscoComm_t comm = self.connect(0);
        Routing routing(8, 2, 8);
        routing.config.layout = fuscoLayoutSlotted;
        routing.config.maxTokens = 8;
        if (self.rank() == self.ranks() - 1) difference.make(routing.config);
        std::vector<float> in(8 * 16), out(64 * 64 * 16);
        fuscoPlan_t plan = nullptr;
        const auto start = std::chrono::steady_clock::now();
        fuscoResult_t result = fuscoPlanCreate(&plan, &routing.config, comm, nullptr);
        if (result == fuscoSuccess) result = fuscoDispatch(plan, in.data(), out.data(), 64, nullptr);
        const std::string text = fuscoGetLastError(nullptr);
        require(result == fuscoInvalidUsage,
                std::string(difference.name) + ", code " + std::to_string(result) + ": " + text);
        requireContains(text, "all ranks must make the same");
        if (!world.multiNode()) requireContains(text, difference.name);
        REQUIRE(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
        self.barrier();
        if (plan != nullptr) FUSCO_OK(fuscoPlanDestroy(plan));
        fuscoCommAbort(comm);
        self.barrier();
        comm = self.connect(5);
        shuffleWorks(self, comm);
        leave(comm);
      });
    }
  }
}

TEST(Input, handlesThatAreGoneAreRefused) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(4, 2, 8);
    fuscoPlan_t plan = routing.make(comm);
    requireContains(EXPECT_CODE(fuscoCommDestroy(comm), fuscoInvalidUsage), "plans");
    FUSCO_OK(fuscoPlanDestroy(plan));
    EXPECT_CODE(fuscoPlanDestroy(plan), fuscoInvalidArgument);
    EXPECT_CODE(fuscoPlanDestroy(nullptr), fuscoInvalidArgument);
    fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
    EXPECT_CODE(fuscoPlanGetInfo(plan, &info), fuscoInvalidArgument);
    EXPECT_CODE(fuscoDispatch(plan, nullptr, nullptr, 4, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoFinish(plan), fuscoInvalidArgument);
    leave(comm);
    EXPECT_CODE(fuscoCommDestroy(comm), fuscoInvalidArgument);
    EXPECT_CODE(fuscoCommFinalize(comm), fuscoInvalidArgument);
    EXPECT_CODE(fuscoCommAbort(comm), fuscoInvalidArgument);
    EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoSend(&plan, 1, fuscoInt8, 0, comm, nullptr), fuscoInvalidArgument);
    int n = 0;
    EXPECT_CODE(fuscoCommCount(comm, &n), fuscoInvalidArgument);
    EXPECT_CODE(fuscoCommCount(nullptr, &n), fuscoInvalidArgument);
  });
}

TEST(Input, tooManyRanksAreNamed) {
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess);
  fuscoComm_t comm = nullptr;
  EXPECT_EQ(fuscoCommInitRank(&comm, 2000000000, id, 0), fuscoInvalidArgument);
  EXPECT_NE(std::string(fuscoGetLastError(nullptr)).find("2000000000 ranks"), std::string::npos)
      << fuscoGetLastError(nullptr);
}

TEST(Input, initIsChecked) {
  runWell({"one rank", 1, 1, {}, true, 16384}, [](Rank& self) {
    const fuscoUniqueId id = self.id();
    fuscoComm_t comm = nullptr;
    EXPECT_CODE(fuscoCommInitRank(nullptr, 1, id, 0), fuscoInvalidArgument);
    EXPECT_CODE(fuscoCommInitRank(&comm, 0, id, 0), fuscoInvalidArgument);
    EXPECT_CODE(fuscoCommInitRank(&comm, 2, id, 2), fuscoInvalidArgument);
    EXPECT_CODE(fuscoCommInitRank(&comm, 2, id, -1), fuscoInvalidArgument);
    EXPECT_CODE(fuscoCommInitRank(&comm, 1, fuscoUniqueId{}, 0), fuscoInvalidArgument);
    EXPECT_CODE(fuscoGetUniqueId(nullptr), fuscoInvalidArgument);
    const auto refused = [&](auto change, const char* says) {
      fuscoConfig_t config = FUSCO_CONFIG_INIT;
      change(config);
      requireContains(EXPECT_CODE(fuscoCommInitRankConfig(&comm, 1, id, 0, &config), fuscoInvalidArgument), says);
      REQUIRE(comm == nullptr);
    };
    refused([](fuscoConfig_t& c) { c.magic = 3; }, "magic");
    refused([](fuscoConfig_t& c) { c.size = 3; }, "size 3");
    refused([](fuscoConfig_t& c) { c.size = sizeof c + 1; }, "newer");
    refused([](fuscoConfig_t& c) { c.slices = 0; }, "slices is 0");
    refused([](fuscoConfig_t& c) { c.sliceBytes = 1; }, "sliceBytes is 1");
    refused([](fuscoConfig_t& c) { c.nodeId = -7; }, "nodeId is -7");
    refused([](fuscoConfig_t& c) { c.initTimeoutMs = 0; }, "initTimeoutMs is 0");
    refused([](fuscoConfig_t& c) { c.release = [](void*, std::size_t, void*) {}; }, "allocate");
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    EXPECT_CODE(fuscoCommInitRankConfig(&comm, 1, id, 0, &config), fuscoInvalidUsage);
  });
}

// Where capacityRows is what leaves no room, maxTokens is not what to raise.
TEST(Input, slottedCapacityIsNamed) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    Routing routing(4, 2, 4);
    routing.config.layout = fuscoLayoutSlotted;
    routing.config.maxTokens = 4;
    routing.config.capacityRows = 1;
    fuscoPlan_t plan = nullptr;
    const std::string text = EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoInvalidArgument);
    requireContains(text, "capacityRows 1");
    shuffleWorks(self, comm);
    leave(comm);
  });
}

// The function stands before each text; once is enough.
TEST(Input, aFunctionIsNamedOnce) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    const std::int32_t list[] = {0, -1};
    char byte = 0;
    REQUIRE(EXPECT_CODE(fuscoGatherSend(&byte, 2, 1, list, fuscoInt32, 0, comm, nullptr), fuscoInvalidArgument) ==
            "fuscoGatherSend: row index 1 is -1, must not be negative");
    Routing routing(1, 1, 2);
    fuscoPlan_t plan = routing.make(comm);
    REQUIRE(EXPECT_CODE(fuscoFinish(plan), fuscoInvalidUsage) ==
            "fuscoFinish: nothing was started on this communicator");
    FUSCO_OK(fuscoPlanDestroy(plan));
    leave(comm);
  });
}

// What stands behind an older caller's struct is not the node that it wants for a split.
TEST(Input, anOlderConfigurationKeepsTheParentsNodes) {
  runWell(kThreadNodes, [](Rank& self) {
    fuscoComm_t comm = self.connect(), child = nullptr;
    fuscoConfig_t config = self.config();
    config.size = offsetof(fuscoConfig_t, nodeId);
    config.nodeId = 7;
    FUSCO_OK(fuscoCommSplit(comm, 0, self.rank(), &child, &config));
    int first = -1, last = -1;
    FUSCO_OK(fuscoCommNode(child, 0, &first));
    FUSCO_OK(fuscoCommNode(child, 3, &last));
    REQUIRE(first == 0 && last == 1);
    leave(child);
    leave(comm);
  });
}

// A caller that was built against an older header has shorter structs.
TEST(Input, olderStructsAreTaken) {
  runWell(kThreads, [](Rank& self) {
    fuscoConfig_t config = self.config();
    config.size = offsetof(fuscoConfig_t, maxStagingBytes);
    config.maxStagingBytes = -99;  // not the caller's
    config.allowProcessVm = -99;
    fuscoComm_t comm = self.connect(0, config);
    Routing routing(4, 2, 8);
    routing.config.size = offsetof(fuscoPlanConfig_t, expertCounters);
    routing.config.expertCounters = routing.config.tickets = 1;
    fuscoPlan_t plan = routing.make(comm);
    const fuscoTicket_t* tickets = nullptr;
    EXPECT_CODE(fuscoPlanTickets(plan, &tickets), fuscoInvalidUsage);
    fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
    info.size = offsetof(fuscoPlanInfo_t, copiesLocal);
    info.copiesLocal = -77;
    FUSCO_OK(fuscoPlanGetInfo(plan, &info));
    REQUIRE(info.tokens == 4 && info.copiesLocal == -77 && info.size == offsetof(fuscoPlanInfo_t, copiesLocal));
    fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
    statistics.size = offsetof(fuscoStatistics_t, waitNs);
    statistics.waitNs = 77;
    FUSCO_OK(fuscoCommGetStatistics(comm, &statistics));
    REQUIRE(statistics.operations > 0 && statistics.waitNs == 77);
    std::vector<std::uint8_t> in(64), out(4096, 0xa5);
    fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
    args.size = offsetof(fuscoDispatchArgs_t, input2);
    args.input = in.data();
    args.output = out.data();
    args.rowBytes = 16;
    args.rowBytes2 = 16;
    args.cast = 55;
    FUSCO_OK(fuscoDispatchEx(plan, &args, nullptr));
    REQUIRE(out[0] == 0);
    FUSCO_OK(fuscoPlanDestroy(plan));
    leave(comm);
  });
}

}  // namespace
}  // namespace fusco::test
