// The passes of a staged shuffle on one GPU, by the best kernel that the benchmark has for each.
#pragma once

#include "bench/gpu/limit.h"
#include "shuffle/cuda/implementation.h"

namespace fusco::bench::gpu {

// Something for each slot of each token of a GPU, rank by rank; `pad` where no token is.
template <typename T, typename Function>
std::vector<T> slotsOfGpu(const World& world, const Tensors& tensors, int gpu, const Function& of, T pad) {
  const auto topk = static_cast<std::size_t>(tensors.map().topk);
  std::vector<T> all(static_cast<std::size_t>(tensors.tokenRowsOfGpu(gpu)) * topk, pad);
  for (int r = 0; r < world.ranks(); ++r) {
    if (world.gpuOf(r) != gpu) continue;
    const std::size_t first = static_cast<std::size_t>(tensors.tokenPlace(r).first) * topk;
    const std::size_t slots =
        static_cast<std::size_t>(tensors.map().routing[static_cast<std::size_t>(r)].tokens) * topk;
    for (std::size_t i = 0; i < slots; ++i) all[first + i] = of(r, i);
  }
  return all;
}

// A launch of Replicate: the way and the blocks that were the fastest on this GPU.
struct ReplicateWay {
  int way = 0, blocks = 0;
  std::string name() const;
};
ReplicateWay bestReplicate(World& world, int gpu, const Replicate& what);
void launch(const Replicate& what, const ReplicateWay& way, const Stream& stream);

struct SumWay {
  int parts = 1, blocks = 1;
  std::string name() const;
};
SumWay bestSum(World& world, int gpu, const WeightedSum& what);
void launch(const WeightedSum& what, const SumWay& way, const Stream& stream);

}  // namespace fusco::bench::gpu
