// What a GPU, or its links, allow at most.
#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "shuffle/cuda/passes.h"
#include "shuffle/cuda/staged_lists.h"

namespace fusco::bench::gpu {

namespace {

std::uint32_t finalRow(const Tensors& tensors, int rank, std::size_t slot) {
  const ShuffleMap& map = tensors.map();
  const std::int32_t row = map.row[static_cast<std::size_t>(rank)][slot];
  if (row < 0) return kNoPlace;
  const std::int32_t id = map.routing[static_cast<std::size_t>(rank)].ids[slot];
  const int at = rankOfExpert(id, map.ranks, map.experts);
  return static_cast<std::uint32_t>(tensors.expertPlace(at).first + row);
}

// One GPU: each token read once and written to its final rows; or its rows read where they lie, and summed.
class OnePass : public Shuffle {
 public:
  OnePass(World& world, Tensors& tensors, const Options& options)
      : world_(world), tensors_(tensors), options_(options), places_(0, places()), weights_(0, weights()) {
    if (tensors_.op() == Op::dispatch)
      way_ = bestReplicate(world_, 0, copies());
    else
      sumWay_ = bestSum(world_, 0, sums());
  }

  void enqueue(int times) override {
    for (int i = 0; i < times; ++i) {
      if (tensors_.op() == Op::dispatch)
        launch(copies(), way_, world_.lead());
      else
        launch(sums(), sumWay_, world_.lead());
    }
  }
  std::string remark() const override { return tensors_.op() == Op::dispatch ? way_.name() : sumWay_.name(); }

 private:
  std::vector<std::uint32_t> places() const {
    return slotsOfGpu<std::uint32_t>(
        world_, tensors_, 0, [&](int rank, std::size_t slot) { return finalRow(tensors_, rank, slot); }, kNoPlace);
  }
  std::vector<float> weights() const {
    return slotsOfGpu<float>(
        world_, tensors_, 0,
        [&](int rank, std::size_t slot) {
          return tensors_.map().routing[static_cast<std::size_t>(rank)].weights[slot];
        },
        0.0f);
  }
  Replicate copies() const {
    return {tensors_.tokensOfGpu(0),
            tensors_.expertsOfGpu(0),
            places_.at(),
            static_cast<int>(tensors_.tokenRowsOfGpu(0)),
            tensors_.map().topk,
            tensors_.rowBytes(),
            0};
  }
  WeightedSum sums() const {
    WeightedSum sum{};
    sum.source = tensors_.expertsOfGpu(0);
    sum.places = places_.at();
    sum.weights = weights_.at();
    sum.out = tensors_.tokensOfGpu(0);
    sum.rows = tensors_.tokenRowsOfGpu(0);
    sum.topk = tensors_.map().topk;
    sum.hidden = options_.hidden;
    sum.type = options_.type;
    return sum;
  }

  World& world_;
  Tensors& tensors_;
  const Options& options_;
  List<std::uint32_t> places_;
  List<float> weights_;
  ReplicateWay way_;
  SumWay sumWay_;
};

// Half of the experts' rows is copied over the other half, as often as (1 + K) T h bytes want.
class DeviceCopy : public Shuffle {
 public:
  DeviceCopy(World& world, Tensors& tensors) : world_(world), tensors_(tensors) {
    half_ = static_cast<std::size_t>(tensors.expertRowsOfGpu(0)) * tensors.rowBytes() / 2 / 256 * 256;
  }
  void enqueue(int times) override {
    const OnGpu on(0);
    for (int i = 0; i < times; ++i)
      FUSCO_BENCH_CUDA(cudaMemcpyAsync(tensors_.expertsOfGpu(0), tensors_.expertsOfGpu(0) + half_, half_,
                                       cudaMemcpyDeviceToDevice, world_.lead().get()));
  }
  // Captured copies are slower: 2.4 instead of 3.0 TB/s on an H100.
  bool capturable() const override { return false; }
  std::size_t moved() const { return 2 * half_; }

 private:
  World& world_;
  Tensors& tensors_;
  std::size_t half_ = 0;
};

}  // namespace

std::unique_ptr<Shuffle> makeOnePass(World& world, Tensors& tensors, const Options& options) {
  return std::make_unique<OnePass>(world, tensors, options);
}

std::unique_ptr<Shuffle> makeDeviceCopy(World& world, Tensors& tensors) {
  return std::make_unique<DeviceCopy>(world, tensors);
}

std::size_t bytesOfDeviceCopy(const Shuffle& copy) { return dynamic_cast<const DeviceCopy&>(copy).moved(); }

// Every GPU sends what the others need of it, the others in shifted order, by the copy engines or by a kernel.
class PeerCopy : public Shuffle {
 public:
  PeerCopy(World& world, Tensors& tensors) : world_(world), rowBytes_(tensors.rowBytes()) {
    const auto copies = distinctCopies(tensors.map());
    const int gpus = world.gpus();
    bytes_.assign(static_cast<std::size_t>(gpus), std::vector<std::size_t>(static_cast<std::size_t>(gpus), 0));
    for (int s = 0; s < world.ranks(); ++s)
      for (int d = 0; d < world.ranks(); ++d) {
        const int from = world.gpuOf(s), to = world.gpuOf(d);
        if (tensors.op() == Op::combine)
          at(to, from) +=
              static_cast<std::size_t>(copies[static_cast<std::size_t>(s)][static_cast<std::size_t>(d)]) * rowBytes_;
        else
          at(from, to) +=
              static_cast<std::size_t>(copies[static_cast<std::size_t>(s)][static_cast<std::size_t>(d)]) * rowBytes_;
      }
    for (int gpu = 0; gpu < gpus; ++gpu) at(gpu, gpu) = 0;
    for (int gpu = 0; gpu < gpus; ++gpu) {
      std::size_t out = 0, in = 0;
      for (int other = 0; other < gpus; ++other) {
        out += padded(at(gpu, other));
        in += padded(at(other, gpu));
      }
      source_.emplace_back(gpu, out);
      target_.emplace_back(gpu, in);
    }
    for (int gpu = 0; gpu < gpus; ++gpu) {
      std::vector<Segment> segments;
      for (int step = 1; step < gpus; ++step) segments.push_back(segment(gpu, (gpu + step) % gpus));
      lists_.emplace_back(gpu, segments);
      segments_.push_back(std::move(segments));
    }
    double least = 1e30;
    for (const int way : {0, 1, 2, 4}) {
      blocks_ = way * world.sms();
      const double us = quickTimeOf(world, [&](int times) { enqueue(times); });
      if (us >= least) continue;
      least = us;
      best_ = blocks_;
    }
    blocks_ = best_;
  }

  void enqueue(int times) override {
    world_.forkGpus();
    for (int i = 0; i < times; ++i) {
      for (int gpu = 0; gpu < world_.gpus(); ++gpu) send(gpu);
      world_.meetGpus();
    }
    world_.joinGpus();
  }
  std::string remark() const override {
    return blocks_ == 0 ? "copy engines" : fmt::format("kernel, {} blocks", blocks_);
  }

  std::uint64_t wrong() {
    std::uint64_t all = 0;
    for (int gpu = 0; gpu < world_.gpus(); ++gpu) {
      fillSource(gpu);
      const OnGpu on(gpu);
      FUSCO_BENCH_CUDA(cudaMemset(target_[static_cast<std::size_t>(gpu)].at(), kPoison,
                                  target_[static_cast<std::size_t>(gpu)].bytes()));
      FUSCO_BENCH_CUDA(cudaDeviceSynchronize());
    }
    enqueue(1);
    world_.synchronize();
    for (int gpu = 0; gpu < world_.gpus(); ++gpu)
      for (int other = 0; other < world_.gpus(); ++other)
        if (other != gpu) all += wrongBetween(gpu, other);
    return all;
  }
  std::uint64_t busiestBytes() const {
    std::size_t most = 0;
    for (std::size_t gpu = 0; gpu < bytes_.size(); ++gpu) {
      std::size_t out = 0, in = 0;
      for (std::size_t other = 0; other < bytes_.size(); ++other) {
        out += bytes_[gpu][other];
        in += bytes_[other][gpu];
      }
      most = std::max({most, out, in});
    }
    return most;
  }

 private:
  static std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
  std::size_t& at(int from, int to) { return bytes_[static_cast<std::size_t>(from)][static_cast<std::size_t>(to)]; }
  std::size_t at(int from, int to) const {
    return bytes_[static_cast<std::size_t>(from)][static_cast<std::size_t>(to)];
  }

  Segment segment(int from, int to) const {
    std::size_t out = 0, in = 0;
    for (int other = 0; other < to; ++other) out += padded(at(from, other));
    for (int other = 0; other < from; ++other) in += padded(at(other, to));
    return {source_[static_cast<std::size_t>(from)].at() + out, target_[static_cast<std::size_t>(to)].at() + in,
            at(from, to)};
  }

  void send(int gpu) {
    const OnGpu on(gpu);
    const Stream& stream = world_.ofGpu(gpu);
    const auto& segments = segments_[static_cast<std::size_t>(gpu)];
    if (blocks_ > 0) {
      FUSCO_BENCH_CUDA(copySegments(lists_[static_cast<std::size_t>(gpu)].at(), static_cast<int>(segments.size()),
                                    blocks_, stream.get()));
      return;
    }
    for (const Segment& s : segments)
      if (s.bytes > 0) FUSCO_BENCH_CUDA(cudaMemcpyAsync(s.to, s.from, s.bytes, cudaMemcpyDefault, stream.get()));
  }

  // One row a pair, as long as the piece.
  static std::uint64_t keyOf(int from, int to) { return mixed(static_cast<std::uint64_t>(from * 1000 + to)); }
  void fillSource(int gpu) {
    const OnGpu on(gpu);
    for (int other = 0; other < world_.gpus(); ++other) {
      if (other == gpu) continue;
      const Segment s = segment(gpu, other);
      const List<std::uint64_t> key(gpu, {keyOf(gpu, other)});
      if (s.bytes == 0) continue;
      FUSCO_BENCH_CUDA(fillRows({const_cast<std::byte*>(s.from), key.at(), 1, s.bytes, patternOf(Type::u8)},
                                world_.ofGpu(gpu).get()));
      FUSCO_BENCH_CUDA(cudaStreamSynchronize(world_.ofGpu(gpu).get()));
    }
  }
  std::uint64_t wrongBetween(int from, int to) {
    const Segment s = segment(from, to);
    if (s.bytes == 0) return 0;
    const OnGpu on(to);
    const List<std::uint64_t> key(to, {keyOf(from, to)});
    const List<unsigned long long> wrong(to, {0ull});
    FUSCO_BENCH_CUDA(
        countWrongRows({s.to, key.at(), 1, s.bytes, patternOf(Type::u8)}, 1, wrong.at(), world_.ofGpu(to).get()));
    FUSCO_BENCH_CUDA(cudaStreamSynchronize(world_.ofGpu(to).get()));
    unsigned long long count = 0;
    FUSCO_BENCH_CUDA(cudaMemcpy(&count, wrong.at(), sizeof count, cudaMemcpyDeviceToHost));
    return count;
  }

  World& world_;
  std::size_t rowBytes_;
  std::vector<std::vector<std::size_t>> bytes_;  // [from][to], GPUs
  std::vector<Memory> source_, target_;
  std::vector<std::vector<Segment>> segments_;  // [from], in shifted order
  std::vector<List<Segment>> lists_;
  int blocks_ = 0, best_ = 0;  // 0: the copy engines
};

std::unique_ptr<Shuffle> makePeerCopy(World& world, Tensors& tensors) {
  return std::make_unique<PeerCopy>(world, tensors);
}
std::uint64_t wrongInPeerCopy(Shuffle& peerCopy) { return dynamic_cast<PeerCopy&>(peerCopy).wrong(); }
std::uint64_t busiestLinkBytes(Shuffle& peerCopy) { return dynamic_cast<PeerCopy&>(peerCopy).busiestBytes(); }

}  // namespace fusco::bench::gpu
