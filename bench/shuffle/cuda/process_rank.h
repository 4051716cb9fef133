// A rank of shuffle_perf --device cuda --processes: fusco on its own GPU or on its part of one, timed as on the host.
#pragma once

#include <memory>

#include "shuffle/implementation.h"
#include "shuffle/machine.h"

namespace fusco::bench::gpu {

// Everything of CUDA happens in the rank's process: the driver does not survive a fork.
class ProcessRank {
 public:
  ProcessRank(Session& session, const Options& options, int rank);
  ~ProcessRank();
  ProcessRank(const ProcessRank&) = delete;
  ProcessRank& operator=(const ProcessRank&) = delete;

  // "fusco", dispatch or combine. All ranks together.
  std::unique_ptr<Implementation> make(const CaseContext& context);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Which GPUs there are, as far as they are used; once the ranks have been forked. Throws where there is none.
void describeGpus(const Options& options, Machine& machine);

}  // namespace fusco::bench::gpu
