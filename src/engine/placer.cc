#include "engine/placer.h"

#include <algorithm>
#include <atomic>

#include "engine/device/rows.h"
#include "engine/engine.h"

namespace fusco::engine {

using plan::Copy;
using plan::Entry;
using plan::kDuplicate;
using plan::kSlotMask;

void Placer::bind(const Meeting& meeting, int tensors, const MemoryRole* roles, std::byte* const* ownMemory) {
  const int count = engine_.nodeRanks();
  const auto size = static_cast<std::size_t>(count);
  const int self = engine_.localIndex();
  comm::Fabric& fabric = engine_.fabric();
  vmRanks_.clear();
  flags_.assign(size, 0);
  tickets_.assign(size, nullptr);
  landing_.assign(size, nullptr);
  counters_.assign(size, nullptr);
  anyPrimaries_ = describes_ = counts_ = false;
  for (int t = 0; t < kTensors; ++t) {
    all_[t].assign(size, nullptr);
    primaries_[t].assign(size, nullptr);
    remote_[t].assign(size, 0);
  }
  for (int i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const ReadyCell& cell = meeting.ready(i);
    const int rank = engine_.nodeRank(i);
    // One's own memory is written directly and entirely, whatever the peers have to do to reach it.
    flags_[at] = i == self ? cell.flags & ~(kWantsPrimariesOnly | kWantsLandingList | kStaged) : cell.flags;
    bool vm = false;
    for (int t = 0; t < tensors; ++t) {
      std::byte* base = i == self ? ownMemory[t] : reachTensor(engine_, i, cell, roles[t]);
      if (base == nullptr && cell.memory[roles[t]].kind != transport::MemoryRef::none) {
        remote_[t][at] = cell.memory[roles[t]].address;
        vm = true;
      }
      if (flags_[at] & kWantsPrimariesOnly) {
        primaries_[t][at] = base;
        anyPrimaries_ |= base != nullptr;
      } else {
        all_[t][at] = base;
      }
    }
    if (vm) vmRanks_.push_back(i);
    if (flags_[at] & kWantsTickets) tickets_[at] = reinterpret_cast<Ticket*>(fabric.reach(rank, cell.memory[kTickets]));
    if (flags_[at] & kWantsLandingList)
      landing_[at] = reinterpret_cast<std::uint32_t*>(fabric.reach(rank, cell.memory[kLanding]));
    if (flags_[at] & kWantsCounters)
      counters_[at] = reinterpret_cast<CounterBoard*>(fabric.reach(rank, cell.memory[kCounters]));
    describes_ |= tickets_[at] != nullptr || landing_[at] != nullptr;
    counts_ |= counters_[at] != nullptr;
  }
}

void Placer::placeByVm(const PlaceRequest& r, int localIndex) {
  std::vector<transport::Segment> local, remote;
  const bool primariesOnly = (flags_[static_cast<std::size_t>(localIndex)] & kWantsPrimariesOnly) != 0;
  const std::uint64_t address = remote_[r.tensor][static_cast<std::size_t>(localIndex)];
  if (address == 0) return;  // this tensor is mapped
  const std::uint64_t base = address + r.rowOffset;
  for (std::size_t i = r.begin; i < r.end; ++i) {
    const std::byte* row = r.rows + (r.packed ? i - r.begin : r.copies[i].token) * r.stride;
    for (std::uint32_t e = r.copies[i].firstEntry; e < r.copies[i + 1].firstEntry; ++e) {
      const Entry& entry = r.entries[e];
      if (entry.rank != localIndex || (primariesOnly && (entry.slot & kDuplicate))) continue;
      local.push_back({const_cast<std::byte*>(row), r.partBytes});
      remote.push_back({reinterpret_cast<void*>(base + entry.row * r.rowBytes), r.partBytes});
    }
  }
  if (local.empty()) return;
  engine_.fabric().vmWrite(engine_.nodeRank(localIndex), local, remote);
  engine_.statistics().processVmBytes += local.size() * r.partBytes;
}

void Placer::place(const PlaceRequest& r) {
  StageTimer timer(engine_.statistics().placeNs);
  exec::PlaceArgs args;
  args.source = r.rows;
  args.sourceStride = r.stride;
  args.packed = r.packed;
  args.copies = r.copies;
  args.entries = r.entries;
  args.begin = r.begin;
  args.end = r.end;
  args.destinationStride = r.rowBytes;
  args.rowBytes = r.partBytes;
  const auto run = [&](const std::vector<std::byte*>& bases, bool skipDuplicates) {
    args.skipDuplicates = skipDuplicates;
    if (r.rowOffset == 0) {
      args.bases = bases.data();
    } else {
      shifted_ = bases;
      for (std::byte*& base : shifted_) base = base == nullptr ? nullptr : base + r.rowOffset;
      args.bases = shifted_.data();
    }
    (r.ofLibrary ? engine_.hostExecutor() : engine_.executor()).place(args);
  };
  run(all_[r.tensor], false);
  if (anyPrimaries_) run(primaries_[r.tensor], true);
  for (const int rank : vmRanks_) placeByVm(r, rank);
  if (r.rowOffset + r.partBytes == r.rowBytes && r.tensor == 0) {
    const std::uint64_t rows = r.copies[r.end].firstEntry - r.copies[r.begin].firstEntry;
    engine_.statistics().rowsPlaced += rows;
    engine_.statistics().bytesPlaced += rows * r.rowBytes;
  }
}

void Placer::describe(int source, const Copy* copies, const Entry* entries, const float* weights, std::size_t begin,
                      std::size_t end) {
  for (std::size_t i = begin; i < end; ++i) {
    const std::uint32_t first = copies[i].firstEntry;
    for (std::uint32_t e = first; e < copies[i + 1].firstEntry; ++e) {
      const Entry& entry = entries[e];
      std::uint32_t primary = entry.row;
      if (entry.slot & kDuplicate) {
        std::uint32_t p = first;
        while (entries[p].rank != entry.rank) ++p;
        primary = entries[p].row;
      }
      if (Ticket* tickets = tickets_[entry.rank]) {
        tickets[entry.row] = {source, static_cast<std::int32_t>(copies[i].token), entry.slot & kSlotMask, weights[e],
                              primary};
      }
      if (std::uint32_t* landing = landing_[entry.rank]) {
        const bool all = (flags_[entry.rank] & kStaged) != 0;
        if (all || primary != entry.row) landing[entry.row] = primary;
      }
    }
  }
}

void Placer::count(const Copy* copies, const Entry* entries, std::size_t begin, std::size_t end) {
  engine_.executor().fence();
  for (std::uint32_t e = copies[begin].firstEntry; e < copies[end].firstEntry; ++e) {
    CounterBoard* board = counters_[entries[e].rank];
    if (board == nullptr) continue;
    const std::int32_t* starts = board->starts();
    const auto row = static_cast<std::int32_t>(entries[e].row);
    const std::int32_t* after = std::upper_bound(starts, starts + board->localExperts, row);
    std::atomic_ref<std::uint64_t>(board->counters()[after - starts - 1]).fetch_add(1, std::memory_order_release);
  }
}

}  // namespace fusco::engine
