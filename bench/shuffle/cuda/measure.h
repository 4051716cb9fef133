// Measures a case on GPUs: every implementation is checked, they take turns, and rows are made of what was seen.
#pragma once

#include "shuffle/cuda/implementation.h"
#include "shuffle/cuda/watchdog.h"
#include "shuffle/measure.h"

namespace fusco::bench::gpu {

class Measurer {
 public:
  Measurer(World& world, const Options& options, Watchdog& watchdog, std::vector<std::string> impls,
           std::shared_ptr<Nccl> nccl);
  // `second`: another routing map of the same shape, for what plans anew when it is replayed.
  CaseResult measure(const CaseContext& context, const ShuffleMap& second);

 private:
  struct Contender;

  bool wants(const std::string& impl) const;
  // Takes a contender in, or says in the result why not.
  void add(std::vector<Contender>& all, const std::string& name, CaseResult& result,
           const std::function<std::unique_ptr<Shuffle>()>& make);
  std::shared_ptr<Communicators> communicators(int sms);
  void capture(Contender& contender);
  void once(Contender& contender);
  double sample(Contender& contender);
  std::uint64_t check(Contender& contender, Tensors& tensors, const ShuffleMap& second);
  void measureAll(std::vector<Contender>& all, Tensors& tensors, const ShuffleMap& second, CaseResult& result);
  Row rowOf(const Contender& contender, const CaseContext& context, const CaseSize& size) const;

  World& world_;
  const Options& options_;
  Watchdog& watchdog_;
  std::vector<std::string> impls_;
  std::shared_ptr<Nccl> nccl_;
  std::shared_ptr<Communicators> communicators_;
  int sms_ = 0;
  std::uint64_t checks_ = 0;  // each with data of its own
};

}  // namespace fusco::bench::gpu
