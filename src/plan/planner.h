// The planner with its tables and scratch: for whoever plans step after step. The free functions of plan/plan.h make
// one for a single call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace fusco::plan {

// Not for use by two threads at once. `topology` must outlive it; changed flows are seen at the next call. The ids of a
// routing map must not change between analyse and makePlan: only analyse checks them.
class Planner {
 public:
  Planner(const Topology& topology, int rank);
  // From now on by this one, which differs from the one before in its flows only.
  void use(const Topology& topology) { topology_ = &topology; }

  void analyse(const RoutingMap& map, const Options& options, Analysis& result);
  std::uint64_t arenaBytes(const RoutingMap& map, const Options& options) const;
  void makePlan(const RoutingMap& map, const Options& options, const Analysis& analysis, const Exchanged& exchanged,
                void* arena);

 private:
  // Where an expert lives.
  struct Home {
    std::uint32_t rank;
    std::uint16_t node;
    std::uint16_t local;  // index of the rank in its node
  };
  // What is left to fill of one node: the last token seen (plus 1), the next copy and the next entry.
  struct alignas(16) Cursor {
    std::uint32_t stamp;
    std::uint32_t copy;
    std::uint32_t entry;
  };

  void checkShape(const RoutingMap& map, const Options& options) const;
  void useExperts(int experts);
  template <typename Id, bool kByRank>
  void count(const RoutingMap& map, bool copyPerEntry, Analysis& result);
  template <typename Id, bool kByRank, bool kLimited, typename Visit>
  void walk(const RoutingMap& map, bool copyPerEntry, Visit visit);
  template <typename Id, bool kByRank>
  void lay(const RoutingMap& map, const Options& options, const Analysis& analysis, const ArenaOffsets& offsets,
           std::byte* arena);
  std::int64_t layRows(const RoutingMap& map, const Options& options, const Exchanged& exchanged, std::int32_t* rowBase,
                       std::int32_t* localExpertRows, std::int32_t* localExpertStart);
  void checkExchanged(const Options& options, const Analysis& analysis, const Exchanged& exchanged, int keys) const;

  const Topology* topology_;
  int rank_;
  int experts_ = -1;
  std::vector<Home> homes_;               // [experts]
  std::vector<Cursor> cursors_;           // [nodes]
  std::vector<std::uint32_t> rankStamp_;  // [ranks], the last token (plus 1) that went to a rank
  std::vector<std::uint32_t> nextRow_;    // [keys]
  std::vector<std::uint32_t> endRow_;     // [keys], the first row that is out of bounds
};

}  // namespace fusco::plan
