// A fixed shuffle for runs that are compared: a rank's routing, the same in every run, and what is left of bytes.
#pragma once

#include <fusco/fusco.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "shuffle/case.h"

namespace fusco::test {

struct Routed {
  int tokens, topk, experts;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;

  Routed(unsigned seed, int tokensOfRank, int slots, int ofExperts)
      : tokens(tokensOfRank),
        topk(slots),
        experts(ofExperts),
        ids(static_cast<std::size_t>(tokensOfRank) * static_cast<std::size_t>(slots)),
        weights(ids.size()) {
    std::mt19937 random(seed);
    for (std::int64_t& id : ids) id = static_cast<std::int64_t>(random() % static_cast<unsigned>(experts));
    for (float& weight : weights) weight = static_cast<float>(random() % 1000) / 1000;
  }

  // Whether a token has an expert on the node, of two that share the experts.
  bool wants(int token, int node) const {
    for (int k = 0; k < topk; ++k) {
      if (ids[static_cast<std::size_t>(token * topk + k)] / (experts / 2) == node) return true;
    }
    return false;
  }

  // The routing has to stay until the call has returned.
  fuscoPlan_t plan(fuscoComm_t comm) const {
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = ids.data();
    config.weights = weights.data();
    config.tokens = tokens;
    config.topk = topk;
    config.experts = experts;
    fuscoPlan_t made = nullptr;
    FUSCO_OK(fuscoPlanCreate(&made, &config, comm, nullptr));
    return made;
  }
};

// Finite BF16 numbers of both signs.
inline void fillNumbers(void* rows, std::size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  for (std::size_t i = 0; i < bytes / 2; ++i)
    static_cast<std::uint16_t*>(rows)[i] = static_cast<std::uint16_t>(random() & 0xbfff);
}

inline std::uint64_t hashOf(const void* bytes, std::size_t count) {
  std::uint64_t hash = 14695981039346656037u;
  for (std::size_t i = 0; i < count; ++i) hash = (hash ^ static_cast<const std::uint8_t*>(bytes)[i]) * 1099511628211u;
  return hash;
}

}  // namespace fusco::test
