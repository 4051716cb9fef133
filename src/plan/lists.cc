// The lists of a plan (copies, entries, weights), from the routing map and its counts, in two passes: the first deals
// the slots out to nodes, onto the list of entries; the second goes from node to node and makes entries of them where
// they lie.
//
// What takes the time is not the arithmetic but loads that wait for stores. Counters are loaded and stored at places
// that repeat, so a core lets such a load wait until it knows where all stores before it go; if one of those addresses
// is itself a counter that was just loaded, slots go by one at a time. Hence the rule: no address comes out of a
// counter close to the next load of one. The first pass advances the counters of a batch of tokens before it stores
// anything at the places that they gave; in the second, addresses come out of the items alone.
#include <algorithm>
#include <bit>
#include <cstring>

#include "plan/planner.h"

namespace fusco::plan {

namespace {

constexpr std::uint64_t kNextRow = std::uint64_t{1} << 32;        // added to an Entry in one piece
constexpr std::uint32_t kMark = std::uint32_t{kDuplicate} << 16;  // where an Entry has it
constexpr int kBatch = 64;                                        // slots whose places are found before any is stored

std::uint64_t load64(const void* from) {
  std::uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

void store64(void* to, std::uint64_t word) { std::memcpy(to, &word, sizeof word); }

// A slot on its way to its entry: key << 32 | token plus 1 | place in the token's top-k. The lower two fit into 32
// bits: tokens x top-k is less than 2^31, and the power of two that holds top-k is less than twice top-k.
class Items {
 public:
  explicit Items(int topk) : topk_(static_cast<unsigned>(topk)), bits_(std::bit_width(topk_ - 1)) {}
  std::uint64_t of(std::uint64_t key, std::int64_t token, int slot) const {
    return (key << 32) + (static_cast<std::uint64_t>(token + 1) << bits_) + slot;
  }
  static std::uint32_t key(std::uint64_t item) { return static_cast<std::uint32_t>(item >> 32); }
  std::uint32_t stamp(std::uint64_t item) const { return static_cast<std::uint32_t>(item) >> bits_; }
  std::uint32_t slot(std::uint64_t item) const { return static_cast<std::uint32_t>(item) & ((1u << bits_) - 1); }
  // In the routing map.
  std::size_t place(std::uint64_t item) const {
    if (topk_ == 1u << bits_) return static_cast<std::uint32_t>(item) - topk_;
    return std::size_t{stamp(item) - 1} * topk_ + slot(item);
  }

 private:
  unsigned topk_;
  int bits_;
};

}  // namespace

// kTopk: the map's, if it is known to the compiler, else 0.
template <typename Id, bool kByRank, int kTopk>
void Planner::dealSlots(const RoutingMap& map, const Lists& lists) {
  const int topk = kTopk != 0 ? kTopk : map.topk;
  const Items items(topk);
  const std::uint32_t* nodeOf = nodeOfKey_.data() + 1;
  const std::int32_t* rankOf = rankOfExpert_.data() + 1;
  std::uint32_t* next = nextItem_.data();
  std::uint32_t* rankStamp = rankStamp_.data() + 1;
  const auto keyOf = [=](std::int64_t expert) -> std::int64_t { return kByRank ? rankOf[expert] : expert; };
  const std::int64_t step = std::max(1, kBatch / topk);
  places_.resize(static_cast<std::size_t>(step) * topk);
  const Id* id = static_cast<const Id*>(map.ids);
  Entry* const itemList = lists.entries;
  for (std::int64_t begin = 0; begin < map.tokens; begin += step) {
    const std::int64_t end = std::min(map.tokens, begin + step);
    std::uint32_t* place = places_.data();
    const Id* batch = id;
    for (std::int64_t token = begin; token < end; ++token, id += topk, place += topk) {
      for (int slot = 0; slot < topk; ++slot) {
        const std::int64_t key = keyOf(id[slot]);
        std::uint32_t node = nodeOf[key];
        if constexpr (kByRank) {
          const auto stamp = static_cast<std::uint32_t>(token + 1);
          node = rankStamp[key] == stamp ? nowhere() : node;
          rankStamp[key] = stamp;
        }
        place[slot] = next[node]++;
      }
    }
    place = places_.data();
    id = batch;
    for (std::int64_t token = begin; token < end; ++token, id += topk, place += topk) {
      for (int slot = 0; slot < topk; ++slot) {
        store64(itemList + place[slot], items.of(keyOf(id[slot]), token, slot));
      }
    }
  }
}

// The items [begin, end) become the next entries, and the next copies are made of them. kDeduped: a copy holds all
// entries of its token, else one.
template <bool kLimited, bool kDeduped, bool kWeighted, int kTopk>
void Planner::layNode(const RoutingMap& map, std::uint32_t begin, std::uint32_t end, const Lists& lists, Made& made) {
  const Items items(kTopk != 0 ? kTopk : map.topk);
  Entry* const entries = lists.entries;
  Copy* const copies = lists.copies - 1;  // numbered from 1 here, so that 0 is none
  float* const weights = lists.weights;
  const float* const weightOf = map.weights;
  const std::uint16_t* localOf = localOfKey_.data();
  const std::uint32_t* endRow = endRow_.data();
  std::uint64_t* next = nextEntry_.data();
  std::uint32_t* lastCopyTo = lastCopyTo_.data();
  std::size_t entry = made.entries;
  std::uint64_t copy = made.copies;  // the last one that was begun
  // What a Copy is, less the stamp of its token: of the next entry, of the copy's first.
  std::uint64_t ofNext = (std::uint64_t{made.entries} << 32) - 1, ofCopy = 0;
  std::uint32_t begun = 0;  // up to this stamp tokens have their copy
  for (std::size_t at = begin; at < end; ++at) {
    const std::uint64_t item = load64(entries + at);
    const std::uint32_t key = Items::key(item);
    const std::uint32_t stamp = items.stamp(item);
    const std::uint64_t row = next[key];
    next[key] = row + kNextRow;
    if (kLimited && row >> 32 >= endRow[key]) continue;
    // No branches, which would be coin tosses: a copy that is there already is stored again.
    ofCopy = begun < stamp ? ofNext : ofCopy;
    copy += begun < stamp;
    if (kDeduped) begun = stamp;
    store64(copies + copy, ofCopy + stamp);
    const std::uint32_t local = localOf[key];
    const std::uint32_t isFresh = 0u - (lastCopyTo[local] < static_cast<std::uint32_t>(copy));
    lastCopyTo[local] = static_cast<std::uint32_t>(copy);
    if (kWeighted) weights[kLimited ? entry : at] = weightOf[items.place(item)];
    store64(entries + (kLimited ? entry : at), (row | std::uint64_t{items.slot(item)} << 16) ^ (kMark & isFresh));
    if (kLimited) ++entry;
    ofNext += kNextRow;
  }
  if (!kLimited) entry = end;
  made.entries = static_cast<std::uint32_t>(entry);
  made.copies = static_cast<std::uint32_t>(copy);
}

void Planner::layFlows(int node, std::uint32_t begin, std::uint32_t end, Flow*& flow) const {
  if (node == topology_->nodeOf(rank_)) {
    *flow++ = {node, rank_, 0, begin, end};
    return;
  }
  const std::uint64_t copies = end - begin;
  std::uint64_t cumulated = 0;
  std::uint32_t from = begin;
  for (const FlowShare& share : topology_->flowsTo(rank_, node)) {
    cumulated += share.share;
    const std::uint32_t to = begin + static_cast<std::uint32_t>(copies * cumulated / 65536);
    *flow++ = {node, share.forwarder, share.lane, from, to};
    from = to;
  }
}

template <bool kLimited, int kTopk>
Planner::Made Planner::layNodes(const RoutingMap& map, bool copyPerEntry, const Analysis& analysis, const Lists& lists,
                                Flow* flow) {
  const bool weighted = map.weights != nullptr;
  const auto layOne = copyPerEntry ? (weighted ? &Planner::layNode<kLimited, false, true, kTopk>
                                               : &Planner::layNode<kLimited, false, false, kTopk>)
                                   : (weighted ? &Planner::layNode<kLimited, true, true, kTopk>
                                               : &Planner::layNode<kLimited, true, false, kTopk>);
  lastCopyTo_.assign(mostRanksOfNode_, 0);
  Made made{};
  std::uint32_t begin = 0;
  for (int node = 0; node < topology_->nodes(); ++node) {
    const std::uint32_t end = begin + static_cast<std::uint32_t>(analysis.entriesOfNode[node]);
    const std::uint32_t copies = made.copies;
    (this->*layOne)(map, begin, end, lists, made);
    layFlows(node, copies, made.copies, flow);
    begin = end;
  }
  return made;
}

template <typename Id, int kTopk>
Planner::Made Planner::makeLists(const RoutingMap& map, const Options& options, const Analysis& analysis, bool limited,
                                 const Lists& lists, Flow* flows) {
  const int nodes = topology_->nodes();
  nextItem_.resize(nodes + 1);
  std::uint32_t items = 0;
  for (int node = 0; node < nodes; ++node) {
    nextItem_[node] = items;
    items += static_cast<std::uint32_t>(analysis.entriesOfNode[node]);
  }
  nextItem_[nowhere()] = items;  // behind all others, where they are overwritten or cleared
  if (options.layout == Layout::rankOrder) {
    rankStamp_.assign(1 + topology_->ranks(), 0);
    dealSlots<Id, true, kTopk>(map, lists);
  } else {
    dealSlots<Id, false, kTopk>(map, lists);
  }
  const bool copyPerEntry = options.dedup == Dedup::none;
  return limited ? layNodes<true, kTopk>(map, copyPerEntry, analysis, lists, flows)
                 : layNodes<false, kTopk>(map, copyPerEntry, analysis, lists, flows);
}

Planner::Made Planner::makeLists(const RoutingMap& map, const Options& options, const Analysis& analysis, bool limited,
                                 const Lists& lists, Flow* flows) {
  const auto make = [&]<typename Id>(Id) {
    return map.topk == kUsualTopk ? makeLists<Id, kUsualTopk>(map, options, analysis, limited, lists, flows)
                                  : makeLists<Id, 0>(map, options, analysis, limited, lists, flows);
  };
  return map.idBytes == 4 ? make(std::int32_t{}) : make(std::int64_t{});
}

}  // namespace fusco::plan
