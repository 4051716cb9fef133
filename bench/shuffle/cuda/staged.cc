#include "shuffle/cuda/staged.h"

#include <fmt/format.h>

#include <algorithm>

namespace fusco::bench::gpu {

std::size_t Stages::bytesNeeded(const Tensors& tensors, const World& world, int topk) {
  std::size_t most = 0;
  for (int gpu = 0; gpu < world.gpus(); ++gpu)
    most = std::max(most, static_cast<std::size_t>(tensors.tokenRowsOfGpu(gpu) * topk + tensors.expertRowsOfGpu(gpu)) *
                              (tensors.rowBytes() + 16));
  return most;
}

Stages::Stages(World& world, Tensors& tensors, const Options& options)
    : world_(world), tensors_(tensors), options_(options) {
  const int topk = tensors.map().topk;
  arrivedRows_.assign(static_cast<std::size_t>(world.gpus()), 0);
  for (int gpu = 0; gpu < world.gpus(); ++gpu) {
    const auto slots = static_cast<std::size_t>(tensors.tokenRowsOfGpu(gpu) * topk);
    const auto rows = static_cast<std::size_t>(tensors.expertRowsOfGpu(gpu));
    packed_.emplace_back(gpu, slots * tensors.rowBytes());
    arrived_.emplace_back(gpu, rows * tensors.rowBytes());
    packedPlaces_.emplace_back(gpu, std::vector<std::uint32_t>(slots));
    finalPlaces_.emplace_back(gpu, std::vector<std::uint32_t>(rows));
    arrivalPlaces_.emplace_back(gpu, std::vector<std::uint32_t>(rows));
    weights_.emplace_back(gpu, std::vector<float>(slots));
    FUSCO_BENCH_CUDA(cudaMemset(packed_.back().at(), 0, packed_.back().bytes()));
    FUSCO_BENCH_CUDA(cudaMemset(arrived_.back().at(), 0, arrived_.back().bytes()));
  }
  FUSCO_BENCH_CUDA(cudaDeviceSynchronize());
  build();
  for (int gpu = 0; gpu < world.gpus(); ++gpu) {
    if (tensors_.op() == Op::dispatch) {
      beforeWay_.push_back(bestReplicate(world_, gpu, permute(gpu)));
      afterWay_.push_back(bestReplicate(world_, gpu, sorting(gpu)));
    } else {
      beforeWay_.push_back(bestReplicate(world_, gpu, unsorting(gpu)));
      sumWay_.push_back(bestSum(world_, gpu, sum(gpu)));
    }
  }
}

void Stages::build() {
  const ShuffleMap& map = tensors_.map();
  lists_ = stagedLists(map);
  packedFirst_.clear();
  arrivedFirst_.clear();
  std::fill(arrivedRows_.begin(), arrivedRows_.end(), 0);
  for (int r = 0; r < world_.ranks(); ++r) {
    packedFirst_.push_back(tensors_.tokenPlace(r).first * map.topk);
    std::int64_t& next = arrivedRows_[static_cast<std::size_t>(world_.gpuOf(r))];
    arrivedFirst_.push_back(next);
    next += map.rowsOf(r);
  }
  for (int gpu = 0; gpu < world_.gpus(); ++gpu) {
    const auto g = static_cast<std::size_t>(gpu);
    packedPlaces_[g].assign(slotsOfGpu<std::uint32_t>(
        world_, tensors_, gpu,
        [&](int rank, std::size_t slot) {
          const std::int32_t at = lists_.packed[static_cast<std::size_t>(rank)][slot];
          return at < 0 ? kNoPlace : static_cast<std::uint32_t>(packedFirst(rank) + at);
        },
        kNoPlace));
    weights_[g].assign(slotsOfGpu<float>(
        world_, tensors_, gpu,
        [&](int rank, std::size_t slot) { return map.routing[static_cast<std::size_t>(rank)].weights[slot]; }, 0.0f));
    std::vector<std::uint32_t> final(static_cast<std::size_t>(arrivedRows_[g]), kNoPlace);
    std::vector<std::uint32_t> arrival(static_cast<std::size_t>(tensors_.expertRowsOfGpu(gpu)), kNoPlace);
    for (int r = 0; r < world_.ranks(); ++r) {
      if (world_.gpuOf(r) != gpu) continue;
      const auto& arrived = lists_.arrived[static_cast<std::size_t>(r)];
      for (std::size_t row = 0; row < arrived.size(); ++row) {
        const std::int64_t at = arrivedFirst(r) + arrived[row];
        const std::int64_t expert = tensors_.expertPlace(r).first + static_cast<std::int64_t>(row);
        final[static_cast<std::size_t>(at)] = static_cast<std::uint32_t>(expert);
        arrival[static_cast<std::size_t>(expert)] = static_cast<std::uint32_t>(at);
      }
    }
    finalPlaces_[g].assign(final);
    arrivalPlaces_[g].assign(arrival);
  }
}

std::byte* Stages::packedAt(int rank, std::int64_t row) const {
  return packed_[static_cast<std::size_t>(world_.gpuOf(rank))].at() +
         static_cast<std::size_t>(packedFirst(rank) + row) * tensors_.rowBytes();
}
std::byte* Stages::arrivedAt(int rank, std::int64_t row) const {
  return arrived_[static_cast<std::size_t>(world_.gpuOf(rank))].at() +
         static_cast<std::size_t>(arrivedFirst(rank) + row) * tensors_.rowBytes();
}

Segment Stages::piece(int from, int to) const {
  const auto f = static_cast<std::size_t>(from), t = static_cast<std::size_t>(to);
  if (tensors_.op() == Op::dispatch) {
    return {packedAt(from, lists_.sendAt[f][t]), arrivedAt(to, lists_.arriveAt[t][f]),
            static_cast<std::size_t>(lists_.count[f][t]) * tensors_.rowBytes()};
  }
  return {arrivedAt(from, lists_.arriveAt[f][t]), packedAt(to, lists_.sendAt[t][f]),
          static_cast<std::size_t>(lists_.count[t][f]) * tensors_.rowBytes()};
}

Replicate Stages::permute(int gpu) const {
  const auto g = static_cast<std::size_t>(gpu);
  return {tensors_.tokensOfGpu(gpu),
          packed_[g].at(),
          packedPlaces_[g].at(),
          static_cast<int>(tensors_.tokenRowsOfGpu(gpu)),
          tensors_.map().topk,
          tensors_.rowBytes(),
          0};
}
Replicate Stages::sorting(int gpu) const {
  const auto g = static_cast<std::size_t>(gpu);
  return {arrived_[g].at(),
          tensors_.expertsOfGpu(gpu),
          finalPlaces_[g].at(),
          static_cast<int>(arrivedRows_[g]),
          1,
          tensors_.rowBytes(),
          0};
}
Replicate Stages::unsorting(int gpu) const {
  const auto g = static_cast<std::size_t>(gpu);
  return {tensors_.expertsOfGpu(gpu),
          arrived_[g].at(),
          arrivalPlaces_[g].at(),
          static_cast<int>(tensors_.expertRowsOfGpu(gpu)),
          1,
          tensors_.rowBytes(),
          0};
}
WeightedSum Stages::sum(int gpu) const {
  const auto g = static_cast<std::size_t>(gpu);
  WeightedSum sum{};
  sum.source = packed_[g].at();
  sum.places = packedPlaces_[g].at();
  sum.weights = weights_[g].at();
  sum.out = tensors_.tokensOfGpu(gpu);
  sum.rows = tensors_.tokenRowsOfGpu(gpu);
  sum.topk = tensors_.map().topk;
  sum.hidden = options_.hidden;
  sum.type = options_.type;
  return sum;
}

void Stages::before(int gpu) {
  launch(tensors_.op() == Op::dispatch ? permute(gpu) : unsorting(gpu), beforeWay_[static_cast<std::size_t>(gpu)],
         world_.ofGpu(gpu));
}

void Stages::after(int gpu) {
  if (tensors_.op() == Op::dispatch)
    launch(sorting(gpu), afterWay_[static_cast<std::size_t>(gpu)], world_.ofGpu(gpu));
  else
    launch(sum(gpu), sumWay_[static_cast<std::size_t>(gpu)], world_.ofGpu(gpu));
}

void Stages::beforeOfRank(int rank) {
  const int gpu = world_.gpuOf(rank);
  const bool dispatch = tensors_.op() == Op::dispatch;
  Replicate part = dispatch ? permute(gpu) : unsorting(gpu);
  const Place& place = dispatch ? tensors_.tokenPlace(rank) : tensors_.expertPlace(rank);
  part.source += static_cast<std::size_t>(place.first) * part.rowBytes;
  part.places += place.first * part.copies;
  part.rows = static_cast<int>(place.rows);
  launch(part, beforeWay_[static_cast<std::size_t>(gpu)], world_.ofRank(rank));
}

void Stages::afterOfRank(int rank) {
  const int gpu = world_.gpuOf(rank);
  if (tensors_.op() == Op::dispatch) {
    Replicate part = sorting(gpu);
    part.source += static_cast<std::size_t>(arrivedFirst(rank)) * part.rowBytes;
    part.places += arrivedFirst(rank);
    part.rows = static_cast<int>(tensors_.map().rowsOf(rank));
    launch(part, afterWay_[static_cast<std::size_t>(gpu)], world_.ofRank(rank));
    return;
  }
  WeightedSum part = sum(gpu);
  const Place& place = tensors_.tokenPlace(rank);
  part.places += place.first * part.topk;
  part.weights += place.first * part.topk;
  part.out += static_cast<std::size_t>(place.first) * tensors_.rowBytes();
  part.rows = place.rows;
  launch(part, sumWay_[static_cast<std::size_t>(gpu)], world_.ofRank(rank));
}

std::string Stages::remark() const {
  const bool dispatch = tensors_.op() == Op::dispatch;
  return fmt::format("{}: {}; {}: {}", dispatch ? "permute" : "unsort", beforeWay_[0].name(), dispatch ? "sort" : "sum",
                     dispatch ? afterWay_[0].name() : sumWay_[0].name());
}

namespace {

// With copies between: an upper bound of any library that works in stages. What goes where was found out before.
class Staged : public Shuffle {
 public:
  Staged(World& world, Tensors& tensors, const Options& options) : world_(world), stages_(world, tensors, options) {
    for (int gpu = 0; gpu < world.gpus(); ++gpu) lists_.emplace_back(gpu, pieces(gpu));
    engines_ = true;
    const double engines = quickTimeOf(world, [&](int times) { enqueueCopies(times); });
    engines_ = false;
    const double kernel = quickTimeOf(world, [&](int times) { enqueueCopies(times); });
    engines_ = engines < kernel;
  }

  void enqueue(int times) override {
    world_.forkGpus();
    for (int i = 0; i < times; ++i) {
      for (int gpu = 0; gpu < world_.gpus(); ++gpu) stages_.before(gpu);
      world_.meetGpus();
      for (int gpu = 0; gpu < world_.gpus(); ++gpu) copy(gpu);
      world_.meetGpus();
      for (int gpu = 0; gpu < world_.gpus(); ++gpu) stages_.after(gpu);
    }
    world_.joinGpus();
  }
  Parts parts() override {
    return {
        {"before", quickTimeOf(world_, [&](int times) { enqueueEach(times, [&](int gpu) { stages_.before(gpu); }); })},
        {"copies", quickTimeOf(world_, [&](int times) { enqueueCopies(times); })},
        {"after", quickTimeOf(world_, [&](int times) { enqueueEach(times, [&](int gpu) { stages_.after(gpu); }); })}};
  }
  std::string remark() const override {
    return stages_.remark() + "; copies: " + (engines_ ? "copy engines" : "a kernel");
  }

 private:
  // From the ranks of a GPU, to the others first.
  std::vector<Segment> pieces(int gpu) const {
    std::vector<Segment> pieces;
    for (int step = 1; step <= world_.gpus(); ++step)
      for (int from = 0; from < world_.ranks(); ++from)
        for (int to = 0; to < world_.ranks(); ++to)
          if (world_.gpuOf(from) == gpu && world_.gpuOf(to) == (gpu + step) % world_.gpus())
            pieces.push_back(stages_.piece(from, to));
    return pieces;
  }
  void copy(int gpu) {
    const OnGpu on(gpu);
    const cudaStream_t stream = world_.ofGpu(gpu).get();
    const std::vector<Segment> all = pieces(gpu);
    if (!engines_) {
      FUSCO_BENCH_CUDA(copySegments(lists_[static_cast<std::size_t>(gpu)].at(), static_cast<int>(all.size()),
                                    4 * world_.sms(), stream));
      return;
    }
    for (const Segment& s : all)
      if (s.bytes > 0) FUSCO_BENCH_CUDA(cudaMemcpyAsync(s.to, s.from, s.bytes, cudaMemcpyDefault, stream));
  }
  void enqueueEach(int times, const std::function<void(int)>& work) {
    world_.forkGpus();
    for (int i = 0; i < times; ++i)
      for (int gpu = 0; gpu < world_.gpus(); ++gpu) work(gpu);
    world_.joinGpus();
  }
  void enqueueCopies(int times) {
    enqueueEach(times, [&](int gpu) { copy(gpu); });
  }

  World& world_;
  Stages stages_;
  std::vector<List<Segment>> lists_;
  bool engines_ = true;
};

}  // namespace

std::unique_ptr<Shuffle> makeStaged(World& world, Tensors& tensors, const Options& options) {
  return std::make_unique<Staged>(world, tensors, options);
}

}  // namespace fusco::bench::gpu
