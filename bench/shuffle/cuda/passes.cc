#include "shuffle/cuda/passes.h"

#include <fmt/format.h>

#include <algorithm>

#include "shuffle/measure.h"

namespace fusco::bench::gpu {

double timeOf(World& world, const std::function<void(int)>& work, int times) {
  Event begin(0, true), end(0, true);
  begin.record(world.lead());
  work(times);
  end.record(world.lead());
  return microseconds(begin, end) / times;
}

double quickTimeOf(World& world, const std::function<void(int)>& work) {
  constexpr int kTimes = 3, kSamples = 3;
  timeOf(world, work, 1);
  std::vector<double> samples;
  for (int i = 0; i < kSamples; ++i) samples.push_back(timeOf(world, work, kTimes));
  return percentile(samples, 0.5);
}

namespace {

// Microseconds on one GPU's stream, which need not be the lead.
double timeOn(World& world, int gpu, const std::function<void()>& work) {
  constexpr int kTimes = 3, kSamples = 3;
  const Stream& stream = world.ofGpu(gpu);
  Event begin(gpu, true), end(gpu, true);
  std::vector<double> samples;
  for (int sample = -1; sample < kSamples; ++sample) {
    begin.record(stream);
    for (int i = 0; i < kTimes; ++i) work();
    end.record(stream);
    const double us = microseconds(begin, end) / kTimes;
    if (sample >= 0) samples.push_back(us);
  }
  return percentile(samples, 0.5);
}

}  // namespace

std::string ReplicateWay::name() const { return fmt::format("{}, {} blocks", replicateName(way), blocks); }

void launch(const Replicate& what, const ReplicateWay& way, const Stream& stream) {
  if (what.rows == 0) return;
  const OnGpu on(stream.device());
  Replicate launched = what;
  launched.blocks = way.blocks;
  FUSCO_BENCH_CUDA(replicate(launched, way.way, stream.get()));
}

ReplicateWay bestReplicate(World& world, int gpu, const Replicate& what) {
  const OnGpu on(gpu);
  ReplicateWay best{0, 2 * world.sms()};
  double least = 1e30;
  for (int way = 0; way < replicateWays(); ++way) {
    if (!replicateCan(what, way)) continue;
    // Blocks of 8 warps, or of one warp that has the SM's copy engine work for it.
    const std::vector<int> factors = way == 0 ? std::vector<int>{2, 4, 8} : std::vector<int>{1, 2};
    for (const int factor : factors) {
      const ReplicateWay tried{way, factor * world.sms()};
      const double us = timeOn(world, gpu, [&] { launch(what, tried, world.ofGpu(gpu)); });
      if (us < least) {
        least = us;
        best = tried;
      }
    }
  }
  return best;
}

std::string SumWay::name() const {
  return parts == 1 ? fmt::format("a warp a row, {} blocks", blocks)
                    : fmt::format("{} warps a row, {} blocks", parts, blocks);
}

void launch(const WeightedSum& what, const SumWay& way, const Stream& stream) {
  const OnGpu on(stream.device());
  WeightedSum launched = what;
  launched.parts = way.parts;
  launched.blocks = way.blocks;
  FUSCO_BENCH_CUDA(weightedSum(launched, stream.get()));
}

SumWay bestSum(World& world, int gpu, const WeightedSum& what) {
  SumWay best;
  double least = 1e30;
  for (const int parts : {1, 7, 28}) {
    for (const int factor : {2, 3, 4, 8, 16}) {
      const SumWay tried{parts, factor * world.sms()};
      const double us = timeOn(world, gpu, [&] { launch(what, tried, world.ofGpu(gpu)); });
      if (us < least) {
        least = us;
        best = tried;
      }
    }
  }
  return best;
}

}  // namespace fusco::bench::gpu
