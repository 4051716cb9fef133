// The third step of planning: the arena, from the counts and what the exchange brought.
#include "plan/plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "base/status.h"
#include "plan/planner.h"

namespace fusco::plan {

namespace {

constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();

[[noreturn]] void refuse(int rank, const std::string& what) {
  fail(Code::invalidArgument, "plan of rank " + std::to_string(rank) + ": " + what);
}

template <typename T>
T* at(std::byte* arena, std::uint64_t offset) {
  return reinterpret_cast<T*>(arena + offset);
}

void zero(std::byte* arena, std::uint64_t begin, std::uint64_t end) { std::memset(arena + begin, 0, end - begin); }

}  // namespace

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
    const int end = firstExpert_[rank + 1];
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

// The first entry of each key, and where the rows of a key end. Returns whether any runs past its end.
bool Planner::beginRows(const Options& options, const Analysis& analysis, const std::int32_t* rowBase) {
  const int keys = static_cast<int>(analysis.rowsOfKey.size());
  const std::int64_t capacity = options.capacityRows > 0 ? options.capacityRows : kMaxRows;
  // In the slotted layout an expert that one token names twice may fill its block.
  const std::int64_t block = options.layout == Layout::slotted ? options.maxTokens : kMaxRows;
  bool limited = false;
  nextEntry_.resize(keys);
  for (int key = 0; key < keys; ++key) {
    nextEntry_[key] = localOfKey_[key] | std::uint32_t{kDuplicate} << 16 |
                      std::uint64_t{static_cast<std::uint32_t>(rowBase[key])} << 32;
    limited |= analysis.rowsOfKey[key] > std::min(block, std::max<std::int64_t>(capacity - rowBase[key], 0));
  }
  if (!limited) return false;
  endRow_.resize(keys);
  for (int key = 0; key < keys; ++key) {
    endRow_[key] = static_cast<std::uint32_t>(std::min(capacity, rowBase[key] + block));
  }
  return true;
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
  useKeys(map, options);
  const int keys = keyCount(map, *topology_, options);
  checkExchanged(options, analysis, exchanged, keys);

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

  const bool limited = beginRows(options, analysis, at<std::int32_t>(bytes, offsets.rowBase));
  const Lists lists{at<Copy>(bytes, offsets.copies), at<Entry>(bytes, offsets.entries),
                    at<float>(bytes, offsets.weights)};
  const Made made = makeLists(map, options, analysis, limited, lists, at<Flow>(bytes, offsets.flows));
  if (map.weights == nullptr) std::fill_n(lists.weights, made.entries, 1.0f);
  lists.copies[made.copies] = {0, made.entries};
  zero(bytes, offsets.copies + sizeof(Copy) * (made.copies + 1ull), offsets.entries);
  zero(bytes, offsets.entries + sizeof(Entry) * made.entries, offsets.weights);
  zero(bytes, offsets.weights + sizeof(float) * made.entries, offsets.end);
  header.copies = made.copies;
  header.entries = made.entries;
  header.dropped =
      std::accumulate(analysis.entriesOfNode.begin(), analysis.entriesOfNode.end(), std::int64_t{0}) - made.entries;
  std::memcpy(bytes, &header, sizeof header);
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
