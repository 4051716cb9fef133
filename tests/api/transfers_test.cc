// Send, receive, all-to-all and lists of rows, in random groups, every byte checked; and groups themselves.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "api/transfer_case.h"
#include "api/worlds.h"

namespace fusco::test {
namespace {

constexpr std::uint8_t kPoison = 0x5a;

// A tensor in a window or in private memory.
class Tensor {
 public:
  Tensor(std::size_t bytes, bool window) : bytes_(bytes + 1), window_(window) {
    if (window_) {
      void* p = nullptr;
      FUSCO_OK(fuscoMemAlloc(&p, bytes_));
      data_ = static_cast<std::uint8_t*>(p);
    } else {
      data_ = static_cast<std::uint8_t*>(std::malloc(bytes_));
    }
    std::memset(data_, kPoison, bytes_);
  }
  ~Tensor() {
    if (window_) {
      fuscoMemFree(data_);
    } else {
      std::free(data_);
    }
  }
  Tensor(const Tensor&) = delete;
  std::uint8_t* data() const { return data_; }

 private:
  std::size_t bytes_;
  bool window_;
  std::uint8_t* data_;
};

void post(const Planned& t, bool send, std::uint8_t* data, fuscoComm_t comm) {
  const std::vector<std::int64_t>& list = send ? t.sendList : t.receiveList;
  const std::vector<std::int32_t> narrow(list.begin(), list.end());
  const bool listed = send ? t.sendListed : t.receiveListed;
  const void* indices = !listed ? nullptr : t.int32 ? static_cast<const void*>(narrow.data()) : list.data();
  const fuscoDataType_t type = t.int32 ? fuscoInt32 : fuscoInt64;
  if (t.plain && send) {
    FUSCO_OK(fuscoSend(data, t.bytes(), fuscoUint8, t.to, comm, nullptr));
  } else if (t.plain) {
    FUSCO_OK(fuscoRecv(data, t.bytes(), fuscoUint8, t.from, comm, nullptr));
  } else if (send) {
    FUSCO_OK(fuscoGatherSend(data, t.sendRows, t.sendRowBytes, indices, type, t.to, comm, nullptr));
  } else {
    FUSCO_OK(fuscoScatterRecv(data, t.receiveRows, t.receiveRowBytes, indices, type, t.from, comm, nullptr));
  }
}

void randomGroup(Rank& self, fuscoComm_t comm, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Planned> transfers;
  const std::size_t count = 1 + random() % 14;
  for (std::size_t i = 0; i < count; ++i) transfers.push_back(randomTransfer(random, self.ranks()));
  struct End {
    std::size_t transfer;
    bool send;
  };
  std::vector<End> ends;
  std::vector<std::unique_ptr<Tensor>> tensors;
  for (std::size_t i = 0; i < transfers.size(); ++i) {
    if (transfers[i].from == self.rank()) ends.push_back({i, true});
    if (transfers[i].to == self.rank()) ends.push_back({i, false});
  }
  // Any order of calls, as long as each ordered pair keeps its own.
  std::mt19937_64 mine(seed * 31 + static_cast<std::uint64_t>(self.rank()));
  std::vector<std::uint64_t> keyOfPair(static_cast<std::size_t>(2 * self.ranks()));
  for (auto& key : keyOfPair) key = mine();
  std::stable_sort(ends.begin(), ends.end(), [&](const End& a, const End& b) {
    const auto key = [&](const End& e) {
      const Planned& t = transfers[e.transfer];
      return keyOfPair[static_cast<std::size_t>(2 * (e.send ? t.to : t.from) + (e.send ? 1 : 0))];
    };
    return key(a) < key(b);
  });
  FUSCO_OK(fuscoGroupStart());
  for (const End& end : ends) {
    const Planned& t = transfers[end.transfer];
    tensors.push_back(std::make_unique<Tensor>(end.send ? t.sendSpan() : t.receiveSpan(), t.window));
    if (end.send) fillRow(t.seed, 0, 0, 0, tensors.back()->data(), t.sendSpan());
    post(t, end.send, tensors.back()->data(), comm);
  }
  FUSCO_OK(fuscoGroupEnd());
  for (std::size_t i = 0; i < ends.size(); ++i) {
    const Planned& t = transfers[ends[i].transfer];
    if (ends[i].send) continue;
    std::vector<std::uint8_t> sent(t.sendSpan() + 1), expected(t.receiveSpan() + 1, kPoison);
    fillRow(t.seed, 0, 0, 0, sent.data(), t.sendSpan());
    for (std::size_t at = 0; at < t.bytes(); at += t.receiveRowBytes)  // never longer than the sent rows
      std::memcpy(expected.data() + t.receiveAt(at), sent.data() + t.sendAt(at), t.receiveRowBytes);
    require(std::equal(expected.begin(), expected.end(), tensors[i]->data()),
            "seed " + std::to_string(seed) + ", transfer " + std::to_string(ends[i].transfer) + " from " +
                std::to_string(t.from) + " to " + std::to_string(t.to) + " of " + std::to_string(t.bytes()) +
                " bytes arrived");
  }
}

TEST(Transfers, randomGroups) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    for (std::uint64_t seed = 1; seed <= 120; ++seed)
      randomGroup(self, comm, seed * 100 + static_cast<std::uint64_t>(self.ranks()));
    leave(comm);
  });
}

TEST(Transfers, randomAllToAllv) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    const auto n = static_cast<std::size_t>(self.ranks());
    const auto me = static_cast<std::size_t>(self.rank());
    for (std::uint64_t seed = 1; seed <= 60; ++seed) {
      std::mt19937_64 random(seed);
      std::vector<std::size_t> counts(n * n);  // [from][to], in int32
      for (auto& c : counts) c = random() % 4 == 0 ? 0 : random() % (seed % 10 == 0 ? 30000 : 200);
      const bool window = random() % 2 == 0;
      std::vector<std::size_t> sends(n), receives(n), sendAt(n), receiveAt(n);
      std::size_t sendEnd = 3, receiveEnd = 5;
      for (std::size_t p = 0; p < n; ++p) {
        sends[p] = counts[me * n + p];
        receives[p] = counts[p * n + me];
        sendAt[p] = sendEnd;
        receiveAt[p] = receiveEnd;
        sendEnd += sends[p] + seed % 3;
        receiveEnd += receives[p] + seed % 2;
      }
      Tensor in(sendEnd * 4, window), out(receiveEnd * 4, window);
      for (std::size_t p = 0; p < n; ++p)
        fillRow(seed, static_cast<int>(p), self.rank(), 0, in.data() + sendAt[p] * 4, sends[p] * 4);
      FUSCO_OK(fuscoAllToAllv(in.data(), sends.data(), sendAt.data(), out.data(), receives.data(), receiveAt.data(),
                              fuscoInt32, comm, nullptr));
      std::vector<std::uint8_t> expected(receiveEnd * 4, kPoison);
      for (std::size_t p = 0; p < n; ++p)
        fillRow(seed, self.rank(), static_cast<int>(p), 0, expected.data() + receiveAt[p] * 4, receives[p] * 4);
      require(std::equal(expected.begin(), expected.end(), out.data()), "all-to-all of seed " + std::to_string(seed));
    }
    leave(comm);
  });
}

// Without a group: one side at a time, in an order that cannot lock.
TEST(Transfers, ring) {
  runEverywhere([](Rank& self) {
    fuscoComm_t comm = self.connect();
    const int n = self.ranks(), me = self.rank();
    std::vector<std::uint64_t> token(5000, static_cast<std::uint64_t>(me));
    for (int round = 0; round < 5; ++round) {
      if (me > 0) FUSCO_OK(fuscoRecv(token.data(), token.size(), fuscoUint64, me - 1, comm, nullptr));
      for (auto& value : token) value += 1;
      if (me + 1 < n) FUSCO_OK(fuscoSend(token.data(), token.size(), fuscoUint64, me + 1, comm, nullptr));
      if (me + 1 < n) FUSCO_OK(fuscoRecv(token.data(), token.size(), fuscoUint64, me + 1, comm, nullptr));
      if (me > 0) FUSCO_OK(fuscoSend(token.data(), token.size(), fuscoUint64, me - 1, comm, nullptr));
      for (const auto value : token) REQUIRE(value == static_cast<std::uint64_t>(n * (round + 1)));
    }
    leave(comm);
  });
}

// Sizes that differ: both ends are told both.
TEST(Transfers, sizesThatDifferAreTold) {
  for (const World& world : {kThreads, kProcesses, kStaged, kTwoNodes}) {
    for (const std::size_t sent : {std::size_t{96}, std::size_t{32}, std::size_t{100000}, std::size_t{0}}) {
      runWell(world, [sent](Rank& self) {
        fuscoComm_t comm = self.connect();
        std::vector<std::uint8_t> memory(100000);
        const fuscoResult_t result = self.rank() == 0 ? fuscoSend(memory.data(), sent, fuscoUint8, 1, comm, nullptr)
                                                      : fuscoRecv(memory.data(), 64, fuscoUint8, 0, comm, nullptr);
        // A send across nodes has completed once its bytes are on their way: it hears of the mismatch later.
        const bool oneWay = self.world().multiNode() && self.rank() == 0;
        if (!oneWay || result != fuscoSuccess) {
          const std::string text = fuscoGetLastError(nullptr);
          require(result == fuscoInvalidUsage, "code " + std::to_string(result) + ": " + text);
          requireContains(text, "rank 0 sends " + std::to_string(sent) + " bytes");
          requireContains(text, "rank 1 expects 64");
        }
        self.barrier();
        if (oneWay) {
          const std::string text =
              EXPECT_CODE(fuscoRecv(memory.data(), 1, fuscoUint8, 1, comm, nullptr), fuscoInvalidUsage);
          requireContains(text, "rank 1 expects 64");
        }
        self.barrier();
        fuscoCommAbort(comm);
        comm = self.connect(1);
        shuffleWorks(self, comm);
        leave(comm);
      });
    }
  }
}

// A row can be received once; what is sent may be named as often as one likes.
TEST(Transfers, rowsThatAreReceivedTwiceAreRefused) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    const int peer = 1 - self.rank();
    const auto exchange = [&](const std::vector<std::int64_t>& list) {
      const std::vector<std::int64_t> zeros(list.size(), 0);
      std::vector<int> in(4, self.rank() + 1), out(400000, 0);
      FUSCO_OK(fuscoGroupStart());
      fuscoGatherSend(in.data(), list.size(), 4, zeros.data(), fuscoInt64, peer, comm, nullptr);
      fuscoScatterRecv(out.data(), list.size(), 4, list.data(), fuscoInt64, peer, comm, nullptr);
      const fuscoResult_t result = fuscoGroupEnd();
      for (const std::int64_t row : list)
        REQUIRE(result != fuscoSuccess || out[static_cast<std::size_t>(row)] == peer + 1);
      return result;
    };
    // Rising, in any order, far apart; each with a row twice, side by side or not.
    for (const std::vector<std::int64_t>& good :
         {std::vector<std::int64_t>{0, 1, 5, 9}, std::vector<std::int64_t>{9, 0, 5, 1},
          std::vector<std::int64_t>{399999, 3, 70000}}) {
      REQUIRE(exchange(good) == fuscoSuccess);
      for (std::size_t i = 0; i < good.size(); ++i) {
        std::vector<std::int64_t> bad = good;
        bad.push_back(good[i]);
        REQUIRE(exchange(bad) == fuscoInvalidArgument);
        requireContains(fuscoGetLastError(nullptr), "row " + std::to_string(good[i]) + " is named twice");
      }
    }
    shuffleWorks(self, comm);
    leave(comm);
  });
}

TEST(Groups, nestAndStickToTheirErrors) {
  runWell(kThreads, [](Rank& self) {
    fuscoComm_t comm = self.connect();
    EXPECT_CODE(fuscoGroupEnd(), fuscoInvalidUsage);
    std::vector<int> in(4, self.rank()), out(4, -1);
    FUSCO_OK(fuscoGroupStart());
    FUSCO_OK(fuscoGroupStart());
    FUSCO_OK(fuscoSend(in.data(), 4, fuscoInt32, 1 - self.rank(), comm, nullptr));
    FUSCO_OK(fuscoGroupEnd());
    REQUIRE(out[0] == -1);
    FUSCO_OK(fuscoGroupStart());
    FUSCO_OK(fuscoRecv(out.data(), 4, fuscoInt32, 1 - self.rank(), comm, nullptr));
    FUSCO_OK(fuscoGroupEnd());
    FUSCO_OK(fuscoGroupEnd());
    REQUIRE(out == std::vector<int>(4, 1 - self.rank()));
    // An error inside is returned at the end; nothing of the group has run.
    FUSCO_OK(fuscoGroupStart());
    FUSCO_OK(fuscoSend(in.data(), 4, fuscoInt32, 1 - self.rank(), comm, nullptr));
    FUSCO_OK(fuscoRecv(out.data(), 4, fuscoInt32, 1 - self.rank(), comm, nullptr));
    EXPECT_CODE(fuscoSend(nullptr, 4, fuscoInt32, 0, comm, nullptr), fuscoInvalidArgument);
    requireContains(EXPECT_CODE(fuscoGroupEnd(), fuscoInvalidArgument), "NULL");
    EXPECT_CODE(fuscoGroupEnd(), fuscoInvalidUsage);
    FUSCO_OK(fuscoGroupStart());
    Routing routing(4, 2, 8);
    routing.config.layout = 55;
    fuscoPlan_t plan = nullptr;
    EXPECT_CODE(fuscoPlanCreate(&plan, &routing.config, comm, nullptr), fuscoInvalidArgument);
    EXPECT_CODE(fuscoGroupEnd(), fuscoInvalidArgument);
    // A send to oneself without its receive.
    EXPECT_CODE(fuscoSend(in.data(), 4, fuscoInt32, self.rank(), comm, nullptr), fuscoInvalidUsage);
    shuffleWorks(self, comm);
    leave(comm);
  });
}

// One thread is all ranks: joined, planned, dispatched and combined in groups.
TEST(Groups, oneThreadDrivesSeveralRanks) {
  for (const std::vector<int>& nodes : {std::vector<int>{0, 0, 0}, std::vector<int>{0, 1, 1}}) {
    runWell({"one thread", 1, 1, {}, true, 16384}, [&](Rank& self) {
      constexpr int kRanks = 3;
      const fuscoUniqueId id = self.id();
      fuscoComm_t comms[kRanks] = {};
      FUSCO_OK(fuscoGroupStart());
      for (int r = 0; r < kRanks; ++r) {
        fuscoConfig_t config = self.config();
        config.nodeId = nodes[static_cast<std::size_t>(r)];
        FUSCO_OK(fuscoCommInitRankConfig(&comms[r], kRanks, id, r, &config));
        REQUIRE(comms[r] == nullptr);
      }
      FUSCO_OK(fuscoGroupEnd());
      const Routing routing(7, 2, 6);
      fuscoPlan_t plans[kRanks] = {};
      FUSCO_OK(fuscoGroupStart());
      for (int r = 0; r < kRanks; ++r) FUSCO_OK(fuscoPlanCreate(&plans[r], &routing.config, comms[r], nullptr));
      FUSCO_OK(fuscoGroupEnd());
      std::vector<std::vector<float>> in, mid, out;
      for (int r = 0; r < kRanks; ++r) {
        in.emplace_back(7 * 8);
        for (std::size_t i = 0; i < in.back().size(); ++i)
          in.back()[i] = static_cast<float>(i) + 100.0f * static_cast<float>(r);
        mid.emplace_back(static_cast<std::size_t>(receiveRows(plans[r])) * 8);
        out.emplace_back(7 * 8);
      }
      FUSCO_OK(fuscoGroupStart());
      for (int r = 0; r < kRanks; ++r)
        FUSCO_OK(fuscoDispatch(plans[r], in[static_cast<std::size_t>(r)].data(),
                               mid[static_cast<std::size_t>(r)].data(), 32, nullptr));
      FUSCO_OK(fuscoGroupEnd());
      FUSCO_OK(fuscoGroupStart());
      for (int r = kRanks; r-- > 0;) {
        FUSCO_OK(fuscoCombine(plans[r], mid[static_cast<std::size_t>(r)].data(),
                              out[static_cast<std::size_t>(r)].data(), 8, fuscoFloat32, nullptr));
      }
      FUSCO_OK(fuscoGroupEnd());
      for (int r = 0; r < kRanks; ++r) {
        for (std::size_t i = 0; i < 7 * 8; ++i)
          REQUIRE(out[static_cast<std::size_t>(r)][i] == 2 * in[static_cast<std::size_t>(r)][i]);
        FUSCO_OK(fuscoPlanDestroy(plans[r]));
      }
      for (fuscoComm_t comm : comms) FUSCO_OK(fuscoCommDestroy(comm));
    });
  }
}

// Operations of several communicators and transfers together in one group.
TEST(Groups, communicatorsSideBySide) {
  runEverywhere([](Rank& self) {
    fuscoComm_t a = self.connect(0), b = self.connect(1);
    const Routing routing(16, 2, 8);
    fuscoPlan_t plans[2] = {routing.make(a), routing.make(b)};
    const auto rows = static_cast<std::size_t>(receiveRows(plans[0]));
    std::vector<float> in(16 * 16, 1.5f), mid[2], sent(999, static_cast<float>(self.rank())), received(999);
    const int next = (self.rank() + 1) % self.ranks(), before = (self.rank() + self.ranks() - 1) % self.ranks();
    for (int round = 0; round < 10; ++round) {
      for (auto& m : mid) m.assign(rows * 16, 0);
      FUSCO_OK(fuscoGroupStart());
      for (int k : {0, 1}) FUSCO_OK(fuscoDispatch(plans[k], in.data(), mid[k].data(), 64, nullptr));
      FUSCO_OK(fuscoSend(sent.data(), sent.size(), fuscoFloat32, next, a, nullptr));
      FUSCO_OK(fuscoRecv(received.data(), received.size(), fuscoFloat32, before, a, nullptr));
      FUSCO_OK(fuscoGroupEnd());
      REQUIRE(received == std::vector<float>(999, static_cast<float>(before)));
      for (const auto& m : mid) REQUIRE(m == std::vector<float>(rows * 16, 1.5f));
    }
    for (fuscoPlan_t plan : plans) FUSCO_OK(fuscoPlanDestroy(plan));
    leave(a);
    leave(b);
  });
}

}  // namespace
}  // namespace fusco::test
