// The stream driver: ranks as threads, each with a stream of its own. Plan, dispatch, experts and combine are captured
// once and replayed with new routing in the same buffers; no thread but the stream's sees a count.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <random>
#include <thread>

#include "base/clock.h"
#include "comm/world.h"
#include "engine/shuffle_world.h"
#include "engine/stream.h"

namespace fusco::engine::testing {
namespace {

using comm::testing::Kind;
using comm::testing::require;
using comm::testing::runRanks;
using plan::Layout;

constexpr int kReplays = 50;

struct Setting {
  int ranks = 2;
  std::vector<int> nodes;
  Layout layout = Layout::expertOrder;
  std::int64_t capacity = 0;  // rows; 0: as many as come
  int microBatches = 1;
};

std::string nameOf(const ::testing::TestParamInfo<Setting>& info) {
  const Setting& s = info.param;
  return std::to_string(s.ranks) + "ranks" + (s.nodes.empty() ? "1node" : "2nodes") + "layout" +
         std::to_string(static_cast<int>(s.layout)) + "capacity" + std::to_string(s.capacity) + "batches" +
         std::to_string(s.microBatches);
}

constexpr std::int64_t kTokens = 24;
constexpr int kTopk = 3;
constexpr std::size_t kElements = 33;

// The world of one step: the same shape, another routing; some steps leave ranks without tokens, some crowd one expert.
World worldOf(const Setting& setting, int step, int batch) {
  std::mt19937 random(static_cast<unsigned>(step * 2 + batch + 1));
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  World w;
  w.topology = plan::Topology(setting.nodes.empty() ? std::vector<int>(static_cast<std::size_t>(setting.ranks), 0)
                                                    : setting.nodes);
  w.topk = kTopk;
  w.experts = 3 * setting.ranks - 1;
  w.options.layout = setting.layout;
  w.options.alignment = setting.layout == Layout::expertOrder ? 4 : 1;
  w.options.maxTokens = setting.layout == Layout::slotted ? kTokens : 0;
  w.options.capacityRows = setting.capacity;
  const int hot = step % 5 == 3 ? pick(0, w.experts - 1) : -1;
  for (int rank = 0; rank < setting.ranks; ++rank) {
    w.tokens.push_back(kTokens);
    const int used = step % 7 == 2 && rank % 2 == 0 ? 0 : pick(0, kTokens);
    w.wide.emplace_back();
    w.weights.emplace_back();
    for (int i = 0; i < kTokens * kTopk; ++i) {
      const bool none = i / kTopk >= used || pick(0, 9) == 0;
      w.wide.back().push_back(none ? -1 : hot >= 0 ? hot : pick(0, w.experts - 1));
      w.weights.back().push_back(static_cast<float>(pick(1, 1000)) / 1000);
    }
    w.narrow.emplace_back(w.wide.back().begin(), w.wide.back().end());
  }
  return w;
}

// One stream with its captured graph and its buffers.
struct Batch {
  Batch(Engine& engine, const Setting& setting, int which)
      : driver(engine, stream),
        rank(engine.fabric().rank()),
        rows(rowsOf(setting)),
        first(worldOf(setting, 0, which)),
        shuffle(first),
        tensors(kTokens, kTopk, rows, kElements, 0, {false, true, false, false}),
        ids(first.wide[static_cast<std::size_t>(rank)]),
        weights(first.weights[static_cast<std::size_t>(rank)]) {
    shuffle.elements = kElements;
    PlanRequest request = shuffle.planRequest(rank);
    request.map.ids = ids.data();
    request.map.weights = weights.data();
    request.tickets = true;
    request.slot = which;
    plan = std::make_shared<PlanState>(engine, request);
    driver.beginCapture();
    driver.encode(std::shared_ptr<Operation>(makePlanning(engine, plan)));
    driver.encode(std::shared_ptr<Operation>(makeDispatch(engine, plan, shuffle.dispatchRequest(tensors))));
    driver.call([this] {
      if (driver.status() == 0) shuffle.runExperts(rank, plan->receiveRows(), tensors);
    });
    driver.encode(std::shared_ptr<Operation>(makeCombine(engine, plan, shuffle.combineRequest(tensors))));
    graph = driver.endCapture();
  }

  ~Batch() { stream.synchronize(); }

  static std::int64_t rowsOf(const Setting& s) {
    if (s.capacity > 0) return s.capacity;
    return s.layout == Layout::slotted ? 3 * s.ranks * kTokens : s.ranks * kTokens * kTopk + 3 * 4;
  }

  // The router: new ids and weights in the buffers that the captured plan reads. Then the graph, then a look at what
  // came.
  void step(const Setting& setting, int number, int which) {
    driver.call([this, setting, number, which] {
      ShuffleWorld next(worldOf(setting, number, which));
      const auto at = static_cast<std::size_t>(rank);
      std::copy(next.world.wide[at].begin(), next.world.wide[at].end(), ids.begin());
      std::copy(next.world.weights[at].begin(), next.world.weights[at].end(), weights.begin());
      next.step = number;
      next.elements = kElements;
      shuffle = std::move(next);
      for (Tensor* t : {&tensors.output, &tensors.experts, &tensors.combined}) t->poison();
      shuffle.fillInput(rank, tensors);
    });
    driver.replay(graph);
    driver.call([this, number] {
      if (driver.status() != 0 || !wrong.empty()) return;
      for (const std::string& text : {shuffle.checkCounts(rank, *plan, true), shuffle.checkDispatch(rank, tensors),
                                      shuffle.checkCombine(rank, tensors)}) {
        if (!text.empty() && wrong.empty()) wrong = "replay " + std::to_string(number) + ": " + text;
      }
      dropped += plan->view.header->dropped;
      ++checked;
    });
  }

  FakeStream stream;
  StreamDriver driver;
  int rank;
  std::int64_t rows;
  World first;
  ShuffleWorld shuffle;  // of the step that runs; the stream's own
  RankTensors tensors;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
  std::shared_ptr<PlanState> plan;
  StreamDriver::Graph graph;
  std::string wrong;
  std::int64_t dropped = 0;
  int checked = 0;
};

comm::FabricConfig fabricConfig(const Setting& setting) {
  comm::FabricConfig config;
  const int most = setting.nodes.empty()
                       ? setting.ranks
                       : static_cast<int>(std::count(setting.nodes.begin(), setting.nodes.end(), setting.nodes[0]));
  config.controlBytes = controlBytes(most);
  config.slotBytes = 1024;
  config.slots = 2;
  config.initTimeoutMs = 30000;
  return config;
}

// The fabric that a test is handed, for an engine to own.
class Borrowed final : public comm::Fabric {
 public:
  explicit Borrowed(comm::Fabric& f) : f_(f) {}
  int rank() const override { return f_.rank(); }
  int ranks() const override { return f_.ranks(); }
  const plan::Topology& topology() const override { return f_.topology(); }
  std::string describeRank(int rank) const override { return f_.describeRank(rank); }
  std::byte* control(int rank) override { return f_.control(rank); }
  void ring(int rank) override { f_.ring(rank); }
  std::uint32_t bell() const override { return f_.bell(); }
  void sleep(std::uint32_t seen, std::int64_t microseconds) override { f_.sleep(seen, microseconds); }
  transport::MemoryRef describe(const void* address, std::size_t bytes) override { return f_.describe(address, bytes); }
  std::byte* reach(int rank, const transport::MemoryRef& memory) override { return f_.reach(rank, memory); }
  bool processVm() const override { return f_.processVm(); }
  bool oneProcess() const override { return f_.oneProcess(); }
  void vmWrite(int rank, std::span<const transport::Segment> a, std::span<const transport::Segment> b) override {
    f_.vmWrite(rank, a, b);
  }
  void vmRead(int rank, std::span<const transport::Segment> a, std::span<const transport::Segment> b) override {
    f_.vmRead(rank, a, b);
  }
  transport::PostedLink& link(int rank, int channel, int path) override { return f_.link(rank, channel, path); }
  void allGather(const void* mine, std::size_t bytes, void* all, std::int64_t ms) override {
    f_.allGather(mine, bytes, all, ms);
  }
  void check() override { f_.check(); }
  void abort(const std::string& reason) override { f_.abort(reason); }
  std::size_t memoryBytes() const override { return f_.memoryBytes(); }

 private:
  comm::Fabric& f_;
};

std::unique_ptr<Engine> engineOn(comm::Fabric& fabric, std::int64_t timeoutMs = 60000) {
  EngineConfig config;
  config.operationTimeoutMs = timeoutMs;
  return std::make_unique<Engine>(std::make_unique<Borrowed>(fabric), config);
}

void meet(comm::Fabric& fabric) {
  char mine = 0;
  std::vector<char> all(static_cast<std::size_t>(fabric.ranks()));
  fabric.allGather(&mine, 1, all.data(), 30000);
}

// Ranks that are threads write into each other's tensors: after a failure nobody takes them away before everyone's
// stream has come to rest.
class LeaveTogether {
 public:
  LeaveTogether(std::atomic<int>& here, int ranks, std::vector<FakeStream*> streams)
      : here_(here), ranks_(ranks), streams_(std::move(streams)) {}
  ~LeaveTogether() {
    for (FakeStream* stream : streams_) stream->synchronize();
    ++here_;
    for (int i = 0; i < 20000 && here_ < ranks_; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  LeaveTogether(const LeaveTogether&) = delete;
  LeaveTogether& operator=(const LeaveTogether&) = delete;

 private:
  std::atomic<int>& here_;
  int ranks_;
  std::vector<FakeStream*> streams_;
};

// For ranks that are meant to fail: what a body threw, without the farewell that runRanks holds on a healthy
// communicator.
std::vector<std::string> runFailing(const Setting& setting, const comm::testing::Body& body) {
  std::vector<std::string> wrong(static_cast<std::size_t>(setting.ranks));
  runRanks(
      Kind::threads, setting.ranks, fabricConfig(setting),
      [&](comm::Fabric& fabric) {
        try {
          body(fabric);
        } catch (const std::exception& e) {
          wrong[static_cast<std::size_t>(fabric.rank())] = e.what();
        }
      },
      setting.nodes);
  return wrong;
}

class StreamReplay : public ::testing::TestWithParam<Setting> {};

TEST_P(StreamReplay, NewRoutingInTheSameBuffers) {
  const Setting& setting = GetParam();
  std::atomic<std::int64_t> dropped{0};
  std::atomic<int> here{0};
  const auto texts = runRanks(
      Kind::threads, setting.ranks, fabricConfig(setting),
      [&](comm::Fabric& fabric) {
        const auto engine = engineOn(fabric);
        {
          std::vector<std::unique_ptr<Batch>> batches;
          for (int i = 0; i < setting.microBatches; ++i)
            batches.push_back(std::make_unique<Batch>(*engine, setting, i));
          std::vector<FakeStream*> streams;
          for (auto& batch : batches) streams.push_back(&batch->stream);
          const LeaveTogether leave(here, setting.ranks, streams);
          const std::uint64_t held = engine->ledger().bytes;
          // Everything is launched before anything is waited for. Micro-batches are launched in a different order by
          // every rank: streams of different slots need no order among them.
          for (int step = 1; step <= kReplays; ++step) {
            for (int i = 0; i < setting.microBatches; ++i) {
              const int which = (i + fabric.rank() + step) % setting.microBatches;
              batches[static_cast<std::size_t>(which)]->step(setting, step, which);
            }
          }
          for (auto& batch : batches) batch->stream.synchronize();
          for (auto& batch : batches) {
            require(batch->driver.status() == 0, "the stream failed: " + engine->asyncErrorText());
            require(batch->wrong.empty(), batch->wrong);
            require(batch->checked == kReplays, "not every replay was checked");
            dropped += batch->dropped;
          }
          // Counts are published in a window for each slot, made with the first plan; all else was there beforehand.
          if (setting.capacity > 0 || setting.layout == Layout::slotted) {
            require(engine->ledger().bytes <= held + 4096 * kOperationSlots, "memory was taken during replay");
          }
        }
        meet(fabric);
      },
      setting.nodes);
  for (const std::string& text : texts) EXPECT_EQ(text, "");
  if (setting.capacity > 0) {
    EXPECT_GT(dropped.load(), 0) << "no step went beyond capacity: the test saw nothing";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Settings, StreamReplay,
    ::testing::Values(Setting{2, {}, Layout::expertOrder, 60, 1}, Setting{2, {0, 1}, Layout::expertOrder, 60, 1},
                      Setting{4, {}, Layout::expertOrder, 90, 1}, Setting{4, {0, 0, 1, 1}, Layout::expertOrder, 90, 1},
                      Setting{4, {0, 1, 0, 1}, Layout::expertOrder, 0, 1},
                      Setting{4, {0, 0, 1, 1}, Layout::rankOrder, 50, 1},
                      Setting{4, {0, 0, 1, 1}, Layout::slotted, 0, 1}, Setting{2, {}, Layout::expertOrder, 60, 2},
                      Setting{4, {0, 0, 1, 1}, Layout::expertOrder, 90, 2}),
    nameOf);

// What is launched follows from the shape: as many launches whatever is routed, known before anything has run.
TEST(StreamDriver, LaunchesFollowFromTheShape) {
  const Setting setting{2, {}, Layout::expertOrder, 60, 1};
  comm::testing::expectRanks(Kind::threads, 2, fabricConfig(setting), [&](comm::Fabric& fabric) {
    const auto engine = engineOn(fabric);
    Batch batch(*engine, setting, 0);
    std::size_t stages = 0;
    for (const auto& launch : batch.graph) stages += launch.operation != nullptr;
    // Within a node: plan has ready, waitReady, finish, waitDone; dispatch and combine six stages each.
    require(stages == 4 + 6 + 6, "launches: " + std::to_string(stages));
    require(batch.checked == 0, "capture ran something");
    meet(fabric);
  });
}

TEST(StreamDriver, AnAbortedPeerFailsTheStreamInBoundedTime) {
  const Setting setting{4, {0, 0, 1, 1}, Layout::expertOrder, 90, 1};
  std::atomic<int> here{0};
  const auto texts = runFailing(setting, [&](comm::Fabric& fabric) {
    const auto engine = engineOn(fabric);
    Batch batch(*engine, setting, 0);
    const LeaveTogether leave(here, 4, {&batch.stream});
    batch.step(setting, 1, 0);
    batch.stream.synchronize();
    require(batch.wrong.empty() && batch.checked == 1, "the first step: " + batch.wrong);
    meet(fabric);
    const std::int64_t start = nowNs();
    if (fabric.rank() == 3) {
      // Time for the others to come out of their meeting and into the second step.
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      engine->abort("rank 3 gives up");
    } else {
      for (int step = 2; step < 6; ++step) {
        try {
          batch.step(setting, step, 0);
        } catch (const Error&) {
          break;  // the sticky error, once it is known
        }
      }
    }
    batch.stream.synchronize();
    require(nowNs() - start < 10'000'000'000, "the stream hung");
    if (fabric.rank() != 3) {
      require(batch.driver.status() == static_cast<std::uint32_t>(Code::remoteError),
              "status " + std::to_string(batch.driver.status()));
      require(batch.plan->receiveRows() == 0, "counts were not cleared");
      require(batch.checked == 1, "a step went through without rank 3");
    }
    bool refused = false;
    try {
      batch.driver.replay(batch.graph);
    } catch (const Error& e) {
      refused = e.code() == Code::remoteError && std::string(e.what()).find("rank 3 gives up") != std::string::npos;
    }
    require(refused, "the broken communicator took another replay: " + engine->asyncErrorText());
  });
  for (const std::string& text : texts) EXPECT_EQ(text, "");
}

TEST(StreamDriver, ASilentPeerIsGivenUpAtTheDeadline) {
  const Setting setting{2, {}, Layout::expertOrder, 60, 1};
  std::atomic<int> here{0};
  std::atomic<bool> gaveUp{false};
  const auto texts = runFailing(setting, [&](comm::Fabric& fabric) {
    const auto engine = engineOn(fabric, 300);
    Batch batch(*engine, setting, 0);
    const LeaveTogether leave(here, 2, {&batch.stream});
    if (fabric.rank() == 0) {
      batch.step(setting, 1, 0);
      batch.stream.synchronize();
      gaveUp = true;
      require(batch.driver.status() == static_cast<std::uint32_t>(Code::remoteError), "the stream did not give up");
      require(engine->asyncErrorText().find("did not finish within 300 ms") != std::string::npos,
              engine->asyncErrorText());
    } else {
      // Comes when the other has given up, and is told.
      for (int i = 0; i < 20000 && !gaveUp; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      require(gaveUp, "the other rank's stream never ended");
      batch.step(setting, 1, 0);
      batch.stream.synchronize();
      require(batch.driver.status() != 0, "the late rank went on");
    }
  });
  for (const std::string& text : texts) EXPECT_EQ(text, "");
}

// An id out of range: every rank's stream fails in the plan, and none hangs.
TEST(StreamDriver, BadRoutingFailsEveryStream) {
  const Setting setting{2, {0, 1}, Layout::expertOrder, 60, 1};
  std::atomic<int> here{0};
  const auto texts = runFailing(setting, [&](comm::Fabric& fabric) {
    const auto engine = engineOn(fabric);
    Batch batch(*engine, setting, 0);
    const LeaveTogether leave(here, 2, {&batch.stream});
    batch.driver.call([&] {
      if (fabric.rank() == 1) batch.ids[5] = 1000;
    });
    batch.driver.replay(batch.graph);
    batch.stream.synchronize();
    require(batch.driver.status() != 0, "a bad id went through");
    require(engine->asyncError() != Code::success, "no sticky error");
  });
  for (const std::string& text : texts) EXPECT_EQ(text, "");
}

}  // namespace
}  // namespace fusco::engine::testing
