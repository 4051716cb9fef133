// Whole shuffles of random shape, all ranks stepped by one thread in random order over links that deliver late: every
// result against the naive oracle. A state in which no rank can move and not all have finished is a deadlock.
// FUSCO_TEST_SEED repeats one failing case, FUSCO_TEST_CASES sets how many are tried.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <functional>

#include "engine/fake_fabric.h"
#include "engine/shuffle_world.h"
#include "plan/balance.h"

namespace fusco::engine::testing {
namespace {

int pick(std::mt19937_64& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

// A rank that runs operations stage by stage, as the stream driver does, one small step at a time.
class StageRunner {
 public:
  void add(std::shared_ptr<Operation> operation) {
    operation->enter();
    open_.push_back(std::move(operation));
  }
  bool finished() const { return open_.empty(); }
  std::string describe() const {
    return open_.empty() ? ""
                         : open_.front()->describe() + ", stage " + std::to_string(begun_ ? stages_[at_] : -1) + "; ";
  }
  bool step(Engine& engine) {
    if (open_.empty()) return false;
    Operation& operation = *open_.front();
    if (!begun_) {
      if (!engine.tryBegin(operation)) return false;
      begun_ = true;
      stages_ = operation.stages();
      at_ = 0;
    }
    const Outcome outcome = engine.runStage(operation, stages_[at_]);
    if (outcome != Outcome::complete) return outcome == Outcome::moved;
    if (++at_ == stages_.size()) {
      open_.pop_front();
      begun_ = false;
    }
    return true;
  }

 private:
  std::deque<std::shared_ptr<Operation>> open_;
  std::vector<int> stages_;
  std::size_t at_ = 0;
  bool begun_ = false;
};

// One rank: its phases follow each other when its own operations have finished, whatever the others do.
struct Rank {
  std::unique_ptr<Engine> engine;
  std::vector<std::shared_ptr<PlanState>> plans;
  std::vector<std::unique_ptr<RankTensors>> tensors;
  bool byStages = false;
  StageRunner runner;
  std::vector<std::shared_ptr<Submission>> open;
  std::size_t phase = 0;

  void submit(std::unique_ptr<Operation> operation) {
    if (byStages) {
      runner.add(std::move(operation));
    } else {
      open.push_back(engine->submit(std::move(operation)));
    }
  }
  bool idle() const {
    return runner.finished() && std::all_of(open.begin(), open.end(), [](const auto& s) { return s->finished.load(); });
  }
};

using Phase = std::function<void(int rank, Rank& state)>;

class Play {
 public:
  Play(const plan::Topology& topology, const FakeConfig& config, std::uint64_t seed)
      : cluster_(topology, config, seed), random_(seed ^ 0x9e3779b97f4a7c15ull) {
    EngineConfig engineConfig;
    engineConfig.operationTimeoutMs = 0;
    ranks_.resize(static_cast<std::size_t>(topology.ranks()));
    for (int rank = 0; rank < topology.ranks(); ++rank) {
      ranks_[static_cast<std::size_t>(rank)].engine = std::make_unique<Engine>(cluster_.fabric(rank), engineConfig);
    }
  }
  std::vector<Rank>& ranks() { return ranks_; }
  FakeCluster& cluster() { return cluster_; }

  // Throws when an operation fails, or when nobody can move.
  void run(const std::vector<Phase>& phases) {
    std::vector<std::size_t> order(ranks_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    while (!finished(phases)) {
      std::shuffle(order.begin(), order.end(), random_);
      bool moved = false;
      for (const std::size_t rank : order) {
        // Some run ahead, some lag behind.
        for (int turns = pick(random_, 0, 3); turns > 0; --turns) moved |= step(static_cast<int>(rank), phases);
      }
      if (moved) continue;
      // Once more without delays, and thrice: a step may do something and then say that it waits.
      cluster_.adversary().on = false;
      for (int sweep = 0; sweep < 3 && !moved; ++sweep) {
        for (const std::size_t rank : order) moved |= step(static_cast<int>(rank), phases);
      }
      cluster_.adversary().on = true;
      if (!moved && !finished(phases)) throw std::runtime_error("deadlock: no rank can move\n" + whoWaits());
    }
    if (!cluster_.quiet()) throw std::runtime_error("slices were left over");
  }

 private:
  bool finished(const std::vector<Phase>& phases) const {
    return std::all_of(ranks_.begin(), ranks_.end(),
                       [&](const Rank& r) { return r.phase == phases.size() && r.idle(); });
  }
  std::string whoWaits() const {
    std::string text;
    for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
      const Rank& state = ranks_[rank];
      text +=
          "rank " + std::to_string(rank) + " in phase " + std::to_string(state.phase) + ": " + state.runner.describe();
      for (const auto& submission : state.open) {
        if (!submission->finished)
          text += submission->operation->describe() + (submission->operation->waitsForLinks() ? ", on links; " : "; ");
      }
      text += "\n";
    }
    return text;
  }
  bool step(int rank, const std::vector<Phase>& phases) {
    Rank& state = ranks_[static_cast<std::size_t>(rank)];
    bool moved = false;
    if (state.idle()) {
      for (const auto& submission : state.open) {
        if (submission->error) std::rethrow_exception(submission->error);
      }
      state.open.clear();
      if (state.phase == phases.size()) return false;
      phases[state.phase++](rank, state);
      moved = true;
    }
    return moved | (state.byStages ? state.runner.step(*state.engine) : state.engine->progress());
  }

  FakeCluster cluster_;
  std::mt19937_64 random_;
  std::vector<Rank> ranks_;
};

void require(const std::string& wrong) {
  if (!wrong.empty()) throw std::runtime_error(wrong);
}

struct Shape {
  std::vector<ShuffleWorld> worlds;  // that run beside each other, one plan each
  FakeConfig config;
  bool tickets = false;
  bool counters = false;
  bool backward = false;
  bool again = false;
};

Shape randomShape(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::mt19937 worldRandom(static_cast<std::mt19937::result_type>(random()));
  Shape shape;
  shape.worlds.emplace_back(plan::testing::randomWorld(worldRandom));
  if (pick(random, 0, 1) != 0) {
    // Another routing of the same ranks, as a second micro-batch.
    World other = shape.worlds[0].world;
    for (int rank = 0; rank < other.topology.ranks(); ++rank) {
      for (std::size_t i = 0; i < other.wide[rank].size(); ++i) {
        other.wide[rank][i] = pick(random, -1, other.experts - 1);
        other.narrow[rank][i] = static_cast<std::int32_t>(other.wide[rank][i]);
      }
    }
    shape.worlds.emplace_back(std::move(other));
  }
  for (std::size_t i = 0; i < shape.worlds.size(); ++i) {
    ShuffleWorld& world = shape.worlds[i];
    world.step = static_cast<int>(i);
    world.elements = static_cast<std::size_t>(pick(random, 0, 3) == 0 ? pick(random, 200, 700) : pick(random, 1, 40));
    world.elements2 = static_cast<std::size_t>(pick(random, 0, 2) == 0 ? pick(random, 1, 300) : 0);
  }
  shape.config.slotBytes = static_cast<std::size_t>(pick(random, 4, 40)) * 64;
  shape.config.slots = pick(random, 1, 4);
  shape.config.slowLinks = seed % 2 == 0;
  shape.config.oneProcess = pick(random, 0, 2) == 0;
  shape.config.processVm = pick(random, 0, 1) != 0;
  shape.tickets = pick(random, 0, 1) != 0;
  shape.counters = pick(random, 0, 2) == 0;
  shape.backward = shape.worlds[0].world.options.layout != plan::Layout::rankOrder && pick(random, 0, 1) != 0;
  shape.again = pick(random, 0, 3) == 0;
  return shape;
}

struct Extras {
  std::vector<std::vector<std::uint32_t>>* outputs = nullptr;  // of all ranks, dispatched and combined in turn
  unsigned damagedOf = 0;                                      // one slice in so many arrives damaged
  std::uint64_t damaged = 0;
};

void runCase(const Shape& shape, const plan::Topology& topology, std::uint64_t seed, Extras& extras) {
  std::mt19937_64 random(seed + 1);
  Play play(topology, shape.config, seed);
  Adversary& adversary = play.cluster().adversary();
  adversary.damagedOf = extras.damagedOf;
  // The same on all ranks: how many operations run beside each other is part of the common order.
  const std::size_t count = shape.worlds.size();
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    Rank& state = play.ranks()[static_cast<std::size_t>(rank)];
    state.byStages = pick(random, 0, 1) != 0;
    for (const ShuffleWorld& w : shape.worlds) {
      std::vector<bool> windows(4);
      for (std::size_t i = 0; i < windows.size(); ++i) windows[i] = pick(random, 0, 1) != 0;
      state.tensors.push_back(std::make_unique<RankTensors>(
          w.world.tokens[rank], w.world.topk, w.expected.receiveRows[rank], w.elements, w.elements2, windows));
      w.fillInput(rank, *state.tensors.back());
    }
  }
  const auto each = [&](Rank& state, const auto& body) {
    for (std::size_t i = 0; i < count; ++i) body(shape.worlds[i], *state.tensors[i], i);
  };
  std::vector<Phase> phases;
  phases.push_back([&](int rank, Rank& state) {
    each(state, [&](const ShuffleWorld& w, RankTensors&, std::size_t) {
      PlanRequest request = w.planRequest(rank);
      request.tickets = shape.tickets;
      request.counters = shape.counters && w.world.options.layout != plan::Layout::rankOrder;
      request.dedupAuto = w.world.options.dedup == plan::Dedup::node && shape.config.slots % 2 == 0;
      state.plans.push_back(std::make_shared<PlanState>(*state.engine, request));
      state.submit(makePlanning(*state.engine, state.plans.back()));
    });
  });
  for (int round = 0; round <= (shape.again ? 1 : 0); ++round) {
    phases.push_back([&](int rank, Rank& state) {
      each(state, [&](const ShuffleWorld& w, RankTensors& t, std::size_t i) {
        t.output.poison();
        t.output2.poison();
        t.experts.poison();
        t.combined.poison();
        t.rowGradient.poison();
        t.weightGradient.poison();
        require(w.checkCounts(rank, *state.plans[i], false));
        state.submit(makeDispatch(*state.engine, state.plans[i], w.dispatchRequest(t)));
      });
    });
    phases.push_back([&](int rank, Rank& state) {
      each(state, [&](const ShuffleWorld& w, RankTensors& t, std::size_t i) {
        require(w.checkDispatch(rank, t));
        require(
            w.checkCounts(rank, *state.plans[i], shape.tickets || w.world.options.layout != plan::Layout::expertOrder));
        w.runExperts(rank, w.expected.receiveRows[rank], t);
        state.submit(makeCombine(*state.engine, state.plans[i], w.combineRequest(t)));
      });
    });
    phases.push_back([&](int rank, Rank& state) {
      each(state, [&](const ShuffleWorld& w, RankTensors& t, std::size_t i) {
        require(w.checkCombine(rank, t));
        if (shape.backward) state.submit(makeCombineBackward(*state.engine, state.plans[i], w.backwardRequest(t)));
      });
    });
  }
  try {
    play.run(phases);
  } catch (...) {
    extras.damaged += adversary.damaged;
    throw;
  }
  extras.damaged += adversary.damaged;
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    for (std::size_t i = 0; i < count; ++i) {
      RankTensors& t = *play.ranks()[static_cast<std::size_t>(rank)].tensors[i];
      if (shape.backward) require(shape.worlds[i].checkBackward(rank, t));
      if (extras.outputs == nullptr) continue;
      for (Tensor* tensor : {&t.output, &t.combined}) {
        const auto* words = reinterpret_cast<const std::uint32_t*>(tensor->data());
        extras.outputs->emplace_back(words, words + tensor->count());
      }
    }
  }
}

std::uint64_t fromEnvironment(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

// Sanitizers take their time.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kCasesDivisor = 5;
#else
constexpr std::uint64_t kCasesDivisor = 1;
#endif

void forSeeds(std::uint64_t cases, const std::function<void(std::uint64_t)>& body) {
  const bool one = std::getenv("FUSCO_TEST_SEED") != nullptr;
  const std::uint64_t first = fromEnvironment("FUSCO_TEST_SEED", 1);
  const std::uint64_t count = one ? 1 : fromEnvironment("FUSCO_TEST_CASES", cases / kCasesDivisor);
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    try {
      body(seed);
    } catch (const std::exception& e) {
      FAIL() << e.what() << "\n"
             << plan::testing::describe(randomShape(seed).worlds[0].world) << "\nrepeat with FUSCO_TEST_SEED=" << seed;
    }
  }
}

TEST(Interleavings, RandomShufflesInRandomOrder) {
  forSeeds(3000, [](std::uint64_t seed) {
    const Shape shape = randomShape(seed);
    Extras none;
    runCase(shape, shape.worlds[0].world.topology, seed, none);
  });
}

// Flows from the balancer instead of the default ones: the same rows at the same places, the same sums.
TEST(Interleavings, BalancedFlowsChangeNothingThatIsSeen) {
  std::uint64_t split = 0;
  forSeeds(500, [&](std::uint64_t seed) {
    Shape shape = randomShape(seed);
    std::mt19937_64 random(seed);
    plan::Topology plain = shape.worlds[0].world.topology;
    plain.resetFlows();
    plan::Topology balanced = plain;
    const auto nodes = static_cast<std::size_t>(plain.nodes());
    std::vector<std::int32_t> loads(static_cast<std::size_t>(plain.ranks()) * nodes);
    for (std::int32_t& load : loads) load = pick(random, 0, 3) == 0 ? pick(random, 0, 4000) : pick(random, 0, 50);
    plan::balanceFlows(balanced, loads, pick(random, 0, 3) == 0 ? plan::Balance::paper : plan::Balance::full);
    for (int source = 0; source < plain.ranks(); ++source) split += balanced.flowCount(source) > plain.nodes();
    std::vector<std::vector<std::uint32_t>> before, after;
    Extras first{.outputs = &before}, second{.outputs = &after};
    runCase(shape, plain, seed, first);
    runCase(shape, balanced, seed, second);
    ASSERT_EQ(before.size(), after.size());
    for (std::size_t i = 0; i < before.size(); ++i) {
      // Dispatched rows to the bit; sums too where a node's rows are summed at one forwarder. Without dedup a token's
      // copies may part ways, then sums are held to the oracle alone.
      if (i % 2 == 1 && shape.worlds[0].world.options.dedup == plan::Dedup::none) continue;
      ASSERT_EQ(before[i], after[i]) << "FUSCO_TEST_SEED=" << seed;
    }
  });
  if (std::getenv("FUSCO_TEST_SEED") != nullptr) return;
  EXPECT_GT(split, 0u) << "no flow was split: the test saw nothing";
}

// Whatever arrives, nobody writes where he must not (a sanitizer would see it) and nobody runs for ever. An error, a
// rank that waits for what never comes (a deadline's matter), or rows that are wrong since the damage said so: all may
// be.
TEST(Interleavings, DamagedSlicesDoNoHarm) {
  Extras extras{.damagedOf = 4};
  std::uint64_t refused = 0;
  forSeeds(1500, [&](std::uint64_t seed) {
    const Shape shape = randomShape(seed);
    if (shape.worlds[0].world.topology.nodes() == 1) return;
    try {
      runCase(shape, shape.worlds[0].world.topology, seed, extras);
    } catch (const Error&) {
      ++refused;
    } catch (const std::runtime_error&) {
    }
  });
  if (std::getenv("FUSCO_TEST_SEED") != nullptr) return;
  EXPECT_GT(extras.damaged, 50u);
  EXPECT_GT(refused, 50u);
}

}  // namespace
}  // namespace fusco::engine::testing
