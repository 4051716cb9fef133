// The third step of planning: the arena, from the counts and what the exchange brought.
#include "plan/plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "base/status.h"
#include "plan/planner.h"

namespace fusco::plan {

namespace {

constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();

[[noreturn]] void refuse(int rank, const std::string& what) {
  fail(Code::invalidArgument, "plan of rank " + std::to_string(rank) + ": " + what);
}

// Two 32-bit halves in one store; the first half lies lower, as in Copy and Entry.
void storePair(void* to, std::uint32_t first, std::uint32_t second) {
  const std::uint64_t both = first | std::uint64_t{second} << 32;
  std::memcpy(to, &both, sizeof both);
}

template <typename T>
T* at(std::byte* arena, std::uint64_t offset) {
  return reinterpret_cast<T*>(arena + offset);
}

void zero(std::byte* arena, std::uint64_t begin, std::uint64_t end) { std::memset(arena + begin, 0, end - begin); }

}  // namespace

// Visits the entries in the order of tokens, then slots: visit(copy, whether the entry is its first, entry, token,
// place in the routing map, rank and slot as an Entry has them, row); copy and entry are the next of their node.
// `visit` is taken by value, so that what it holds can stay in registers. nextRow_ holds each key's first row and is
// used up.
template <typename Id, bool kByRank, bool kLimited, typename Visit>
void Planner::walk(const RoutingMap& map, bool copyPerEntry, Visit visit) {
  const Id* id = static_cast<const Id*>(map.ids);
  const std::uint64_t experts = map.experts;
  const bool perEntry = copyPerEntry;
  const std::uint32_t duplicateMark = copyPerEntry ? 0 : kDuplicate;
  const Home* homes = homes_.data();
  Cursor* cursors = cursors_.data();
  std::uint32_t* rankStamp = rankStamp_.data();
  std::uint32_t* nextRow = nextRow_.data();
  const std::uint32_t* endRow = endRow_.data();
  std::fill(rankStamp_.begin(), rankStamp_.end(), 0);
  const std::uint32_t topk = map.topk;
  const std::int64_t tokens = map.tokens;
  std::size_t at = 0;
  for (std::int64_t token = 0; token < tokens; ++token) {
    const auto stamp = static_cast<std::uint32_t>(token + 1);
    for (std::uint32_t slot = 0; slot < topk; ++slot, ++at) {
      const std::int64_t expert = id[at];
      if (static_cast<std::uint64_t>(expert) >= experts) [[unlikely]]
        continue;  // -1: analyse has refused all others
      const Home home = homes[expert];
      std::uint32_t markedSlot = slot;
      std::uint32_t row;
      if constexpr (kByRank) {
        if (rankStamp[home.rank] == stamp) continue;
        rankStamp[home.rank] = stamp;
        row = nextRow[home.rank]++;
        if (kLimited && row >= endRow[home.rank]) continue;
      } else {
        row = nextRow[expert]++;
        if (kLimited && row >= endRow[expert]) continue;
        markedSlot |= duplicateMark & (0u - (rankStamp[home.rank] == stamp));
        rankStamp[home.rank] = stamp;
      }
      // What is left to fill of the node is read and written in one piece each: stores are what this loop is made of.
      Cursor& cursor = cursors[home.node];
      std::uint64_t both;
      std::memcpy(&both, &cursor, sizeof both);
      const bool isNewCopy = perEntry | (static_cast<std::uint32_t>(both) != stamp);
      const auto copy = static_cast<std::uint32_t>(both >> 32);
      storePair(&cursor, stamp, copy + isNewCopy);
      visit(copy, isNewCopy, cursor.entry++, static_cast<std::uint32_t>(token), at, home.local | markedSlot << 16, row);
    }
  }
}

// Rows of the output as this rank sees it as receiver, and the first row of each key as it sees it as sender. Returns
// the rows that this rank receives.
std::int64_t Planner::layRows(const RoutingMap& map, const Options& options, const Exchanged& exchanged,
                              std::int32_t* rowBase, std::int32_t* localExpertRows, std::int32_t* localExpertStart) {
  const int ranks = topology_->ranks();
  const std::int64_t capacity = options.capacityRows > 0 ? options.capacityRows : kMaxRows;
  const int mine = topology_->expertsOf(rank_, map.experts);
  if (options.layout == Layout::rankOrder) {
    std::copy(exchanged.before.begin(), exchanged.before.end(), rowBase);
    std::fill_n(localExpertRows, mine, 0);
    std::fill_n(localExpertStart, mine + 1, 0);
    return std::min<std::int64_t>(exchanged.total[rank_], capacity);
  }
  int expert = 0;
  std::int64_t receiveRows = 0;
  for (int rank = 0; rank < ranks && expert < map.experts; ++rank) {
    const int end = expert + topology_->expertsOf(rank, map.experts);
    std::int64_t start = 0;
    for (int local = 0; expert < end; ++expert, ++local) {
      std::int64_t rows = 0;
      if (options.layout == Layout::slotted) {
        rows = ranks * options.maxTokens;
        rowBase[expert] = static_cast<std::int32_t>(start + rank_ * options.maxTokens);
      } else {
        rows = exchanged.total[expert];
        rowBase[expert] = static_cast<std::int32_t>(start + exchanged.before[expert]);
      }
      if (rank == rank_) {
        localExpertStart[local] = static_cast<std::int32_t>(std::min(start, capacity));
        localExpertRows[local] = static_cast<std::int32_t>(std::clamp<std::int64_t>(capacity - start, 0, rows));
      }
      start += rows;
      if (options.alignment > 1) start = (start + options.alignment - 1) / options.alignment * options.alignment;
      if (start > kMaxRows) {
        refuse(rank_, "rank " + std::to_string(rank) + " would receive " + std::to_string(start) +
                          " rows, more than 2^31 - 1; split the batch");
      }
    }
    if (rank == rank_) receiveRows = std::min(start, capacity);
  }
  localExpertStart[mine] = static_cast<std::int32_t>(receiveRows);
  return receiveRows;
}

void Planner::checkExchanged(const Options& options, const Analysis& analysis, const Exchanged& exchanged,
                             int keys) const {
  if (analysis.rowsOfKey.size() != static_cast<std::size_t>(keys) ||
      analysis.copiesOfNode.size() != static_cast<std::size_t>(topology_->nodes()) ||
      analysis.entriesOfNode.size() != static_cast<std::size_t>(topology_->nodes())) {
    refuse(rank_, "the analysis was made for another shape; analyse this routing map with these options first");
  }
  if (options.layout == Layout::slotted) return;
  if (exchanged.before.size() != static_cast<std::size_t>(keys) ||
      exchanged.total.size() != static_cast<std::size_t>(keys)) {
    refuse(rank_, "the exchange brought " + std::to_string(exchanged.before.size()) + " and " +
                      std::to_string(exchanged.total.size()) + " counts for " + std::to_string(keys) + " keys");
  }
  const std::int32_t* rows = analysis.rowsOfKey.data();
  const std::int32_t* before = exchanged.before.data();
  const std::int32_t* total = exchanged.total.data();
  std::uint32_t bad = 0;
  for (int key = 0; key < keys; ++key) {
    // Also catches sums that wrapped around: no count and no difference may be negative.
    const std::uint32_t first = before[key], all = total[key], mine = rows[key];
    bad |= first | all | (all - first) | (all - first - mine);
  }
  for (int key = 0; bad >> 31 != 0 && key < keys; ++key) {
    if (before[key] >= 0 && total[key] >= 0 && std::int64_t{before[key]} + rows[key] <= total[key]) continue;
    refuse(rank_, "key " + std::to_string(key) + " has " + std::to_string(rows[key]) + " rows here, " +
                      std::to_string(before[key]) + " before and " + std::to_string(total[key]) +
                      " in all; the counts do not fit together, or exceed 2^31 - 1");
  }
}

template <typename Id, bool kByRank>
void Planner::lay(const RoutingMap& map, const Options& options, const Analysis& analysis, const ArenaOffsets& offsets,
                  std::byte* arena) {
  auto* header = at<ArenaHeader>(arena, 0);
  const auto* rowBase = at<const std::int32_t>(arena, offsets.rowBase);
  const int nodes = topology_->nodes();
  const bool copyPerEntry = options.dedup == Dedup::none;
  const int keys = static_cast<int>(analysis.rowsOfKey.size());

  // Which keys run past their end. In the slotted layout an expert that one token names twice may fill its block.
  const std::int64_t capacity = options.capacityRows > 0 ? options.capacityRows : kMaxRows;
  const std::int64_t block = options.layout == Layout::slotted ? options.maxTokens : kMaxRows;
  bool limited = false;
  nextRow_.assign(rowBase, rowBase + keys);
  for (int key = 0; key < keys; ++key) {
    limited |= analysis.rowsOfKey[key] > std::min(block, std::max<std::int64_t>(capacity - rowBase[key], 0));
  }
  std::fill(cursors_.begin(), cursors_.end(), Cursor{});
  std::int64_t dropped = 0;
  if (limited) {
    endRow_.resize(keys);
    std::int64_t wanted = 0, kept = 0;
    for (int key = 0; key < keys; ++key) {
      endRow_[key] = static_cast<std::uint32_t>(std::min(capacity, rowBase[key] + block));
      wanted += analysis.rowsOfKey[key];
    }
    walk<Id, kByRank, true>(
        map, copyPerEntry,
        [&](std::uint32_t, bool, std::uint32_t, std::uint32_t, std::size_t, std::uint32_t, std::uint32_t) { ++kept; });
    dropped = wanted - kept;
    nextRow_.assign(rowBase, rowBase + keys);
  } else {
    for (int node = 0; node < nodes; ++node) {
      cursors_[node].copy = analysis.copiesOfNode[node];
      cursors_[node].entry = analysis.entriesOfNode[node];
    }
  }

  // Flows, and from counts to first places.
  Flow* flow = at<Flow>(arena, offsets.flows);
  std::uint32_t copies = 0, entries = 0;
  for (int node = 0; node < nodes; ++node) {
    const std::uint32_t copiesOfNode = cursors_[node].copy, entriesOfNode = cursors_[node].entry;
    if (node == topology_->nodeOf(rank_)) {
      *flow++ = {node, rank_, 0, copies, copies + copiesOfNode};
    } else {
      std::uint64_t cumulated = 0;
      std::uint32_t begin = copies;
      for (const FlowShare& share : topology_->flowsTo(rank_, node)) {
        cumulated += share.share;
        const std::uint32_t end = copies + static_cast<std::uint32_t>(copiesOfNode * cumulated / 65536);
        *flow++ = {node, share.forwarder, share.lane, begin, end};
        begin = end;
      }
    }
    cursors_[node] = {0, copies, entries};
    copies += copiesOfNode;
    entries += entriesOfNode;
  }

  Copy* const copyList = at<Copy>(arena, offsets.copies);
  Entry* const entryList = at<Entry>(arena, offsets.entries);
  float* const weightList = at<float>(arena, offsets.weights);
  const float* const weights = map.weights;
  const auto put = [=](std::uint32_t copy, bool isNewCopy, std::uint32_t entry, std::uint32_t token, std::size_t at,
                       std::uint32_t rankAndSlot, std::uint32_t row) {
    // An entry of a copy that is there already writes to the sentinel, which is set last. Masks, since a branch would
    // be a coin toss: it is taken by 2 of 3 entries at top-8 and 8 nodes.
    const std::uint32_t place = copies ^ ((copies ^ copy) & (0u - isNewCopy));
    storePair(copyList + place, token, entry);
    storePair(entryList + entry, rankAndSlot, row);
    if (weights != nullptr) weightList[entry] = weights[at];
  };
  if (limited) {
    walk<Id, kByRank, true>(map, copyPerEntry, put);
  } else {
    walk<Id, kByRank, false>(map, copyPerEntry, put);
  }
  if (weights == nullptr) std::fill_n(weightList, entries, 1.0f);
  copyList[copies] = {0, entries};
  zero(arena, offsets.copies + sizeof(Copy) * (copies + 1ull), offsets.entries);
  zero(arena, offsets.entries + sizeof(Entry) * entries, offsets.weights);
  zero(arena, offsets.weights + sizeof(float) * entries, offsets.end);
  header->copies = copies;
  header->entries = entries;
  header->dropped = dropped;
}

std::uint64_t Planner::arenaBytes(const RoutingMap& map, const Options& options) const {
  checkShape(map, options);
  return arenaOffsets(map.tokens, map.topk, map.experts, topology_->ranks(), topology_->nodes(),
                      topology_->expertsOf(rank_, map.experts), topology_->flowCount(rank_), options.dedup)
      .end;
}

void Planner::makePlan(const RoutingMap& map, const Options& options, const Analysis& analysis,
                       const Exchanged& exchanged, void* arena) {
  checkShape(map, options);
  useExperts(map.experts);
  const int keys = keyCount(map, *topology_, options);
  checkExchanged(options, analysis, exchanged, keys);
  rankStamp_.resize(topology_->ranks());

  ArenaHeader header{};
  header.magic = kArenaMagic;
  header.version = kArenaVersion;
  header.tokens = map.tokens;
  header.topk = map.topk;
  header.experts = map.experts;
  header.ranks = topology_->ranks();
  header.nodes = topology_->nodes();
  header.rank = rank_;
  header.node = topology_->nodeOf(rank_);
  header.localExperts = topology_->expertsOf(rank_, map.experts);
  header.flows = topology_->flowCount(rank_);
  header.layout = options.layout;
  header.dedup = options.dedup;
  header.alignment = options.alignment;
  header.maxTokens = options.layout == Layout::slotted ? options.maxTokens : 0;
  header.capacityRows = options.capacityRows;
  header.tokensUsed = map.tokens;
  const ArenaOffsets offsets = arenaOffsets(header);
  header.bytes = offsets.end;

  auto* bytes = static_cast<std::byte*>(arena);
  zero(bytes, 0, offsets.copies);
  std::copy(analysis.rowsOfKey.begin(), analysis.rowsOfKey.end(), at<std::int32_t>(bytes, offsets.rowsOfExpert));
  header.receiveRows =
      layRows(map, options, exchanged, at<std::int32_t>(bytes, offsets.rowBase),
              at<std::int32_t>(bytes, offsets.localExpertRows), at<std::int32_t>(bytes, offsets.localExpertStart));
  std::memcpy(bytes, &header, sizeof header);
  if (options.layout == Layout::rankOrder) {
    map.idBytes == 4 ? lay<std::int32_t, true>(map, options, analysis, offsets, bytes)
                     : lay<std::int64_t, true>(map, options, analysis, offsets, bytes);
  } else {
    map.idBytes == 4 ? lay<std::int32_t, false>(map, options, analysis, offsets, bytes)
                     : lay<std::int64_t, false>(map, options, analysis, offsets, bytes);
  }
}

std::uint64_t arenaBytes(const RoutingMap& map, const Topology& topology, int rank, const Options& options) {
  return Planner(topology, rank).arenaBytes(map, options);
}

void makePlan(const RoutingMap& map, const Topology& topology, int rank, const Options& options,
              const Analysis& analysis, const Exchanged& exchanged, void* arena) {
  Planner(topology, rank).makePlan(map, options, analysis, exchanged, arena);
}

View view(const void* arena) {
  const auto* header = static_cast<const ArenaHeader*>(arena);
  if (header->magic != kArenaMagic || header->version != kArenaVersion) {
    fail(Code::invalidArgument, "view: these bytes are no plan of version " + std::to_string(kArenaVersion));
  }
  const ArenaOffsets o = arenaOffsets(*header);
  const auto* bytes = static_cast<const std::byte*>(arena);
  return {header,
          reinterpret_cast<const std::int32_t*>(bytes + o.rowsOfExpert),
          reinterpret_cast<const std::int32_t*>(bytes + o.rowBase),
          reinterpret_cast<const std::int32_t*>(bytes + o.localExpertRows),
          reinterpret_cast<const std::int32_t*>(bytes + o.localExpertStart),
          reinterpret_cast<const Flow*>(bytes + o.flows),
          reinterpret_cast<const Copy*>(bytes + o.copies),
          reinterpret_cast<const Entry*>(bytes + o.entries),
          reinterpret_cast<const float*>(bytes + o.weights)};
}

}  // namespace fusco::plan
