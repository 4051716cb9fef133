// What the ranks and the program that started them share.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <functional>

#include "fusco/nccl.h"
#include "moe_nccl/layer.h"
#include "moe_nccl/options.h"

namespace fusco::bench::moe {

// One step of one rank.
struct Sample {
  std::int64_t beginNs, endNs;
  std::int64_t parts[kParts];
};

class Board {
 public:
  Board(const Options& options);
  ~Board();
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  // For ranks. They sleep until all have come.
  void meet();
  ncclUniqueId id(int rank);

  Sample& sample(int rank, std::size_t state, int round, int iteration);
  std::atomic<std::uint64_t>& wrong(int rank, std::size_t state);

  // Forks the ranks, waits for them, ends those that are left when one fails or time is up. True: all ended well.
  bool run(const std::function<void(int rank)>& body);

 private:
  struct Head {
    pthread_barrier_t barrier;
    ncclUniqueId id;
  };

  const Options& options_;
  std::size_t bytes_;
  Head* head_;
  std::atomic<std::uint64_t>* wrong_;
  Sample* samples_;
};

}  // namespace fusco::bench::moe
