// Each process captures its calls in a graph of its own and replays it.
#include <signal.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <thread>

#include "gpu/processes.h"

namespace fusco::test {
namespace {

// A rank's plan, dispatch and combine, on a stream of their own.
class ShuffleOfRank {
 public:
  static constexpr int kTopk = 6, kExperts = 12;
  static constexpr std::size_t kElements = 640, kRowBytes = kElements * sizeof(float);

  ShuffleOfRank(Rank& self, int tokens) : self_(self), most_(static_cast<std::size_t>(tokens)) {
    c_.ranks = self.ranks();
    c_.experts = kExperts;
    c_.topk = kTopk;
    c_.capacityRows = tokens * kTopk;
    rows_ = static_cast<std::size_t>(c_.capacityRows);
    input_ = std::make_unique<GpuBytes>(space_, most_ * kRowBytes);
    output_ = std::make_unique<GpuBytes>(space_, rows_ * kRowBytes);
    combined_ = std::make_unique<GpuBytes>(space_, most_ * kRowBytes);
    ids_ = std::make_unique<GpuBytes>(space_, rows_ * 8);
    weights_ = std::make_unique<GpuBytes>(space_, rows_ * 4);
    tokens_ = std::make_unique<GpuBytes>(space_, 8);
    newRouting(0);
    space_.settle();
  }
  ~ShuffleOfRank() {
    cudaStreamSynchronize(space_.stream());
    if (plan_ != nullptr) fuscoPlanDestroy(plan_);
  }
  cudaStream_t stream() { return space_.stream(); }
  void settle() { space_.settle(); }

  void plan(fuscoComm_t comm, int dedup) {
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = ids_->there();
    config.weights = static_cast<const float*>(weights_->there());
    config.tokens = static_cast<std::int64_t>(most_);
    config.tokensOnDevice = static_cast<const std::int64_t*>(tokens_->there());
    config.topk = kTopk;
    config.experts = kExperts;
    config.capacityRows = c_.capacityRows;
    config.capacityPolicy = fuscoCapacityDrop;
    config.dedup = dedup;
    if (plan_ != nullptr) FUSCO_OK(fuscoPlanDestroy(plan_));
    plan_ = nullptr;
    FUSCO_OK(fuscoPlanCreate(&plan_, &config, comm, stream()));
  }
  void dispatch() { FUSCO_OK(fuscoDispatch(plan_, input_->there(), output_->there(), kRowBytes, stream())); }
  void combine() {
    FUSCO_OK(fuscoCombine(plan_, output_->there(), combined_->there(), kElements, fuscoFloat32, stream()));
  }
  void all(fuscoComm_t comm, int dedup) {
    plan(comm, dedup);
    dispatch();
    combine();
  }
  void writeToOutputLate() {
    CUDA_OK(cudaLaunchHostFunc(
        stream(), [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }, nullptr));
    CUDA_OK(cudaMemsetAsync(output_->there(), 0x5a, rows_ * kRowBytes, stream()));
  }

  // The same on all ranks.
  void newRouting(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    c_.tokens.clear(), c_.ids.clear(), c_.weights.clear();
    for (int r = 0; r < c_.ranks; ++r) {
      c_.tokens.push_back(static_cast<std::int64_t>(random() % (most_ + 1)));
      std::vector<std::int64_t> ids;
      std::vector<float> weights;
      for (std::int64_t i = 0; i < c_.tokens.back() * kTopk; ++i) {
        ids.push_back(static_cast<std::int64_t>(random() % (kExperts + 1)) - 1);
        weights.push_back(static_cast<float>(random() % 100) / 64.0f);
      }
      c_.ids.push_back(std::move(ids));
      c_.weights.push_back(std::move(weights));
    }
    c_.seed = seed;
    const auto me = static_cast<std::size_t>(self_.rank());
    std::memcpy(tokens_->here.data(), &c_.tokens[me], 8);
    if (c_.tokens[me] > 0) {
      std::memcpy(ids_->here.data(), c_.ids[me].data(), c_.ids[me].size() * 8);
      std::memcpy(weights_->here.data(), c_.weights[me].data(), c_.weights[me].size() * 4);
    }
    for (std::int64_t token = 0; token < c_.tokens[me]; ++token) {
      const std::vector<float> row = rowOf(self_.rank(), token);
      std::memcpy(input_->here.data() + static_cast<std::size_t>(token) * kRowBytes, row.data(), kRowBytes);
    }
    std::fill(output_->here.begin(), output_->here.end(), std::uint8_t{0xa5});
    for (GpuBytes* bytes : {tokens_.get(), ids_.get(), weights_.get(), input_.get(), output_.get()}) bytes->send();
  }

  std::string wrong() {
    output_->fetch();
    combined_->fetch();
    for (const Arrival& a : expectedAt(c_, self_.rank()).arrivals) {
      const std::vector<float> row = rowOf(a.source, a.token);
      if (std::memcmp(output_->here.data() + static_cast<std::size_t>(a.row) * kRowBytes, row.data(), kRowBytes) != 0)
        return "row " + std::to_string(a.row) + " is not that of rank " + std::to_string(a.source);
    }
    // What had no room at its expert is left out of the sum.
    const auto me = static_cast<std::size_t>(self_.rank());
    std::vector<double> factor(static_cast<std::size_t>(c_.tokens[me]), 0);
    for (int r = 0; r < c_.ranks; ++r) {
      for (const Arrival& a : expectedAt(c_, r).arrivals) {
        if (a.source == self_.rank())
          factor[static_cast<std::size_t>(a.token)] +=
              static_cast<double>(c_.weights[me][static_cast<std::size_t>(a.token * kTopk + a.slot)]);
      }
    }
    for (std::size_t token = 0; token < factor.size(); ++token) {
      const std::vector<float> row = rowOf(self_.rank(), static_cast<std::int64_t>(token));
      for (std::size_t i = 0; i < kElements; ++i) {
        float got;
        std::memcpy(&got, combined_->here.data() + token * kRowBytes + 4 * i, 4);
        const double wanted = factor[token] * static_cast<double>(row[i]);
        if (!(std::abs(static_cast<double>(got) - wanted) <= 1e-4)) {
          return "token " + std::to_string(token) + " element " + std::to_string(i) + " is " + std::to_string(got) +
                 ", expected " + std::to_string(wanted);
        }
      }
    }
    return "";
  }

 private:
  std::vector<float> rowOf(int rank, std::int64_t token) const {
    std::vector<float> row(kElements);
    for (std::size_t i = 0; i < kElements; ++i)
      row[i] =
          static_cast<float>(
              (c_.seed * 31 + static_cast<std::uint64_t>(rank) * 7 + static_cast<std::uint64_t>(token) * 3 + i) % 512) /
          256.0f;
    return row;
  }

  Rank& self_;
  GpuSpace space_;
  Case c_;
  const std::size_t most_;  // tokens
  std::size_t rows_ = 0;
  std::unique_ptr<GpuBytes> input_, output_, combined_, ids_, weights_, tokens_;
  fuscoPlan_t plan_ = nullptr;
};

// What `calls` launch from the first stream on, which other streams may have been forked from and joined.
class GraphOfRank {
 public:
  template <typename Calls>
  GraphOfRank(cudaStream_t stream, const Calls& calls) : stream_(stream) {
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    calls();
    cudaGraph_t captured = nullptr;
    CUDA_OK(cudaStreamEndCapture(stream, &captured));
    CUDA_OK(cudaGraphGetNodes(captured, nullptr, &nodes_));
    const cudaError_t error = cudaGraphInstantiate(&graph_, captured, 0);
    cudaGraphDestroy(captured);
    CUDA_OK(error);
  }
  ~GraphOfRank() {
    cudaStreamSynchronize(stream_);
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }
  GraphOfRank(const GraphOfRank&) = delete;
  GraphOfRank& operator=(const GraphOfRank&) = delete;
  void launch() { CUDA_OK(cudaGraphLaunch(graph_, stream_)); }
  std::size_t nodes() const { return nodes_; }

 private:
  const cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
  std::size_t nodes_ = 0;
};

// Several launches one behind the other, and nobody waits between them, each time with new routing.
void replay(Rank& self, GraphOfRank& graph, std::uint64_t times, std::initializer_list<ShuffleOfRank*> shuffles) {
  for (std::uint64_t replay = 1; replay <= times; ++replay) {
    for (ShuffleOfRank* shuffle : shuffles) shuffle->newRouting(replay);
    for (ShuffleOfRank* shuffle : shuffles) shuffle->settle();
    for (std::uint64_t k = 0; k < 1 + replay % 3; ++k) graph.launch();
    CUDA_OK(cudaDeviceSynchronize());
    for (ShuffleOfRank* shuffle : shuffles) {
      const std::string wrong = shuffle->wrong();
      if (!wrong.empty()) throw std::runtime_error("replay " + std::to_string(replay) + ": " + wrong);
    }
    self.barrier();
  }
}

// Three processes as on GPUs of their own, with a communicator.
void runApart(const std::function<void(Rank& self, fuscoComm_t comm)>& body) {
  const World world{"three, apart", 3, 1, {}, true, 16384};
  for (const std::string& text : runRanks(
           world,
           [&](Rank& self) {
             apartFromNow();
             fuscoComm_t comm = self.connect(0, onGpu(self));
             body(self, comm);
             self.barrier();
             FUSCO_OK(fuscoCommDestroy(comm));
           },
           60))
    EXPECT_EQ(text, "");
}

// Small routing maps, which processes bring each other, and larger ones. With something between planning and dispatch
// on some of the ranks, the GPUs of all meet once more.
TEST_F(GpuProcesses, EachReplaysItsGraph) {
  runApart([](Rank& self, fuscoComm_t comm) {
    const bool writes = self.rank() % 2 != 0;
    for (const int tokens : {96, 400}) {
      std::map<std::pair<int, bool>, std::size_t> nodes;
      for (const bool between : {false, true}) {
        for (const int dedup : {fuscoDedupAuto, fuscoDedupFull, fuscoDedupNone}) {
          ShuffleOfRank shuffle(self, tokens);
          GraphOfRank graph(shuffle.stream(), [&] {
            shuffle.plan(comm, dedup);
            if (between && writes) shuffle.writeToOutputLate();
            shuffle.dispatch();
            shuffle.combine();
          });
          nodes[{dedup, between}] = graph.nodes();
          replay(self, graph, 6, {&shuffle});
        }
      }
#if CUDART_VERSION >= 12030
      const std::size_t meeting = 1, own = writes ? 2 : 0;
      if (nodes[{fuscoDedupNone, true}] != nodes[{fuscoDedupNone, false}] + own + meeting)
        throw std::runtime_error("a dispatch that follows its planning has met the other GPUs");
#endif
    }
  });
}

// Two micro-batches on streams of their own, one operation of each in turn: a slot's operations are of both.
TEST_F(GpuProcesses, EachReplaysTwoBranches) {
  runApart([](Rank& self, fuscoComm_t comm) {
    for (const int tokens : {96, 400}) {
      for (const int dedup : {fuscoDedupFull, fuscoDedupNone}) {
        ShuffleOfRank a(self, tokens), b(self, tokens);
        cudaEvent_t event = nullptr;
        CUDA_OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        const auto follow = [&](cudaStream_t first, cudaStream_t second) {
          CUDA_OK(cudaEventRecord(event, first));
          CUDA_OK(cudaStreamWaitEvent(second, event, 0));
        };
        GraphOfRank graph(a.stream(), [&] {
          follow(a.stream(), b.stream());
          a.plan(comm, dedup);
          b.plan(comm, dedup);
          a.dispatch();
          b.dispatch();
          a.combine();
          b.combine();
          follow(b.stream(), a.stream());
        });
        replay(self, graph, 6, {&a, &b});
        CUDA_OK(cudaEventDestroy(event));
      }
    }
  });
}

// Sends and receives of each process in a graph of its own, beside others that are not captured.
TEST_F(GpuProcesses, EachReplaysItsTransfers) {
  runApart([](Rank& self, fuscoComm_t comm) {
    int captures = 0;
    FUSCO_OK(fuscoCommCapturesTransfers(comm, &captures));
    REQUIRE(captures == 1);
    constexpr std::size_t kMost = 40000;
    const auto ranks = static_cast<std::size_t>(self.ranks());
    const auto bytesBetween = [](int from, int to) {
      return static_cast<std::size_t>((from * 7 + to * 13) % 5) * 9001;  // some send nothing
    };
    const auto byteOf = [](int from, int to, std::size_t at, int round) {
      return static_cast<std::uint8_t>(from * 31 + to * 17 + static_cast<int>(at) * 3 + round * 5);
    };
    GpuSpace space;
    GpuBytes out(space, ranks * kMost), in(space, ranks * kMost);
    const auto all = [&] {
      FUSCO_OK(fuscoGroupStart());
      for (int peer = 0; peer < self.ranks(); ++peer) {
        auto* there = static_cast<std::uint8_t*>(out.there()) + static_cast<std::size_t>(peer) * kMost;
        auto* here = static_cast<std::uint8_t*>(in.there()) + static_cast<std::size_t>(peer) * kMost;
        // In two messages: the second one's rows are contiguous with the first one's.
        const std::size_t sent = bytesBetween(self.rank(), peer), got = bytesBetween(peer, self.rank());
        FUSCO_OK(fuscoSend(there, sent / 3, fuscoUint8, peer, comm, space.stream()));
        FUSCO_OK(fuscoSend(there + sent / 3, sent - sent / 3, fuscoUint8, peer, comm, space.stream()));
        FUSCO_OK(fuscoRecv(here, got / 3, fuscoUint8, peer, comm, space.stream()));
        FUSCO_OK(fuscoRecv(here + got / 3, got - got / 3, fuscoUint8, peer, comm, space.stream()));
      }
      FUSCO_OK(fuscoGroupEnd());
    };
    const auto send = [&](int round) {
      for (int peer = 0; peer < self.ranks(); ++peer) {
        for (std::size_t i = 0; i < bytesBetween(self.rank(), peer); ++i)
          out.here[static_cast<std::size_t>(peer) * kMost + i] = byteOf(self.rank(), peer, i, round);
      }
      std::fill(in.here.begin(), in.here.end(), std::uint8_t{0xa5});
      out.send(), in.send();
    };
    const auto expect = [&](int round) {
      in.fetch();
      for (int peer = 0; peer < self.ranks(); ++peer) {
        for (std::size_t i = 0; i < kMost; ++i) {
          const std::uint8_t wanted = i < bytesBetween(peer, self.rank()) ? byteOf(peer, self.rank(), i, round) : 0xa5;
          if (in.here[static_cast<std::size_t>(peer) * kMost + i] != wanted)
            throw std::runtime_error("round " + std::to_string(round) + ": byte " + std::to_string(i) + " of rank " +
                                     std::to_string(peer));
        }
      }
    };
    send(0);
    all();
    expect(0);
    CUDA_OK(cudaStreamBeginCapture(space.stream(), cudaStreamCaptureModeGlobal));
    all();
    cudaGraph_t captured = nullptr;
    CUDA_OK(cudaStreamEndCapture(space.stream(), &captured));
    cudaGraphExec_t graph = nullptr;
    CUDA_OK(cudaGraphInstantiate(&graph, captured, 0));
    CUDA_OK(cudaGraphDestroy(captured));
    for (int round = 1; round <= 12; ++round) {
      send(round);
      for (int k = 0; k < 1 + round % 3; ++k) CUDA_OK(cudaGraphLaunch(graph, space.stream()));
      expect(round);
      send(100 + round);
      all();
      expect(100 + round);
    }
    CUDA_OK(cudaGraphExecDestroy(graph));
  });
}

// A rank that does not come costs the others its time-out once, however often their kernels would wait for it.
TEST_F(GpuProcesses, KernelsWaitInVainOnce) {
  constexpr int kTimeoutMs = 1500;
  const std::vector<std::string> ends = runRanks(
      {"three, apart, one is late", 3, 1, {}, true, 16384},
      [&](Rank& self) {
        apartFromNow();
        fuscoConfig_t config = onGpu(self);
        config.operationTimeoutMs = kTimeoutMs;
        fuscoComm_t comm = self.connect(0, config);
        {
          ShuffleOfRank shuffle(self, 96);
          GraphOfRank graph(shuffle.stream(), [&] {
            for (int i = 0; i < 3; ++i) shuffle.all(comm, fuscoDedupNone);
          });
          shuffle.newRouting(1);
          graph.launch();
          shuffle.settle();
          self.barrier();
          if (self.rank() != 2) {
            const auto begin = std::chrono::steady_clock::now();
            graph.launch();
            shuffle.settle();
            const auto took = std::chrono::steady_clock::now() - begin;
            REQUIRE(took > std::chrono::milliseconds(kTimeoutMs * 9 / 10));
            REQUIRE(took < std::chrono::milliseconds(2 * kTimeoutMs));
            fuscoResult_t state = fuscoSuccess;
            FUSCO_OK(fuscoCommGetAsyncError(comm, &state));
            REQUIRE(state == fuscoRemoteError);
          }
          self.barrier();
        }
        fuscoCommAbort(comm);
      },
      60);
  for (const std::string& text : ends) EXPECT_EQ(text, "");
}

// Kernels that wait for a process that has died end, though nobody calls the library.
TEST_F(GpuProcesses, KernelsDoNotWaitForADeadRank) {
  const World world{"three, apart, one is killed", 3, 1, {}, true, 16384};
  const std::vector<std::string> ends = runRanks(
      world,
      [](Rank& self) {
        apartFromNow();
        fuscoComm_t comm = self.connect(0, onGpu(self));
        {
          ShuffleOfRank shuffle(self, 96);
          GraphOfRank graph(shuffle.stream(), [&] { shuffle.all(comm, fuscoDedupAuto); });
          shuffle.newRouting(1);
          graph.launch();
          shuffle.settle();
          self.barrier();
          if (self.rank() == 2) kill(getpid(), SIGKILL);
          const auto begin = std::chrono::steady_clock::now();
          graph.launch();
          shuffle.settle();
          REQUIRE(std::chrono::steady_clock::now() - begin < std::chrono::seconds(5));
          fuscoResult_t state = fuscoSuccess;
          FUSCO_OK(fuscoCommGetAsyncError(comm, &state));
          REQUIRE(state == fuscoRemoteError);
          requireContains(fuscoGetLastError(comm), "rank 2");
        }
        FUSCO_OK(fuscoCommDestroy(comm));
        CUDA_OK(cudaDeviceSynchronize());
      },
      60);
  expectLastKilled(ends);
}

}  // namespace
}  // namespace fusco::test
