// fusco, through its public header only.
#pragma once

#include <memory>

#include "shuffle/implementation.h"

namespace fusco::bench {

// A rank's communicator, made at the first use and kept for all cases.
class FuscoRank {
 public:
  FuscoRank(Session& session, const Options& options, int rank);
  ~FuscoRank();
  FuscoRank(const FuscoRank&) = delete;
  FuscoRank& operator=(const FuscoRank&) = delete;

  // "fusco". All ranks together.
  std::unique_ptr<Implementation> make(const CaseContext& context);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fusco::bench
