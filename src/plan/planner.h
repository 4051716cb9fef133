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
  static constexpr int kUsualTopk = 8;  // the one for which loops over a token's slots are unrolled

  // The sections of an arena that hold lists, and how much of them there is already.
  struct Lists {
    Copy* copies;
    Entry* entries;
    float* weights;
  };
  struct Made {
    std::uint32_t copies;
    std::uint32_t entries;
  };

  void checkShape(const RoutingMap& map, const Options& options) const;
  void useKeys(const RoutingMap& map, const Options& options);
  // The node of slots that go nowhere: behind all others.
  std::uint32_t nowhere() const { return static_cast<std::uint32_t>(topology_->nodes()); }

  template <typename Id, bool kByRank, int kTopk, typename Copies>
  void count(const RoutingMap& map, Copies copies);
  template <typename Id, bool kByRank, int kTopk>
  void dealSlots(const RoutingMap& map, const Lists& lists);
  template <bool kLimited, bool kDeduped, bool kWeighted, int kTopk>
  void layNode(const RoutingMap& map, std::uint32_t begin, std::uint32_t end, const Lists& lists, Made& made);
  template <bool kLimited, int kTopk>
  Made layNodes(const RoutingMap& map, bool copyPerEntry, const Analysis& analysis, const Lists& lists, Flow* flow);
  void layFlows(int node, std::uint32_t begin, std::uint32_t end, Flow*& flow) const;
  template <typename Id, int kTopk>
  Made makeLists(const RoutingMap& map, const Options& options, const Analysis& analysis, bool limited,
                 const Lists& lists, Flow* flows);
  Made makeLists(const RoutingMap& map, const Options& options, const Analysis& analysis, bool limited,
                 const Lists& lists, Flow* flows);
  bool beginRows(const Options& options, const Analysis& analysis, const std::int32_t* rowBase);
  std::int64_t layRows(const RoutingMap& map, const Options& options, const Exchanged& exchanged, std::int32_t* rowBase,
                       std::int32_t* localExpertRows, std::int32_t* localExpertStart);
  void checkExchanged(const Options& options, const Analysis& analysis, const Exchanged& exchanged, int keys) const;

  const Topology* topology_;
  int rank_;
  int mostRanksOfNode_;

  // Tables. The first place of some is that of expert or rank -1, which is nowhere, so that nobody has to ask for it.
  int experts_ = -1;
  bool byRank_ = false;
  std::vector<std::int32_t> firstExpert_;   // [ranks + 1]
  std::vector<std::int32_t> rankOfExpert_;  // [1 + experts]
  std::vector<std::uint32_t> nodeOfKey_;    // [1 + keys]
  std::vector<std::uint16_t> localOfKey_;   // [keys], index of the rank in its node

  // Scratch.
  std::vector<std::int32_t> rows_;         // [1 + keys]
  std::vector<std::uint32_t> rankStamp_;   // [1 + ranks], the last token (plus 1) that went to a rank
  std::vector<std::uint32_t> nodeStamp_;   // [nodes + 1], the same of nodes
  std::vector<std::int32_t> nodeCopies_;   // [nodes + 1]
  std::vector<std::uint64_t> nodeBytes_;   // [1 + keys], 1 in the byte of the key's node
  std::vector<std::uint32_t> nextItem_;    // [nodes + 1]
  std::vector<std::uint32_t> places_;      // of the items of a batch
  std::vector<std::uint64_t> nextEntry_;   // [keys], an Entry of slot 0 with kDuplicate set
  std::vector<std::uint32_t> endRow_;      // [keys], the first row that is out of bounds
  std::vector<std::uint32_t> lastCopyTo_;  // [ranks of the node], the number of the last copy (plus 1) to a rank
};

}  // namespace fusco::plan
