// A case's tensors in GPU memory, the same for all implementations: tokens (rows by token) and experts' rows (rows in
// expert order), with the routing maps, and what it takes to fill them anew and to check them.
#pragma once

#include <cstdint>
#include <vector>

#include "shuffle/cuda/kernels.h"
#include "shuffle/cuda/world.h"
#include "shuffle/implementation.h"

namespace fusco::bench::gpu {

constexpr unsigned char kPoison = 0xa5;

// Whether a combine may round sums before they cross to another GPU, or as if to one (FUSCO_GPU_APART).
bool sumsCrossGpus(int gpus);

class Tensors {
 public:
  // Rows for any of `maps` (the same tokens, other experts). `capacity`: every rank's rows in expert order are as many
  // as the most that any rank gets.
  Tensors(World& world, const Options& options, Op op, const std::vector<const ShuffleMap*>& maps, bool capacity);
  // What it takes on the fullest GPU.
  static std::size_t bytesNeeded(const Options& options, const std::vector<const ShuffleMap*>& maps, int gpus,
                                 bool capacity);

  // The routing map that is shuffled from now on.
  void use(const ShuffleMap& map);
  const ShuffleMap& map() const { return *map_; }
  // New input from a seed, and output unlike any result.
  void refill(std::uint64_t seed);
  // Elements of all ranks' outputs that are not what they must be, after refill(seed).
  std::uint64_t wrong(std::uint64_t seed, bool scales);
  // Spoils one element of each rank's output.
  void spoil();

  std::size_t rowBytes() const { return rowBytes_; }
  std::size_t scaleBytes() const { return scaleBytes_; }  // of a row's scales; 0: none travel
  std::int64_t capacity() const { return capacity_; }     // rows; 0: exact
  Op op() const { return op_; }

  std::byte* tokens(int rank) const;
  std::byte* experts(int rank) const;
  std::byte* tokenScales(int rank) const;
  std::byte* expertScales(int rank) const;
  const std::int32_t* ids(int rank) const { return ids_[static_cast<std::size_t>(rank)].at(); }
  const float* weights(int rank) const { return weights_[static_cast<std::size_t>(rank)].at(); }

  // All rows of a GPU, and where a rank's begin among them.
  std::byte* tokensOfGpu(int gpu) const { return tokens_[static_cast<std::size_t>(gpu)].at(); }
  std::byte* expertsOfGpu(int gpu) const { return experts_[static_cast<std::size_t>(gpu)].at(); }
  std::int64_t tokenRowsOfGpu(int gpu) const { return tokenRows_[static_cast<std::size_t>(gpu)]; }
  std::int64_t expertRowsOfGpu(int gpu) const { return expertRows_[static_cast<std::size_t>(gpu)]; }
  const Place& tokenPlace(int rank) const { return tokenPlaces_[static_cast<std::size_t>(rank)]; }
  const Place& expertPlace(int rank) const { return expertPlaces_[static_cast<std::size_t>(rank)]; }

 private:
  std::vector<std::uint64_t> keysOfTokens(int rank, std::uint64_t seed) const;
  std::vector<std::uint64_t> keysOfReceived(int rank, std::uint64_t seed) const;
  std::vector<std::uint64_t> keysOfSlots(int rank, std::uint64_t seed) const;
  void fillRank(int rank, std::uint64_t seed);
  void checkRank(int rank, std::uint64_t seed, bool scales);

  World& world_;
  const bool sumsCross_;  // between GPUs, or as if: rounded once more
  const Options& options_;
  Op op_;
  const ShuffleMap* map_ = nullptr;
  std::size_t rowBytes_, scaleBytes_;
  std::int64_t capacity_ = 0;
  std::vector<Place> tokenPlaces_, expertPlaces_;
  std::vector<std::int64_t> tokenRows_, expertRows_;  // of each GPU
  std::vector<Memory> tokens_, experts_, tokenScales_, expertScales_;
  std::vector<List<std::int32_t>> ids_, rows_;  // [rank]: experts; final rows, negative where not routed
  std::vector<List<float>> weights_;
  std::vector<List<std::uint64_t>> keys_;  // [rank]: room for any of the lists of keys
  std::vector<Memory> wrong_;              // [rank]: one count
};

}  // namespace fusco::bench::gpu
