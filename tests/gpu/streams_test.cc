// Several streams, default streams, captures with branches, and plans that are gone before what was launched for them.
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <thread>

#include "gpu/space.h"

namespace fusco::test {
namespace {

constexpr int kRanks = 4, kTopk = 4, kExperts = 24;
constexpr std::size_t kRowBytes = 64;

int gpus() { return gpuOfRank(kRanks - 1, kRanks) + 1; }

// Ranks on all GPUs, which one thread drives.
class Node {
 public:
  Node() : comms_(gpuComms(kRanks)) {
    for (int gpu = 0; gpu < gpus(); ++gpu) {
      CUDA_OK(cudaSetDevice(gpu));
      spaces_.push_back(std::make_unique<GpuSpace>());
    }
    CUDA_OK(cudaSetDevice(0));
  }
  ~Node() {
    for (const fuscoComm_t comm : comms_) fuscoCommDestroy(comm);
  }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;
  fuscoComm_t comm(int rank) const { return comms_[static_cast<std::size_t>(rank)]; }
  GpuSpace& space(int rank) const { return *spaces_[static_cast<std::size_t>(gpuOfRank(rank, kRanks))]; }
  void settle() const {
    for (int gpu = 0; gpu < gpus(); ++gpu) {
      CUDA_OK(cudaSetDevice(gpu));
      CUDA_OK(cudaDeviceSynchronize());
    }
    CUDA_OK(cudaSetDevice(0));
  }

 private:
  const std::vector<fuscoComm_t> comms_;
  std::vector<std::unique_ptr<GpuSpace>> spaces_;
};

// A stream for each GPU.
class Streams {
 public:
  Streams() {
    for (int gpu = 0; gpu < gpus(); ++gpu) {
      CUDA_OK(cudaSetDevice(gpu));
      streams_.push_back(nullptr);
      CUDA_OK(cudaStreamCreateWithFlags(&streams_.back(), cudaStreamNonBlocking));
    }
    CUDA_OK(cudaSetDevice(0));
  }
  ~Streams() {
    for (const cudaStream_t stream : streams_) cudaStreamDestroy(stream);
  }
  Streams(const Streams&) = delete;
  Streams& operator=(const Streams&) = delete;
  cudaStream_t operator()(int rank) const { return streams_[static_cast<std::size_t>(gpuOfRank(rank, kRanks))]; }
  // All of these come after what is on `stream`, or it after all of these.
  void follow(cudaStream_t stream) const {
    const cudaEvent_t event = recorded(0, stream);
    for (std::size_t gpu = 0; gpu < streams_.size(); ++gpu) {
      if (streams_[gpu] != stream) CUDA_OK(cudaStreamWaitEvent(streams_[gpu], event, 0));
    }
    CUDA_OK(cudaEventDestroy(event));
  }
  void lead(cudaStream_t stream) const {
    for (std::size_t gpu = 0; gpu < streams_.size(); ++gpu) {
      if (streams_[gpu] == stream) continue;
      const cudaEvent_t event = recorded(static_cast<int>(gpu), streams_[gpu]);
      CUDA_OK(cudaStreamWaitEvent(stream, event, 0));
      CUDA_OK(cudaEventDestroy(event));
    }
  }

 private:
  static cudaEvent_t recorded(int gpu, cudaStream_t stream) {
    cudaEvent_t event = nullptr;
    CUDA_OK(cudaSetDevice(gpu));
    CUDA_OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    CUDA_OK(cudaEventRecord(event, stream));
    CUDA_OK(cudaSetDevice(0));
    return event;
  }
  std::vector<cudaStream_t> streams_;
};

// One shuffle of all ranks: its plans, its tensors, and what is to come of it.
class Shuffle {
 public:
  Shuffle(const Node& node, std::uint64_t seed, std::int64_t tokens, bool exact = false) : node_(node), exact_(exact) {
    c_.seed = seed;
    c_.ranks = kRanks;
    c_.experts = kExperts;
    c_.topk = kTopk;
    c_.rowBytes = kRowBytes;
    std::mt19937_64 random(seed);
    for (int r = 0; r < kRanks; ++r) {
      std::vector<std::int64_t> ids;
      for (std::int64_t i = 0; i < tokens * kTopk; ++i)
        ids.push_back(std::uniform_int_distribution<std::int64_t>(-1, kExperts - 1)(random));
      c_.tokens.push_back(tokens);
      c_.weights.emplace_back(ids.size(), 1.0f);
      c_.ids.push_back(std::move(ids));
    }
    c_.capacityRows = tokens * kTopk * kRanks;
    plans_.assign(kRanks, nullptr);
    for (int r = 0; r < kRanks; ++r) {
      const auto at = static_cast<std::size_t>(r);
      GpuSpace& space = node.space(r);
      const auto rows = static_cast<std::size_t>(c_.capacityRows);
      ids_.push_back(std::make_unique<GpuBytes>(space, c_.ids[at].size() * 8));
      std::memcpy(ids_[at]->here.data(), c_.ids[at].data(), c_.ids[at].size() * 8);
      ids_[at]->send();
      input_.push_back(std::make_unique<GpuBytes>(space, static_cast<std::size_t>(tokens) * kRowBytes));
      for (std::int64_t t = 0; t < tokens; ++t)
        fillRow(seed, 0, r, t, input_[at]->here.data() + static_cast<std::size_t>(t) * kRowBytes, kRowBytes);
      input_[at]->send();
      output_.push_back(std::make_unique<GpuBytes>(space, rows * kRowBytes));
      std::fill(output_[at]->here.begin(), output_[at]->here.end(), std::uint8_t{0xa5});
      output_[at]->send();
    }
  }
  ~Shuffle() { destroyPlans(); }
  Shuffle(const Shuffle&) = delete;
  Shuffle& operator=(const Shuffle&) = delete;

  template <typename StreamOf>  // of a rank
  void plan(const StreamOf& stream, bool tickets = false) {
    FUSCO_OK(fuscoGroupStart());
    for (int r = 0; r < kRanks; ++r) {
      const auto at = static_cast<std::size_t>(r);
      fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
      config.expertIds = ids_[at]->there();
      config.tokens = c_.tokens[at];
      config.topk = kTopk;
      config.experts = kExperts;
      config.tickets = tickets ? 1 : 0;
      config.dedup = c_.seed % 2 == 0 ? fuscoDedupAuto : fuscoDedupFull;
      if (!exact_) {
        config.capacityRows = c_.capacityRows;
        config.capacityPolicy = fuscoCapacityDrop;
      }
      FUSCO_OK(fuscoPlanCreate(&plans_[at], &config, node_.comm(r), stream(r)));
    }
    FUSCO_OK(fuscoGroupEnd());
  }
  template <typename StreamOf>
  void dispatch(const StreamOf& stream) {
    FUSCO_OK(fuscoGroupStart());
    for (int r = 0; r < kRanks; ++r) {
      const auto at = static_cast<std::size_t>(r);
      FUSCO_OK(fuscoDispatch(plans_[at], input_[at]->there(), output_[at]->there(), kRowBytes, stream(r)));
    }
    FUSCO_OK(fuscoGroupEnd());
  }
  void destroyPlans() {
    for (fuscoPlan_t& plan : plans_) {
      if (plan != nullptr) FUSCO_OK(fuscoPlanDestroy(plan));
      plan = nullptr;
    }
  }
  fuscoPlan_t planOf(int rank) const { return plans_[static_cast<std::size_t>(rank)]; }
  void poison() {
    for (const auto& output : output_) {
      std::fill(output->here.begin(), output->here.end(), std::uint8_t{0xa5});
      output->send();
    }
  }
  void fetch() {
    for (const auto& output : output_) output->fetch();
  }
  GpuBytes& output(int rank) { return *output_[static_cast<std::size_t>(rank)]; }
  // Of what was fetched.
  std::string wrong() const {
    std::uint8_t row[kRowBytes];
    for (int r = 0; r < kRanks; ++r) {
      const std::uint8_t* output = output_[static_cast<std::size_t>(r)]->here.data();
      for (const Arrival& a : expectedAt(c_, r).arrivals) {
        fillRow(c_.seed, 0, a.source, a.token, row, kRowBytes);
        if (std::memcmp(output + static_cast<std::size_t>(a.row) * kRowBytes, row, kRowBytes) == 0) continue;
        std::ostringstream text;
        text << "shuffle " << c_.seed << ": row " << a.row << " of rank " << r << " is not token " << a.token
             << " of rank " << a.source;
        return text.str();
      }
    }
    return "";
  }
  const Case& shape() const { return c_; }

 private:
  const Node& node_;
  const bool exact_;
  Case c_;
  std::vector<fuscoPlan_t> plans_;
  std::vector<std::unique_ptr<GpuBytes>> ids_, input_, output_;
};

// Several, each on streams of its own.
struct SideBySide {
  SideBySide(const Node& node, int count, std::uint64_t seed, const std::function<std::int64_t(int)>& tokens) {
    for (int i = 0; i < count; ++i) {
      streams.push_back(std::make_unique<Streams>());
      shuffles.push_back(std::make_unique<Shuffle>(node, seed + static_cast<std::uint64_t>(i), tokens(i)));
    }
    node.settle();
  }
  std::size_t count() const { return shuffles.size(); }
  void plan(std::size_t at) { shuffles[at]->plan(*streams[at]); }
  void dispatch(std::size_t at) { shuffles[at]->dispatch(*streams[at]); }
  void poison(const Node& node) {
    for (auto& shuffle : shuffles) shuffle->poison();
    node.settle();
  }
  std::string wrong(const Node& node) {
    node.settle();
    std::string text;
    for (auto& shuffle : shuffles) {
      shuffle->fetch();
      if (text.empty()) text = shuffle->wrong();
    }
    return text;
  }
  std::vector<std::unique_ptr<Streams>> streams;
  std::vector<std::unique_ptr<Shuffle>> shuffles;
};

class Graph {
 public:
  explicit Graph(cudaStream_t stream) {
    CUDA_OK(cudaStreamEndCapture(stream, &graph_));
    CUDA_OK(cudaGraphInstantiate(&exec_, graph_, 0));
  }
  ~Graph() {
    cudaGraphExecDestroy(exec_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) { CUDA_OK(cudaGraphLaunch(exec_, stream)); }
  std::size_t edges() const {
    std::size_t count = 0;
#if CUDART_VERSION >= 13000
    CUDA_OK(cudaGraphGetEdges(graph_, nullptr, nullptr, nullptr, &count));
#elif CUDART_VERSION >= 12030
    CUDA_OK(cudaGraphGetEdges_v2(graph_, nullptr, nullptr, nullptr, &count));
#endif
    return count;
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

void CUDART_CB sleepHere(void*) { std::this_thread::sleep_for(std::chrono::milliseconds(100)); }

class GpuStreams : public GpuTest {};

// Planning counts in memory of an operation slot: whoever has it next comes after, also on another stream.
TEST_F(GpuStreams, ManyMayPlanAndDispatchSideBySide) {
  const Node node;
  SideBySide many(node, 7, 100, [](int i) { return i % 2 == 0 ? 3000 : 700; });
  for (std::size_t round = 0; round < 20; ++round) {
    many.poison(node);
    for (std::size_t i = 0; i < many.count(); ++i) many.plan((i * 3 + round) % many.count());
    for (std::size_t at = 0; at < many.count(); ++at) {
      many.dispatch(at);
      many.shuffles[at]->destroyPlans();
    }
    ASSERT_EQ(many.wrong(node), "") << "round " << round;
  }
}

// A dispatch right behind its planning, or with the next planning between them.
TEST_F(GpuStreams, BranchesOfACaptureMayPlanAndDispatchSideBySide) {
  const Node node;
  for (const std::size_t between : {0, 1, 2}) {
    for (const std::int64_t tokens : {60, 2500}) {
      SideBySide branches(node, 5, 200, [&](int) { return tokens; });
      const cudaStream_t first = (*branches.streams[0])(0);
      CUDA_OK(cudaStreamBeginCapture(first, cudaStreamCaptureModeGlobal));
      for (auto& branch : branches.streams) branch->follow(first);
      for (std::size_t at = 0; at < branches.count() + between; ++at) {
        if (at < branches.count()) branches.plan(at);
        if (at >= between) branches.dispatch(at - between);
      }
      for (auto& branch : branches.streams) branch->lead(first);
      Graph graph(first);
      for (int round = 0; round < 12; ++round) {
        branches.poison(node);
        graph.launch(first);
        ASSERT_EQ(branches.wrong(node), "") << "round " << round;
      }
    }
  }
}

// What a capture has of planning, of something between, and of dispatch.
std::unique_ptr<Graph> captured(const Streams& streams, const std::vector<std::function<void()>>& calls) {
  const cudaStream_t first = streams(0);
  CUDA_OK(cudaStreamBeginCapture(first, cudaStreamCaptureModeGlobal));
  streams.follow(first);
  for (const auto& call : calls) call();
  streams.lead(first);
  return std::make_unique<Graph>(first);
}

// A dispatch that follows its planning does not wait for the other GPUs again. What was put between them on any rank's
// stream comes first all the same: here it writes to where the rows go.
TEST_F(GpuStreams, WhatACaptureHasBetweenPlanningAndDispatchComesFirst) {
  if (gpus() == 1) GTEST_SKIP() << "all ranks are on one GPU and its stream";
  const Node node;
  const Streams streams;
  for (const std::uint64_t seed : {900, 901}) {
    Shuffle shuffle(node, seed, 60);
    node.settle();
    const auto plan = [&] { shuffle.plan(streams); };
    const auto dispatch = [&] { shuffle.dispatch(streams); };
    const auto between = [&] {
      const int late = kRanks - 1;
      CUDA_OK(cudaSetDevice(gpuOfRank(late, kRanks)));
      CUDA_OK(cudaLaunchHostFunc(streams(late), sleepHere, nullptr));
      GpuBytes& output = shuffle.output(late);
      CUDA_OK(cudaMemsetAsync(output.there(), 0x5a, output.here.size(), streams(late)));
      CUDA_OK(cudaSetDevice(0));
    };
    const auto planned = captured(streams, {plan});
    shuffle.destroyPlans();
    const auto following = captured(streams, {plan, dispatch});
    if (seed % 2 == 0) {
      // One launch a GPU, and each behind the one before on its own.
#if CUDART_VERSION >= 12030
      EXPECT_EQ(following->edges() - planned->edges(), static_cast<std::size_t>(gpus()));
#endif
    }
    shuffle.destroyPlans();
    const auto late = captured(streams, {plan, between, dispatch});
    for (Graph* graph : {following.get(), late.get()}) {
      for (int round = 0; round < 3; ++round) {
        shuffle.poison();
        node.settle();
        graph->launch(streams(0));
        node.settle();
        shuffle.fetch();
        ASSERT_EQ(shuffle.wrong(), "") << "round " << round;
      }
    }
  }
}

// The default streams of all GPUs have one handle, and are not one stream.
TEST_F(GpuStreams, TheDefaultStreamsOfSeveralGpusMeet) {
  const Node node;
  Shuffle shuffle(node, 300, 500);
  node.settle();
  const auto legacy = [](int) { return cudaStream_t{}; };
  shuffle.plan(legacy);
  shuffle.dispatch(legacy);  // the first launch of a kernel may wait for the GPU by itself
  node.settle();
  shuffle.poison();
  node.settle();
  CUDA_OK(cudaLaunchHostFunc(nullptr, sleepHere, nullptr));  // on GPU 0
  shuffle.dispatch(legacy);
  for (int r = kRanks; r-- > 0;) {  // GPU 0 last, which the others are to have waited for
    CUDA_OK(cudaSetDevice(gpuOfRank(r, kRanks)));
    GpuBytes& output = shuffle.output(r);
    CUDA_OK(cudaMemcpyAsync(output.here.data(), output.there(), output.here.size(), cudaMemcpyDefault, nullptr));
    CUDA_OK(cudaStreamSynchronize(nullptr));
  }
  CUDA_OK(cudaSetDevice(0));
  EXPECT_EQ(shuffle.wrong(), "");
}

TEST_F(GpuStreams, AStreamOfEachThreadIsRefused) {
  const Node node;
  GpuBytes ids(node.space(0), 64);
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  config.expertIds = ids.send();
  config.tokens = 2;
  config.topk = kTopk;
  config.experts = kExperts;
  fuscoPlan_t plan = nullptr;
  EXPECT_EQ(fuscoPlanCreate(&plan, &config, node.comm(0), cudaStreamPerThread), fuscoInvalidUsage);
  EXPECT_NE(std::string(fuscoGetLastError(nullptr)).find("cudaStreamPerThread"), std::string::npos)
      << fuscoGetLastError(nullptr);
}

// What a graph has of a plan outlives it; what comes next has other memory.
TEST_F(GpuStreams, AGraphOutlivesItsPlans) {
  const Node node;
  const Streams streams;
  Shuffle captured(node, 400, 200);
  node.settle();
  CUDA_OK(cudaStreamBeginCapture(streams(0), cudaStreamCaptureModeGlobal));
  streams.follow(streams(0));
  captured.plan(streams);
  captured.dispatch(streams);
  streams.lead(streams(0));
  auto graph = std::make_unique<Graph>(streams(0));
  captured.destroyPlans();
  for (int round = 0; round < 5; ++round) {
    Shuffle other(node, 410 + static_cast<std::uint64_t>(round), 200);
    other.plan(streams);
    captured.poison();
    node.settle();
    graph->launch(streams(0));
    node.settle();
    other.dispatch(streams);
    node.settle();
    captured.fetch();
    other.fetch();
    ASSERT_EQ(captured.wrong(), "");
    ASSERT_EQ(other.wrong(), "");
  }
  // When it is gone, its memory serves others.
  graph.reset();
  Shuffle last(node, 420, 200);
  last.plan(streams);
  last.dispatch(streams);
  node.settle();
  last.fetch();
  EXPECT_EQ(last.wrong(), "");
}

TEST_F(GpuStreams, APlanMayEndWhileItsStreamIsCaptured) {
  const Node node;
  const Streams streams;
  Shuffle warm(node, 500, 100), captured(node, 501, 100);
  warm.plan(streams);
  warm.dispatch(streams);
  node.settle();
  CUDA_OK(cudaStreamBeginCapture(streams(0), cudaStreamCaptureModeGlobal));
  streams.follow(streams(0));
  warm.destroyPlans();
  captured.plan(streams);
  captured.dispatch(streams);
  streams.lead(streams(0));
  Graph graph(streams(0));
  graph.launch(streams(0));
  Shuffle next(node, 502, 100);
  next.plan(streams);
  next.dispatch(streams);
  node.settle();
  captured.fetch();
  next.fetch();
  EXPECT_EQ(captured.wrong(), "");
  EXPECT_EQ(next.wrong(), "");
}

// Tickets are written by the first dispatch, which is not one that was only captured.
TEST_F(GpuStreams, ADispatchThatWasOnlyCapturedIsNotTheFirst) {
  const Node node;
  const Streams streams;
  Shuffle shuffle(node, 600, 100);
  node.settle();
  shuffle.plan(streams, true);
  node.settle();
  CUDA_OK(cudaStreamBeginCapture(streams(0), cudaStreamCaptureModeGlobal));
  streams.follow(streams(0));
  shuffle.dispatch(streams);
  streams.lead(streams(0));
  { const Graph graph(streams(0)); }
  shuffle.dispatch(streams);
  node.settle();
  shuffle.fetch();
  EXPECT_EQ(shuffle.wrong(), "");
  for (int r = 0; r < kRanks; ++r) {
    const fuscoTicket_t* there = nullptr;
    FUSCO_OK(fuscoPlanTickets(shuffle.planOf(r), &there));
    std::vector<fuscoTicket_t> tickets(static_cast<std::size_t>(shuffle.shape().capacityRows));
    node.space(r).read(tickets.data(), there, tickets.size() * sizeof(fuscoTicket_t));
    for (const Arrival& a : expectedAt(shuffle.shape(), r).arrivals) {
      const fuscoTicket_t& ticket = tickets[static_cast<std::size_t>(a.row)];
      ASSERT_TRUE(ticket.source == a.source && ticket.token == a.token) << "rank " << r << " row " << a.row;
    }
  }
}

// Each on a stream that is gone when the plan is given back.
TEST_F(GpuStreams, StreamsMayEndBeforePlans) {
  const Node node;
  for (int round = 0; round < 20; ++round) {
    Shuffle shuffle(node, 700 + static_cast<std::uint64_t>(round), 300, round % 2 == 0);
    node.settle();
    {
      const Streams streams;
      shuffle.plan(streams);
      shuffle.dispatch(streams);
    }
    shuffle.destroyPlans();
    node.settle();
    shuffle.fetch();
    ASSERT_EQ(shuffle.wrong(), "");
  }
}

// What a rank alone sees before anything was asked of the others leaves the communicator as it was.
TEST_F(GpuStreams, AWrongPointerLeavesTheCommunicatorUsable) {
  const Node node;
  const Streams streams;
  Shuffle shuffle(node, 800, 50);
  shuffle.plan(streams);
  node.settle();
  std::vector<std::uint8_t> pageable(4096);
  EXPECT_EQ(fuscoDispatch(shuffle.planOf(0), pageable.data(), shuffle.output(0).there(), kRowBytes, streams(0)),
            fuscoInvalidArgument);
  EXPECT_EQ(fuscoDispatch(shuffle.planOf(0), shuffle.output(0).there(), shuffle.output(0).there(), std::size_t{1} << 32,
                          streams(0)),
            fuscoInvalidArgument);
  shuffle.dispatch(streams);
  node.settle();
  shuffle.fetch();
  EXPECT_EQ(shuffle.wrong(), "");
}

}  // namespace
}  // namespace fusco::test
