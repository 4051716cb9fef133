// moe_nccl: what a mixture-of-experts layer gains, step by step, from NCCL's calls to the shuffle.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "moe_nccl/board.h"
#include "moe_nccl/check.h"
#include "shuffle/data.h"
#include "shuffle/measure.h"
#include "shuffle/routing.h"

namespace fusco::bench::moe {

namespace {

// A rank's layers, tensors and checks.
class Rank {
 public:
  Rank(const Options& options, const RoutingSource& source, Board& board, int rank)
      : options_(options),
        board_(board),
        world_{shapeOf(options, source, rank), device(options, source, rank), connect(options, board, rank)},
        routing_(source.make(options.tokens, rank)),
        x_(*device_),
        y_(*device_),
        ids_(*device_),
        weights_(*device_) {
    const Shape& shape = world_.shape;
    const auto slots = static_cast<std::size_t>(shape.slots());
    std::vector<std::byte> x(static_cast<std::size_t>(shape.tokens) * shape.rowBytes());
    for (std::int64_t t = 0; t < shape.tokens; ++t) {
      fillRow(x.data() + static_cast<std::size_t>(t) * shape.rowBytes(), tokenKey(shape.seed, rank, t), 0,
              shape.rowBytes(), Type::bf16);
    }
    const std::vector<std::int64_t> ids(routing_.ids.begin(), routing_.ids.end());
    for (Buffer* buffer : {&x_, &y_}) buffer->grow(x.size());
    ids_.grow(slots * sizeof(std::int64_t));
    weights_.grow(slots * sizeof(float));
    device_->toDevice(x_.bytes(), x.data(), x.size());
    device_->toDevice(ids_.bytes(), ids.data(), slots * sizeof(std::int64_t));
    device_->toDevice(weights_.bytes(), routing_.weights.data(), slots * sizeof(float));
    result_.resize(x.size());
    for (const std::string& name : options.states) layers_.push_back(makeLayer(name, world_));
  }

  // Every state once, against the sums made here and against the first state.
  void check() {
    for (std::size_t state = 0; state < layers_.size(); ++state) {
      step(state, nullptr);
      compare(state);
    }
  }

  // Rounds in which the states take turns, each round begun by another one; then the last results are checked again.
  void measure() {
    for (int round = 0; round < options_.rounds; ++round) {
      for (std::size_t turn = 0; turn < layers_.size(); ++turn) {
        const std::size_t state = (turn + static_cast<std::size_t>(round)) % layers_.size();
        for (int i = 0; i < options_.warmup; ++i) step(state, nullptr);
        for (int i = 0; i < options_.iterations; ++i) step(state, &board_.sample(world_.shape.rank, state, round, i));
        if (round == options_.rounds - 1) compare(state);
      }
    }
    layers_.clear();
    board_.meet();
    OK(ncclCommDestroy(world_.comm));
  }

 private:
  static Shape shapeOf(const Options& options, const RoutingSource& source, int rank) {
    Shape shape;
    shape.rank = rank;
    shape.ranks = options.ranks;
    shape.tokens = source.tokensOf(options.tokens, rank);
    shape.hidden = options.hidden;
    shape.topk = source.topk();
    shape.experts = source.experts();
    shape.inner = options.inner;
    shape.seed = options.seed;
    shape.firstExpert = firstExpertOf(rank, options.ranks, shape.experts);
    shape.localExperts = firstExpertOf(rank + 1, options.ranks, shape.experts) - shape.firstExpert;
    return shape;
  }
  Device& device(const Options& options, const RoutingSource& source, int rank) {
    device_ = makeDevice(options.device, shapeOf(options, source, rank));
    return *device_;
  }
  static ncclComm_t connect(const Options& options, Board& board, int rank) {
    const ncclUniqueId id = board.id(rank);
    ncclComm_t comm = nullptr;
    OK(ncclCommInitRank(&comm, options.ranks, id, rank));
    return comm;
  }

  void step(std::size_t state, Sample* sample) {
    if (sample == nullptr) {
      poison(result_.data(), result_.size());
      device_->toDevice(y_.bytes(), result_.data(), result_.size());
    }
    Timer timer(*device_);
    board_.meet();
    layers_[state]->step({x_.bytes(), ids_.as<std::int64_t>(), weights_.as<float>(), y_.bytes()}, timer);
    if (sample == nullptr) return;
    sample->beginNs = timer.beginNs();
    sample->endNs = timer.endNs();
    std::copy(timer.parts().begin(), timer.parts().end(), sample->parts);
  }

  void compare(std::size_t state) {
    device_->toHost(result_.data(), y_.bytes(), result_.size());
    if (options_.states[state] == options_.corrupt) result_[result_.size() / 2] ^= std::byte{1};
    if (first_.empty()) first_ = result_;
    std::uint64_t wrong = differing(result_.data(), first_.data(), result_.size(), 2);
    wrong += wrongAgainstReference(world_.shape, routing_, reinterpret_cast<const std::uint16_t*>(result_.data()));
    board_.wrong(world_.shape.rank, state) += wrong;
  }

  const Options& options_;
  Board& board_;
  std::unique_ptr<Device> device_;
  const World world_;
  const Routing routing_;
  Buffer x_, y_, ids_, weights_;
  std::vector<std::byte> result_, first_;
  std::vector<std::unique_ptr<Layer>> layers_;
};

struct Row {
  double stepUs = 0;
  double partUs[kParts] = {};
  double shuffleUs = 0;  // all parts but the experts
  double share = 0;      // of all parts
  std::uint64_t wrong = 0;
};

// The step from the first rank's start to the last one's end; parts are a rank's own, the mean over ranks.
Row summary(const Options& options, Board& board, std::size_t state) {
  Row row;
  std::vector<double> rounds, parts[kParts], shuffles, shares;
  for (int round = 0; round < options.rounds; ++round) {
    std::vector<double> steps;
    for (int i = 0; i < options.iterations; ++i) {
      std::int64_t begin = INT64_MAX, end = 0;
      double sums[kParts] = {};
      for (int rank = 0; rank < options.ranks; ++rank) {
        const Sample& sample = board.sample(rank, state, round, i);
        begin = std::min(begin, sample.beginNs);
        end = std::max(end, sample.endNs);
        for (int part = 0; part < kParts; ++part) sums[part] += static_cast<double>(sample.parts[part]) / 1e3;
      }
      steps.push_back(static_cast<double>(end - begin) / 1e3);
      double all = 0;
      for (int part = 0; part < kParts; ++part) {
        parts[part].push_back(sums[part] / options.ranks);
        all += sums[part];
      }
      shuffles.push_back((all - sums[kExperts]) / options.ranks);
      shares.push_back(100 * (all - sums[kExperts]) / all);
    }
    rounds.push_back(percentile(steps, 0.5));
  }
  row.stepUs = percentile(rounds, 0.5);
  for (int part = 0; part < kParts; ++part) row.partUs[part] = percentile(parts[part], 0.5);
  row.shuffleUs = percentile(shuffles, 0.5);
  row.share = percentile(shares, 0.5);
  for (int rank = 0; rank < options.ranks; ++rank) row.wrong += board.wrong(rank, state);
  return row;
}

int run(const Options& options) {
  setenv("FUSCO_DEVICE", options.device.c_str(), 1);
  RoutingOptions routing;
  routing.text = options.routing;
  routing.ranks = options.ranks;
  routing.topk = options.topk;
  routing.experts = options.experts;
  routing.topkGiven = options.topkGiven;
  routing.expertsGiven = options.expertsGiven;
  routing.seed = options.seed;
  const RoutingSource source(routing);
  Board board(options);
  fmt::print(
      "# device {}, {} ranks (processes), {} tokens each, {} BF16 elements, top-{} of {} experts, inner {}, {}\n",
      options.device, options.ranks, options.tokens, options.hidden, source.topk(), source.experts(), options.inner,
      options.routing);
  if (!source.remark().empty()) fmt::print("# {}\n", source.remark());
  const bool well = board.run([&](int number) {
    prepareRank(options.device, number, options.ranks);
    Rank rank(options, source, board, number);
    rank.check();
    rank.measure();
  });
  if (!well) return 1;
  fmt::print("# times in ms, p50; shuffle: route, there and back\n");
  fmt::print("{:<10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7} {:>9} {:>7}\n", "state", "step", "route", "there",
             "experts", "back", "shuffle", "share%", "faster", "shuffle x", "#wrong");
  std::uint64_t wrong = 0;
  Row first;
  for (std::size_t state = 0; state < options.states.size(); ++state) {
    const Row row = summary(options, board, state);
    if (state == 0) first = row;
    wrong += row.wrong;
    fmt::print("{:<10} {:>9.2f} {:>9.2f} {:>9.2f} {:>9.2f} {:>9.2f} {:>9.2f} {:>7.1f} {:>7.2f} {:>9.2f} {:>7}\n",
               options.states[state], row.stepUs / 1e3, row.partUs[kRoute] / 1e3, row.partUs[kThere] / 1e3,
               row.partUs[kExperts] / 1e3, row.partUs[kBack] / 1e3, row.shuffleUs / 1e3, row.share,
               first.stepUs / row.stepUs, first.shuffleUs / row.shuffleUs, row.wrong);
  }
  return wrong == 0 ? 0 : 1;
}

}  // namespace

}  // namespace fusco::bench::moe

int main(int count, char** arguments) {
  fusco::bench::moe::Options options;
  int exitCode = 0;
  if (!fusco::bench::moe::parseOptions(count, arguments, options, &exitCode)) return exitCode;
  try {
    return fusco::bench::moe::run(options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "moe_nccl: {}\n", error.what());
    return 2;
  }
}
