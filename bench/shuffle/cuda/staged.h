// The buffers and lists of a staged shuffle, with its passes in front of what travels and behind it.
#pragma once

#include "shuffle/cuda/passes.h"
#include "shuffle/cuda/staged_lists.h"

namespace fusco::bench::gpu {

class Stages {
 public:
  Stages(World& world, Tensors& tensors, const Options& options);
  static std::size_t bytesNeeded(const Tensors& tensors, const World& world, int topk);

  // dispatch: tokens into packed order; combine: experts' rows into the order in which they came.
  void before(int gpu);
  void beforeOfRank(int rank);
  // dispatch: what came into expert order; combine: the weighted sums of what came back.
  void after(int gpu);
  void afterOfRank(int rank);
  // What goes from a rank to another, and where it lies there.
  Segment piece(int from, int to) const;
  std::string remark() const;

 private:
  void build();
  std::int64_t packedFirst(int rank) const { return packedFirst_[static_cast<std::size_t>(rank)]; }
  std::int64_t arrivedFirst(int rank) const { return arrivedFirst_[static_cast<std::size_t>(rank)]; }
  std::byte* packedAt(int rank, std::int64_t row) const;
  std::byte* arrivedAt(int rank, std::int64_t row) const;
  Replicate permute(int gpu) const;
  Replicate sorting(int gpu) const;
  Replicate unsorting(int gpu) const;
  WeightedSum sum(int gpu) const;

  World& world_;
  Tensors& tensors_;
  const Options& options_;
  StagedLists lists_;
  std::vector<std::int64_t> packedFirst_, arrivedFirst_;  // [rank], in rows of its GPU's buffers
  std::vector<std::int64_t> arrivedRows_;                 // [GPU]
  std::vector<Memory> packed_, arrived_;
  std::vector<List<std::uint32_t>> packedPlaces_, finalPlaces_, arrivalPlaces_;  // [GPU]
  std::vector<List<float>> weights_;
  std::vector<ReplicateWay> beforeWay_, afterWay_;
  std::vector<SumWay> sumWay_;
};

}  // namespace fusco::bench::gpu
