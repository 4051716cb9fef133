#include "engine/device/transfers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/clock.h"
#include "engine/meeting.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {

// Rows that have come wait so long for those that have not: one launch is better than two, but others may wait for
// them.
constexpr std::int64_t kGatherNs = 30'000;

// Where a ready cell of the transfer channel carries what operations with a plan have no use for.
std::uint64_t& transferBytes(ReadyCell& cell) { return cell.parameters.capacity; }
std::uint64_t& transferStart(ReadyCell& cell) { return cell.parameters.maxTokens; }
constexpr int kRowsHandle = 1, kListHandle = 3;  // two references each

void putMemory(ReadyCell& cell, MemoryRole role, int handleAt, std::uint64_t& allocationBytes,
               const PeerMemory& memory) {
  static_assert(sizeof memory.handle == 2 * sizeof(transport::MemoryRef));
  cell.memory[role] = memory.memory;
  allocationBytes = memory.allocationBytes;
  std::memcpy(static_cast<void*>(&cell.memory[handleAt]), memory.handle.data(), sizeof memory.handle);
}

PeerMemory memoryOf(const ReadyCell& cell, MemoryRole role, int handleAt, std::uint64_t allocationBytes) {
  PeerMemory memory;
  memory.memory = cell.memory[role];
  memory.allocationBytes = allocationBytes;
  std::memcpy(memory.handle.data(), static_cast<const void*>(&cell.memory[handleAt]), sizeof memory.handle);
  return memory;
}

kernels::RowEnd endOf(const TransferRequest& request, std::size_t start) {
  return {request.base, request.listed ? request.deviceList : nullptr, request.rowBytes, start, request.narrow};
}

bool nothingToMove(const kernels::RowCopy& copy) {
  return copy.bytes == 0 || (copy.source.list == nullptr && copy.destination.list == nullptr &&
                             copy.source.base + copy.source.start == copy.destination.base + copy.destination.start);
}

}  // namespace

DeviceTransfers::DeviceTransfers(Engine& engine, std::vector<TransferRequest> requests)
    : Operation(OperationKind::transfers),
      engine_(engine),
      domain_(*engine.device()),
      peers_(engine.devicePeers()),
      sends_(static_cast<std::size_t>(engine.fabric().ranks())),
      receives_(static_cast<std::size_t>(engine.fabric().ranks())) {
  const int self = engine.fabric().rank();
  const cuda::OnDevice on(domain_.device());
  for (TransferRequest& request : requests) {
    if (request.bytes() > 0) {
      domain_.checkPointer(request.send ? "sendbuff" : "recvbuff", request.base);
      if (request.listed) domain_.checkPointer("rowIndices", request.deviceList);
    }
    onlySends_ = onlySends_ && request.send && request.peer != self;
    if (std::find(streams_.begin(), streams_.end(), request.stream) == streams_.end())
      streams_.push_back(request.stream);
    const auto peer = static_cast<std::size_t>(request.peer);
    auto& items = request.send ? sends_[peer].items : receives_[peer];
    items.push_back({std::move(request), 0});
  }
  const std::size_t own = sends_[static_cast<std::size_t>(self)].items.size();
  const std::size_t expected = receives_[static_cast<std::size_t>(self)].size();
  if (own != expected) {
    fail(Code::invalidUsage,
         fmt::format("rank {}: {} sends to itself and {} receives from itself in one group; they must pair up", self,
                     own, expected));
  }
  program_.push_back({StepKind::ready, 0, 0, 0});
  program_.push_back({StepKind::put, 1, 1, 0});
}

std::string DeviceTransfers::describe() const {
  std::string text = fmt::format("send/receive group {} on GPU {}", number_, domain_.device());
  if (waitingFor_ >= 0) text += fmt::format(", waiting for {}", engine_.fabric().describeRank(waitingFor_));
  return text;
}

void DeviceTransfers::reset() { number_ = engine_.nextSequence(kTransferChannel); }

void DeviceTransfers::mismatch(int from, std::size_t sent, int to, std::size_t expected, std::uint64_t k) const {
  fail(Code::invalidUsage,
       fmt::format(
           "send/receive {} of the pair: rank {} sends {} bytes, rank {} expects {}; the k-th send must match the "
           "k-th receive",
           k, from, sent, to, expected));
}

void DeviceTransfers::start() {
  for (const cuda::Stream stream : streams_) capturing_ = capturing_ || cuda::capturing(stream);
  if (capturing_) {
    for (int peer = 0; peer < engine_.fabric().ranks(); ++peer) {
      const auto p = static_cast<std::size_t>(peer);
      if ((sends_[p].items.empty() && receives_[p].empty()) || sameProcess(peer)) continue;
      if (peers_.capturesBetweenProcesses()) continue;
      fail(Code::invalidUsage,
           fmt::format("rank {}: a transfer with {} cannot be captured: processes of this node share a GPU, or have "
                       "several, and meet on "
                       "the host at each call; give each a GPU of its own, or capture ranks of one process, in one "
                       "capture",
                       engine_.fabric().rank(), engine_.fabric().describeRank(peer)));
    }
  }
  domain_.checkArrivals();
  stream_ = capturing_ ? streams_.front() : peers_.lane();
  for (const cuda::Stream stream : streams_) peers_.join(stream, stream_);
  if (capturing_) peers_.beginCaptured(stream_);
  peers_.forgetImports();
  copySelf();
}

void DeviceTransfers::copySelf() {
  const int self = engine_.fabric().rank();
  auto& out = sends_[static_cast<std::size_t>(self)].items;
  auto& in = receives_[static_cast<std::size_t>(self)];
  for (; !out.empty(); out.pop_front(), in.pop_front()) {
    const TransferRequest& from = out.front().request;
    const TransferRequest& to = in.front().request;
    const std::uint64_t k = engine_.nextTransfer(self, true);
    engine_.nextTransfer(self, false);
    if (from.bytes() != to.bytes()) mismatch(self, from.bytes(), self, to.bytes(), k);
    const kernels::RowCopy copy{endOf(from, 0), endOf(to, 0), from.bytes()};
    if (!nothingToMove(copy)) copies_.push_back(copy);
  }
}

bool DeviceTransfers::mayTell(int peer) const {
  return peers_.pending()[static_cast<std::size_t>(peer)].size() < kCellDepth;
}

// Shown by publish(), when what makes the rows valid has been recorded.
void DeviceTransfers::tell(int peer, const Item& item, std::size_t bytes, int slot, const PeerMemory& rows,
                           const PeerMemory& list) {
  comm::Fabric& fabric = engine_.fabric();
  const TransferRequest& r = item.request;
  const std::uint64_t sequence = engine_.nextTransfer(peer, true);
  ReadyCell& cell = cells(fabric.control(peer), engine_.nodeRanks(), kTransferChannel, engine_.localIndex())
                        .ready[sequence % kCellDepth];
  cell.flags = (slot >= 0 ? kStaged : 0u) | (r.listed && slot < 0 ? kWantsLandingList : 0u) |
               (r.narrow ? kNarrowList : 0u) | (capturing_ ? kCaptured : 0u);
  cell.bytes = bytes;
  cell.rows = r.rowBytes;
  transferBytes(cell) = r.bytes();
  transferStart(cell) = item.moved;
  putMemory(cell, kRows, kRowsHandle, cell.parameters.experts, rows);
  putMemory(cell, kExtra, kListHandle, cell.parameters.topk, list);
  peers_.pending()[static_cast<std::size_t>(peer)].push_back({sequence, slot, r.bytes()});
  untold_.push_back({peer, &cell, sequence});
  if (bytes > 0) peers_.recordFor(engine_.topology().localIndex(peer), readyKind());
}

// Everything that was told of since the last time, with one record for all of it.
void DeviceTransfers::publish() {
  if (untold_.empty()) return;
  const bool valid = std::any_of(untold_.begin(), untold_.end(), [](const Untold& one) { return one.cell->bytes > 0; });
  const int event = valid ? peers_.record(readyKind(), stream_) : 0;
  for (const Untold& one : untold_) {
    one.cell->status = static_cast<std::uint32_t>(event);
    one.cell->sequence.store(one.sequence + 1, std::memory_order_release);
    engine_.fabric().ring(one.peer);
  }
  untold_.clear();
}

// A group without a receive does not wait for its receivers where there is room for the rows.
bool DeviceTransfers::sendsEarly(const Item& item) const {
  return onlySends_ && !capturing_ && item.request.bytes() <= peers_.slotBytes();
}

bool DeviceTransfers::sendInPlace(Item& item, int peer) {
  const TransferRequest& r = item.request;
  PeerMemory rows, list;
  if (r.bytes() > 0) {
    const bool same = sameProcess(peer);
    // A list may lead anywhere in the allocation.
    if (!peers_.describe(r.base, r.listed ? 1 : r.bytes(), same, rows)) return false;
    if (r.listed && !peers_.describe(r.deviceList, r.rows * (r.narrow ? 4 : 8), same, list)) return false;
  }
  const bool waits = r.bytes() > 0 || !onlySends_;
  tell(peer, item, r.bytes(), waits ? DevicePeers::kInPlace : DevicePeers::kWithoutRows, rows, list);
  item.moved = r.bytes();
  if (waits) ++sends_[static_cast<std::size_t>(peer)].unanswered;
  return true;
}

// The next part, through the window; false when there is no room.
bool DeviceTransfers::sendParts(Item& item, int peer) {
  const TransferRequest& r = item.request;
  const int slot = peers_.takeSlot();
  if (slot < 0) return false;
  // Whole rows, where they fit.
  std::size_t room = peers_.slotBytes();
  if (r.listed && r.rowBytes <= room) room = room / r.rowBytes * r.rowBytes;
  const std::size_t bytes = std::min(room, r.bytes() - item.moved);
  const kernels::RowCopy copy{endOf(r, item.moved), {peers_.slot(slot), nullptr, 0, 0, false}, bytes};
  peers_.settle(false, stream_);  // who read the slot before
  cuda::copyRows(&copy, 1, peers_.budget(), stream_);
  PeerMemory rows;
  if (!peers_.describe(peers_.slot(slot), bytes, sameProcess(peer), rows)) {
    fail(Code::unhandledCudaError,
         fmt::format("rank {}: GPU {} gives no handle for memory of the library, so that {} cannot be reached; run the "
                     "ranks as threads of one process",
                     engine_.fabric().rank(), domain_.device(), engine_.fabric().describeRank(peer)));
  }
  tell(peer, item, bytes, slot, rows, {});
  item.moved += bytes;
  engine_.statistics().stagedBytes += bytes;
  return true;
}

bool DeviceTransfers::advanceSends(int peer) {
  Sends& sends = sends_[static_cast<std::size_t>(peer)];
  const std::uint64_t answered = peers_.takeAnswers(peer, stream_, capturing_);
  sends.unanswered -= answered;
  bool moved = answered > 0;
  while (!sends.items.empty() && mayTell(peer)) {
    Item& item = sends.items.front();
    bool told = item.request.bytes() > 0 && sendsEarly(item) && sendParts(item, peer);
    if (!told && item.moved == 0) told = sendInPlace(item, peer);
    if (!told && capturing_ && item.moved == 0) {
      fail(Code::invalidUsage,
           fmt::format("rank {}: a send to {} cannot be captured: its rows lie in memory that has no handle for other "
                       "processes (a pool; managed or pinned memory; virtual memory management): take it from "
                       "cudaMalloc (torch: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False)",
                       engine_.fabric().rank(), engine_.fabric().describeRank(peer)));
    }
    if (!told && !capturing_) told = sendParts(item, peer);
    if (!told) break;
    moved = true;
    if (item.moved == item.request.bytes()) sends.items.pop_front();
  }
  if (!moved && (!sends.items.empty() || sends.unanswered > 0)) waitingFor_ = peer;
  return moved;
}

void DeviceTransfers::take(Item& item, int peer, const ReadyCell& cell) {
  comm::Fabric& fabric = engine_.fabric();
  const TransferRequest& r = item.request;
  const std::uint64_t sequence = engine_.nextTransfer(peer, false);
  auto& words = const_cast<ReadyCell&>(cell);
  if (transferBytes(words) != r.bytes() || transferStart(words) != item.moved) {
    DoneCell& done = cells(fabric.control(peer), engine_.nodeRanks(), kTransferChannel, engine_.localIndex())
                         .done[sequence % kCellDepth];
    done.status = static_cast<std::uint64_t>(Code::invalidUsage);
    done.bytes = r.bytes();
    done.sequence.store(sequence + 1, std::memory_order_release);
    fabric.ring(peer);
    mismatch(peer, transferBytes(words), fabric.rank(), r.bytes(), sequence);
  }
  if (((cell.flags & kCaptured) != 0) != capturing_ && cell.bytes > 0) {
    fail(Code::invalidUsage,
         fmt::format("send/receive {} of rank {} to rank {} is captured at one end only; capture both in one graph",
                     sequence, peer, fabric.rank()));
  }
  if (taken_.empty()) takenSince_ = nowNs();
  taken_.push_back({peer, sequence, cell.bytes > 0});
  if (cell.bytes > 0) {
    const int local = engine_.topology().localIndex(peer);
    kernels::RowCopy copy{};
    copy.bytes = cell.bytes;
    copy.source.base = peers_.reach(local, memoryOf(cell, kRows, kRowsHandle, cell.parameters.experts));
    if ((cell.flags & kWantsLandingList) != 0) {
      copy.source.list = peers_.reach(local, memoryOf(cell, kExtra, kListHandle, cell.parameters.topk));
      copy.source.rowBytes = cell.rows;
      copy.source.narrow = (cell.flags & kNarrowList) != 0;
    }
    copy.destination = endOf(r, item.moved);
    peers_.wait(local, readyKind(), static_cast<int>(cell.status), stream_);
    if (!nothingToMove(copy)) copies_.push_back(copy);
    item.moved += cell.bytes;
    partsTaken_ = partsTaken_ || item.moved < r.bytes();
    engine_.statistics().bytesPlaced += cell.bytes;
  }
}

bool DeviceTransfers::advanceReceives(int peer) {
  auto& items = receives_[static_cast<std::size_t>(peer)];
  comm::Fabric& fabric = engine_.fabric();
  PeerCells& theirs =
      cells(fabric.control(fabric.rank()), engine_.nodeRanks(), kTransferChannel, engine_.topology().localIndex(peer));
  bool moved = false;
  while (!items.empty()) {
    const std::uint64_t sequence = engine_.transfersSeen(peer);
    const ReadyCell& cell = theirs.ready[sequence % kCellDepth];
    if (cell.sequence.load(std::memory_order_acquire) < sequence + 1) {
      if (!moved) waitingFor_ = peer;
      break;
    }
    take(items.front(), peer, cell);
    moved = true;
    if (items.front().moved == items.front().request.bytes()) items.pop_front();
  }
  return moved;
}

void DeviceTransfers::launch() {
  peers_.settle(capturing_, stream_);
  cuda::copyRows(copies_.data(), copies_.size(), peers_.budget(), stream_);
  bool read = false;
  for (const Taken& one : taken_) {
    if (!one.read) continue;
    read = true;
    peers_.recordFor(engine_.topology().localIndex(one.peer), doneKind());
  }
  const int event = read ? peers_.record(doneKind(), stream_) : -1;
  comm::Fabric& fabric = engine_.fabric();
  for (const Taken& one : taken_) {
    DoneCell& done = cells(fabric.control(one.peer), engine_.nodeRanks(), kTransferChannel, engine_.localIndex())
                         .done[one.sequence % kCellDepth];
    done.status = 0;
    done.bytes = one.read ? static_cast<std::uint64_t>(event) + 1 : 0;
    done.sequence.store(one.sequence + 1, std::memory_order_release);
    fabric.ring(one.peer);
  }
  copies_.clear();
  taken_.clear();
  partsTaken_ = false;
}

Outcome DeviceTransfers::run(const Step& step) {
  const cuda::OnDevice on(domain_.device());
  if (step.kind == StepKind::ready) {
    start();
    return Outcome::complete;
  }
  const int self = engine_.fabric().rank(), ranks = engine_.fabric().ranks();
  bool moved = false, open = false, receiving = false;
  for (int k = 1; k < ranks; ++k) {
    const int peer = (self + k) % ranks;
    moved |= advanceSends(peer);
  }
  publish();
  for (int k = 1; k < ranks; ++k) {
    const int peer = (self + k) % ranks;
    const auto p = static_cast<std::size_t>(peer);
    moved |= advanceReceives(peer);
    receiving = receiving || !receives_[p].empty();
    open = open || !sends_[p].items.empty() || sends_[p].unanswered > 0;
  }
  if (!copies_.empty() || !taken_.empty()) {
    const bool patient = receiving && !partsTaken_ && (taken_.empty() || nowNs() - takenSince_ < kGatherNs);
    if (patient) return moved || !taken_.empty() ? Outcome::moved : Outcome::idle;
    launch();
    moved = true;
  }
  if (receiving || open) return moved ? Outcome::moved : Outcome::idle;
  peers_.settle(capturing_, stream_);
  if (capturing_) peers_.endCaptured(stream_);
  for (const cuda::Stream stream : streams_) peers_.join(stream_, stream);
  return Outcome::complete;
}

}  // namespace fusco::engine
