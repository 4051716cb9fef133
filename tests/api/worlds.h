// The worlds that tests of the C API run in: how ranks are spread and how they reach each other's memory.
#pragma once

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <vector>

#include "patience.h"
#include "shuffle/case.h"
#include "shuffle/ranks.h"

namespace fusco::test {

inline const World kThreads{"threads", 2, 2, {}, true, 16384};
inline const World kProcesses{"processes", 2, 1, {}, true, 16384};
inline const World kStaged{"processes without process_vm", 2, 1, {}, false, 16384};
inline const World kTwoNodes{"two nodes of one", 2, 1, {0, 1}, true, 16384};
inline const World kThreadNodes{"two nodes of threads", 4, 4, {0, 0, 1, 1}, true, 8192};
inline const World kMixed{"two nodes, processes of two threads", 4, 2, {0, 1, 0, 1}, true, 8192};
inline const std::vector<World> kEveryWorld{kThreads, kProcesses, kStaged, kTwoNodes, kThreadNodes, kMixed};

// Every rank must end without a word.
inline void runWell(const World& world, const std::function<void(Rank&)>& body, int seconds = kWorldSeconds) {
  const std::vector<std::string> texts = runRanks(world, body, seconds);
  for (std::size_t r = 0; r < texts.size(); ++r) EXPECT_EQ(texts[r], "") << world.name << ", rank " << r;
}
inline void runEverywhere(const std::function<void(Rank&)>& body) {
  for (const World& world : kEveryWorld) runWell(world, body);
}

// A whole shuffle, checked: the communicator still works.
inline void shuffleWorks(Rank& self, fuscoComm_t comm, std::uint64_t seed = 4711) {
  const std::string wrong = runRank(randomCase(seed, self.ranks()), comm, self.rank());
  if (!wrong.empty()) throw std::runtime_error("afterwards: " + wrong);
}
inline void leave(fuscoComm_t comm) {
  FUSCO_OK(fuscoCommFinalize(comm));
  FUSCO_OK(fuscoCommDestroy(comm));
}

// For a rank that is a process of its own, before its first call: limits do not hold the superuser.
inline void becomeNobody() {
  if (geteuid() == 0) require(setgid(65534) == 0 && setuid(65534) == 0, "cannot become nobody");
}
// While it lives this process gets no further thread.
class NoMoreThreads {
 public:
  NoMoreThreads() {
    require(getrlimit(RLIMIT_NPROC, &before_) == 0, "getrlimit");
    rlimit none = before_;
    none.rlim_cur = 1;
    require(setrlimit(RLIMIT_NPROC, &none) == 0, "setrlimit");
  }
  ~NoMoreThreads() { setrlimit(RLIMIT_NPROC, &before_); }
  NoMoreThreads(const NoMoreThreads&) = delete;
  NoMoreThreads& operator=(const NoMoreThreads&) = delete;

 private:
  rlimit before_{};
};

// A routing map of `tokens` tokens whose ids are token, token + 1, ... modulo the number of experts.
struct Routing {
  Routing(std::int64_t tokens, int topk, int experts) : ids(static_cast<std::size_t>(tokens * topk)) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (int k = 0; k < topk; ++k) ids[static_cast<std::size_t>(t * topk + k)] = (t + k) % experts;
    }
    config.expertIds = ids.data();
    config.tokens = tokens;
    config.topk = topk;
    config.experts = experts;
  }
  Routing(const Routing&) = delete;
  std::vector<std::int64_t> ids;
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  fuscoPlan_t make(fuscoComm_t comm) const {
    fuscoPlan_t plan = nullptr;
    FUSCO_OK(fuscoPlanCreate(&plan, &config, comm, nullptr));
    return plan;
  }
};
inline std::int64_t receiveRows(fuscoPlan_t plan) {
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  FUSCO_OK(fuscoPlanGetInfo(plan, &info));
  return info.receiveRows;
}

}  // namespace fusco::test
