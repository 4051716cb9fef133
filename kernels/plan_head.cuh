// The part of an arena that lies before its copies, and the zeros behind what is used of its lists.
#pragma once

#include "kernels/plan_rows.cuh"

namespace fusco::kernels {

// Writes what findRowBases finds: pass `visit` to it.
struct HeadRows {
  const PlanLaunch& launch;
  const PlanRank& rank;
  const PlanShared& s;

  __device__ std::int32_t* at(std::uint32_t offset) const {
    return reinterpret_cast<std::int32_t*>(rank.arena + offset);
  }
  __device__ void setReceived(std::uint32_t rows) const {
    s.words[kWantedRows] = rows;
    s.words[kReceiveRows] = rows < launch.capacity ? rows : launch.capacity;
  }
  __device__ void visit(int key, std::uint32_t rowBase, std::uint32_t start, std::uint32_t total,
                        std::uint32_t own) const {
    at(sizeof(plan::ArenaHeader))[key] = own;
    at(rank.rowBase)[key] = rowBase;
    if (rank.exchanged != nullptr) {
      rank.exchanged[key] = static_cast<std::int32_t>(rowBase - start);
      rank.exchanged[launch.keys + key] = static_cast<std::int32_t>(total);
    }
    if (launch.byRank) {
      if (key == rank.rank) setReceived(total);
      return;
    }
    if (static_cast<int>(rankOfExpert(launch, key)) != rank.rank) return;
    const int local = Tile::localExpert(launch, key);
    const std::uint32_t room = launch.capacity > start ? launch.capacity - start : 0;
    at(rank.localStart)[local] = start < launch.capacity ? start : launch.capacity;
    at(rank.localRows)[local] = total < room ? total : room;
    if (local == rank.localExperts - 1) setReceived(addUpToLimit(start, alignUp(launch, total)));
  }
};

// What the head needs of the frame, asked for before anything else.
struct HeadFrame {
  static constexpr int kWordsOfLane = (sizeof(plan::ArenaHeader) / 4 + 31) / 32;
  plan::Flow flow;                    // of this thread
  std::uint32_t words[kWordsOfLane];  // of this lane

  __device__ void load(const PlanRank& rank, const Lane& me) {
    if (static_cast<int>(threadIdx.x) < rank.flowCount) flow = rank.flowShares[threadIdx.x];
#pragma unroll
    for (int i = 0; i < kWordsOfLane; ++i) {
      const unsigned word = me.lane + 32 * i;
      if (word < sizeof(plan::ArenaHeader) / 4) words[i] = reinterpret_cast<const std::uint32_t*>(rank.frame)[word];
    }
  }
};

// One thread's work.
__device__ inline void setStatus(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, bool tooMany) {
  const std::uint32_t bad = s.words[kBad], badRank = s.words[kBadRank];
  PlanStatus status{};
  status.rank = rank.rank;
  status.wantedRows = s.words[kWantedRows];
  if (tooMany) {
    status.code = PlanStatus::tooManyTokens;
  } else if (bad != 0) {
    const std::uint32_t index = ~bad;
    status.code = PlanStatus::badId;
    status.token = index / launch.topk;
    status.slot = static_cast<std::int32_t>(index % launch.topk);
    status.id = launch.idBytes == 4 ? static_cast<const std::int32_t*>(rank.ids)[index]
                                    : static_cast<const std::int64_t*>(rank.ids)[index];
  } else if (badRank != 0) {
    status.code = PlanStatus::badIdElsewhere;
    status.rank = static_cast<int>(~badRank);
  } else if (s.words[kRefused] != 0) {
    status.code = PlanStatus::tooManyRows;
  }
  *rank.status = status;
}

// The rest of the head. Cursors must be those of the first chunk. `wanted`: entries before any drop. What does not take
// many threads is dealt out to the warps, so that they do it side by side.
__device__ inline void finishHead(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Lane& me,
                                  const HeadFrame& frame, std::uint32_t tokens, std::uint32_t wanted, bool tooMany) {
  int dealt = 0;
  const auto isMine = [&] {
    const bool mine = dealt == me.warp;
    dealt = dealt + 1 < launch.warps ? dealt + 1 : 0;
    return mine;
  };
  const auto clearFrom = [&](std::int32_t* section, int used, std::uint32_t bytes) {
    for (int i = used + me.lane; i < static_cast<int>(bytes / 4); i += 32) section[i] = 0;
  };
  const bool refused = s.words[kRefused] != 0;
  const std::uint32_t copies = refused ? 0 : s.copies[launch.nodes], entries = refused ? 0 : s.entries[launch.nodes];
  const std::uint32_t received = refused ? 0 : s.words[kReceiveRows];
  const HeadRows head{launch, rank, s};
  std::int32_t* const localStart = head.at(rank.localStart);
  const std::uint32_t rowsOfExpert = sizeof(plan::ArenaHeader);
  auto* flows = reinterpret_cast<plan::Flow*>(rank.arena + rank.flows);
  for (int i = threadIdx.x; i < rank.flowCount; i += blockDim.x) {
    plan::Flow flow = i == static_cast<int>(threadIdx.x) ? frame.flow : rank.flowShares[i];
    const std::uint64_t ofNode = refused ? 0 : s.copiesOfNode[flow.node];
    const std::uint32_t begin = refused ? 0 : s.copies[flow.node];
    flow.copyBegin = begin + static_cast<std::uint32_t>(ofNode * flow.copyBegin / 65536);
    flow.copyEnd = begin + static_cast<std::uint32_t>(ofNode * flow.copyEnd / 65536);
    flows[i] = flow;
  }
  isMine();  // the first warp has the most of these
  if (isMine()) {
    constexpr unsigned kShapeWords = offsetof(plan::ArenaHeader, tokensUsed) / 4;
    static_assert(sizeof(plan::ArenaHeader) == 4 * kShapeWords + 5 * sizeof(std::int64_t));
#pragma unroll
    for (int i = 0; i < HeadFrame::kWordsOfLane; ++i) {
      const unsigned word = me.lane + 32 * i;
      if (word < kShapeWords) reinterpret_cast<std::uint32_t*>(rank.arena)[word] = frame.words[i];
    }
  }
  if (isMine() && me.lane == 0) {
    auto* header = reinterpret_cast<plan::ArenaHeader*>(rank.arena);
    header->tokensUsed = tokens;
    header->copies = copies;
    header->entries = entries;
    header->dropped = refused ? 0 : wanted - entries;
    header->receiveRows = received;
    reinterpret_cast<plan::Copy*>(rank.arena + rank.copies)[copies] = {0, entries};
    if (!launch.byRank) localStart[rank.localExperts] = received;
  }
  if (isMine() && me.lane == 0) setStatus(launch, rank, s, tooMany);
  if (isMine()) clearFrom(head.at(rowsOfExpert), launch.keys, rank.rowBase - rowsOfExpert);
  if (isMine()) clearFrom(head.at(rank.rowBase), launch.keys, rank.localRows - rank.rowBase);
  if (isMine())
    clearFrom(head.at(rank.localRows), launch.byRank ? 0 : rank.localExperts, rank.localStart - rank.localRows);
  if (isMine()) clearFrom(localStart, launch.byRank ? 0 : rank.localExperts + 1, rank.flows - rank.localStart);
  if (isMine()) {
    clearFrom(head.at(rank.flows), rank.flowCount * static_cast<int>(sizeof(plan::Flow) / 4),
              static_cast<std::uint32_t>(rank.copies) - rank.flows);
  }
}

// Zeros behind the used part of the lists, as far as a plan of so many tokens reaches; a part of them for each of some
// blocks. Refused: nothing is used.
__device__ inline void clearTails(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s,
                                  std::uint32_t tokens, int part, int parts) {
  const bool refused = s.words[kRefused] != 0;
  const std::uint64_t slots = std::uint64_t{tokens} * launch.topk;
  const std::uint64_t perToken = launch.copyPerEntry || launch.topk < launch.nodes ? launch.topk : launch.nodes;
  const auto clearRange = [&](auto zero, std::uint64_t begin, std::uint64_t used, std::uint64_t room,
                              std::uint64_t end) {
    using T = decltype(zero);
    const std::uint64_t last = tokens == rank.tokens ? (end - begin) / sizeof(T) : room;
    auto* list = reinterpret_cast<T*>(rank.arena + begin);
    const std::uint64_t step = static_cast<std::uint64_t>(parts) * blockDim.x;
    for (std::uint64_t i = used + part * blockDim.x + threadIdx.x; i < last; i += step) list[i] = zero;
  };
  const std::uint32_t copies = refused ? 0 : s.copies[launch.nodes], entries = refused ? 0 : s.entries[launch.nodes];
  clearRange(uint2{0, 0}, rank.copies, copies + 1ull, perToken * tokens + 1, rank.entries);
  clearRange(uint2{0, 0}, rank.entries, entries, slots, rank.weightsOfEntries);
  clearRange(0.0f, rank.weightsOfEntries, entries, slots, rank.end);
}

}  // namespace fusco::kernels
