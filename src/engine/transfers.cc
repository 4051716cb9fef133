#include "engine/transfers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "engine/device/rows.h"

namespace fusco::engine {

namespace {
// Bytes moved before others get their turn.
constexpr std::size_t kChunkBytes = 2 * 1024 * 1024;
}  // namespace

std::size_t PieceWalk::piece(std::size_t at, std::size_t most, std::size_t& bytes) const {
  if (list_ == nullptr) {
    bytes = most;
    return at;
  }
  std::size_t row = at / rowBytes_;
  const std::size_t within = at % rowBytes_;
  const auto offset = static_cast<std::size_t>(list_[row]) * rowBytes_ + within;
  bytes = rowBytes_ - within;
  while (bytes < most && list_[row + 1] == list_[row] + 1) {
    bytes += rowBytes_;
    ++row;
  }
  bytes = std::min(bytes, most);
  return offset;
}

Transfers::Transfers(Engine& engine, std::vector<TransferRequest> requests)
    : Operation(OperationKind::transfers),
      engine_(engine),
      sends_(static_cast<std::size_t>(engine.fabric().ranks())),
      receives_(static_cast<std::size_t>(engine.fabric().ranks())) {
  for (TransferRequest& request : requests) {
    auto& queues = request.send ? sends_ : receives_;
    Item item;
    item.request = std::move(request);
    queues[static_cast<std::size_t>(item.request.peer)].items.push_back(std::move(item));
  }
  const int self = engine.fabric().rank();
  const std::size_t own = sends_[static_cast<std::size_t>(self)].items.size();
  if (own != receives_[static_cast<std::size_t>(self)].items.size()) {
    fail(Code::invalidUsage,
         fmt::format("rank {}: {} sends to itself and {} receives from itself in one group; they must pair up", self,
                     own, receives_[static_cast<std::size_t>(self)].items.size()));
  }
  for (int peer = 0; peer < engine.fabric().ranks(); ++peer) {
    if (!sends_[static_cast<std::size_t>(peer)].items.empty()) program_.push_back({StepKind::extract, 1, 1, peer});
    if (!receives_[static_cast<std::size_t>(peer)].items.empty()) program_.push_back({StepKind::place, 1, 1, peer});
  }
  program_.push_back({StepKind::ready, 0, 0, 0});
}

std::string Transfers::describe() const {
  std::string text = fmt::format("send/receive group {}", number_);
  if (waitingFor_ >= 0) text += fmt::format(", waiting for {}", engine_.fabric().describeRank(waitingFor_));
  return text;
}

void Transfers::reset() { number_ = engine_.nextSequence(kTransferChannel); }

bool Transfers::sameNode(int rank) const {
  return engine_.topology().nodeOf(rank) == engine_.topology().nodeOf(engine_.fabric().rank());
}

void Transfers::mismatch(int from, std::size_t sent, int to, std::size_t expected, std::uint64_t k) const {
  fail(Code::invalidUsage,
       fmt::format(
           "send/receive {} of the pair: rank {} sends {} bytes, rank {} expects {}; the k-th send must match the "
           "k-th receive",
           k, from, sent, to, expected));
}

// Row lists, and rows that the peers cannot reach, lie in library windows while the group runs.
void Transfers::prepareWindows() {
  std::size_t listBytes = 0;
  std::size_t landingBytes = 0;
  const auto staged = [&](const Item& item) {
    const TransferRequest& r = item.request;
    if (r.peer == engine_.fabric().rank() || engine_.fabric().oneProcess() || engine_.fabric().processVm() ||
        r.bytes() == 0)
      return false;
    std::size_t span = r.bytes();
    if (r.listed) {
      for (const std::int64_t row : r.list) span = std::max(span, static_cast<std::size_t>(row + 1) * r.rowBytes);
    }
    return !comm::windowContains(r.base, span);
  };
  for (int peer = 0; peer < engine_.fabric().ranks(); ++peer) {
    Queue& queue = receives_[static_cast<std::size_t>(peer)];
    queue.next = 0;
    for (Item& item : queue.items) {
      item.sequence = engine_.nextTransfer(peer, false);
      item.moved = 0;
      if (!sameNode(peer)) continue;
      item.listOffset = listBytes;
      if (item.request.listed) listBytes += item.request.rows * 8;
      if (staged(item)) landingBytes += plan::arenaAlign(item.request.bytes());
    }
    for (Item& item : sends_[static_cast<std::size_t>(peer)].items) {
      item.sequence = engine_.nextTransfer(peer, true);
      item.moved = 0;
    }
  }
  std::byte* lists = listBytes == 0 ? nullptr : engine_.listWindow().need(listBytes);
  std::byte* landing = landingBytes == 0 ? nullptr : engine_.staging(kTransferChannel, 1, landingBytes);
  for (Queue& queue : receives_) {
    for (Item& item : queue.items) {
      if (!sameNode(item.request.peer)) continue;
      if (item.request.listed && item.request.rows > 0) {
        std::memcpy(lists + item.listOffset, item.request.list.data(), item.request.rows * 8);
      }
      item.landing = nullptr;
      if (staged(item)) {
        item.landing = landing;
        landing += plan::arenaAlign(item.request.bytes());
      }
    }
  }
}

Outcome Transfers::run(const Step& step) {
  switch (step.kind) {
    case StepKind::ready:
      settle();
      prepareWindows();
      return Outcome::complete;
    case StepKind::extract:
      return advanceSend(step.index);
    case StepKind::place:
      return advanceReceive(step.index);
    default:
      return Outcome::complete;
  }
}

Outcome Transfers::advanceSend(int peer) {
  Queue& queue = sends_[static_cast<std::size_t>(peer)];
  bool moved = false;
  while (!queue.items.empty()) {
    bool finished = false;
    const std::size_t before = queue.items.front().moved;
    if (sameNode(peer)) {
      finished = sendInNode(queue.items.front(), peer);
    } else {
      moved |= sendAcross(queue.items.front(), peer, finished);
    }
    moved |= finished || queue.items.front().moved != before;
    if (!finished) {
      if (!moved) waitingFor_ = peer;
      return moved ? Outcome::moved : Outcome::idle;
    }
    queue.items.pop_front();
  }
  return Outcome::complete;
}

// Writes a chunk into the receiver's rows; true when the transfer is finished.
bool Transfers::sendInNode(Item& item, int peer) {
  const int count = engine_.nodeRanks();
  comm::Fabric& fabric = engine_.fabric();
  const int local = engine_.topology().localIndex(peer);
  const ReadyCell& cell =
      cells(fabric.control(fabric.rank()), count, kTransferChannel, local).ready[item.sequence % kCellDepth];
  if (cell.sequence.load(std::memory_order_acquire) < item.sequence + 1) return false;
  const TransferRequest& r = item.request;
  DoneCell& done =
      cells(fabric.control(peer), count, kTransferChannel, engine_.localIndex()).done[item.sequence % kCellDepth];
  const auto finish = [&](Code code) {
    engine_.executor().fence();
    done.status = static_cast<std::uint64_t>(code);
    done.bytes = r.bytes();
    done.sequence.store(item.sequence + 1, std::memory_order_release);
    if (peer != fabric.rank()) fabric.ring(peer);
  };
  if (cell.bytes != r.bytes()) {
    finish(Code::invalidUsage);
    mismatch(fabric.rank(), r.bytes(), peer, cell.bytes, item.sequence);
  }
  if (r.bytes() > 0) {
    StageTimer timer(engine_.statistics().placeNs);
    std::byte* base = peer == fabric.rank() ? reinterpret_cast<std::byte*>(cell.memory[kRows].address)
                                            : fabric.reach(peer, cell.memory[kRows]);
    const std::int64_t* theirList = nullptr;
    if (cell.flags & kWantsLandingList)
      theirList = reinterpret_cast<const std::int64_t*>(fabric.reach(peer, cell.memory[kExtra]));
    const PieceWalk mine(r.listed ? r.list.data() : nullptr, r.rowBytes);
    const PieceWalk theirs(theirList, cell.rows);
    const std::size_t end = std::min(r.bytes(), item.moved + kChunkBytes);
    const std::size_t start = item.moved;
    std::vector<transport::Segment> from, to;
    while (item.moved < end) {
      std::size_t bytes = 0, theirBytes = 0;
      const std::size_t at = mine.piece(item.moved, end - item.moved, bytes);
      const std::size_t theirAt = theirs.piece(item.moved, bytes, theirBytes);
      bytes = std::min(bytes, theirBytes);
      if (base == nullptr) {
        from.push_back({r.base + at, bytes});
        to.push_back({reinterpret_cast<void*>(cell.memory[kRows].address + theirAt), bytes});
      } else if (base + theirAt != r.base + at) {
        exec::MoveArgs move;
        move.source = r.base + at;
        move.destination = base + theirAt;
        move.rowBytes = bytes;
        move.rows = 1;
        move.streaming = bytes >= 4096;
        engine_.executor().move(move);
      }
      item.moved += bytes;
    }
    if (!from.empty()) {
      fabric.vmWrite(peer, from, to);
      engine_.statistics().processVmBytes += end - start;
    }
  }
  if (item.moved < r.bytes()) return false;
  engine_.statistics().bytesPlaced += r.bytes();
  finish(Code::success);
  return true;
}

exec::Passage& Transfers::passage(bool out, int peer) {
  return engine_.executor().passage((std::uint64_t{kTransferChannel} * 2 + (out ? 0 : 1)) << 32 |
                                    static_cast<std::uint64_t>(peer));
}

// The caller's rows are valid, and free.
void Transfers::settle() {
  if (engine_.device() == nullptr) return;
  for (const auto* queues : {&sends_, &receives_}) {
    for (const Queue& queue : *queues) {
      for (const Item& item : queue.items) {
        const TransferRequest& r = item.request;
        settleTensors(engine_, r.stream, operationName(kind()),
                      {{r.send ? "sendbuff" : "recvbuff", r.bytes() > 0 ? r.base : nullptr},
                       {"rowIndices", r.listed ? r.deviceList : nullptr}});
      }
    }
  }
}

void Transfers::moveOnDevice(const Item& item, std::byte* payload, std::size_t bytes) {
  const TransferRequest& r = item.request;
  const kernels::RowEnd rows{r.base, r.listed ? r.deviceList : nullptr, r.rowBytes, item.moved, r.narrow};
  const kernels::RowEnd slice{payload, nullptr, 0, 0, false};
  engine_.deviceExecutor()->copyRows(r.send ? kernels::RowCopy{rows, slice, bytes}
                                            : kernels::RowCopy{slice, rows, bytes});
}

void Transfers::postAcross(Item& item, transport::PostedLink& link, std::size_t bytes) {
  const std::size_t sliceSize = sliceBytes(1, 0, bytes);
  if (item.mirrored) {
    link.postMirrored(sliceSize - sliceRowStride(bytes), sliceSize);
  } else {
    link.post(sliceSize);
  }
  item.mirrored = false;
  item.leaving = false;
  engine_.statistics().wireBytes += sliceSize;
  ++engine_.statistics().wireSlices;
}

bool Transfers::sendAcross(Item& item, int peer, bool& finished) {
  transport::PostedLink& link =
      engine_.fabric().link(peer, kTransferChannel, engine_.topology().homePath(engine_.fabric().rank(), peer));
  if (item.leaving) {
    if (!passage(true, peer).done()) return true;
    postAcross(item, link, item.leavingBytes);
    finished = item.moved == item.request.bytes();
    return true;
  }
  std::byte* slot = link.acquire();
  if (slot == nullptr) return false;
  StageTimer timer(engine_.statistics().extractNs);
  const TransferRequest& r = item.request;
  const std::size_t room = (link.slotBytes() - sliceHead(1, 0)) & ~std::size_t{63};
  const std::size_t bytes = std::min(room, r.bytes() - item.moved);
  Slice slice = layOutSlice(slot, SliceKind::bytes, 1, 0, bytes);
  slice.copies[0] = slice.copies[1] = {0, 0};
  slice.header->signature = r.bytes();  // of the whole transfer, so that a mismatch can name it
  slice.header->operation = item.sequence;
  slice.header->rowOffset = item.moved;
  slice.header->source = engine_.fabric().rank();
  const bool last = item.moved + bytes == r.bytes();
  slice.header->flags = last ? kLastSlice : 0;
  if (engine_.device() != nullptr && bytes > 0) {
    exec::Passage& way = passage(true, peer);
    std::byte* const place = engine_.payloadOut(link, slice.payload);
    moveOnDevice(item, way.out(place, bytes), bytes);
    item.mirrored = place != slice.payload;
    way.close();
    item.moved += bytes;
    item.leaving = true;
    item.leavingBytes = bytes;
    return true;
  }
  const PieceWalk mine(r.listed ? r.list.data() : nullptr, r.rowBytes);
  std::size_t packed = 0;
  while (packed < bytes) {
    std::size_t piece = 0;
    const std::size_t at = mine.piece(item.moved + packed, bytes - packed, piece);
    std::memcpy(slice.payload + packed, r.base + at, piece);
    packed += piece;
  }
  item.moved += bytes;
  finished = last;
  postAcross(item, link, bytes);
  return true;
}

void Transfers::announce(Item& item, int peer) {
  comm::Fabric& fabric = engine_.fabric();
  const TransferRequest& r = item.request;
  PeerCells& theirs = cells(fabric.control(peer), engine_.nodeRanks(), kTransferChannel, engine_.localIndex());
  ReadyCell& cell = theirs.ready[item.sequence % kCellDepth];
  cell.flags = 0;
  cell.status = 0;
  cell.bytes = r.bytes();
  cell.rows = r.rowBytes;
  cell.memory[kRows] = {};
  if (r.bytes() > 0) {
    std::byte* base = item.landing != nullptr ? item.landing : r.base;
    std::size_t span = r.bytes();
    if (r.listed && item.landing == nullptr) {
      for (const std::int64_t row : r.list) span = std::max(span, static_cast<std::size_t>(row + 1) * r.rowBytes);
      cell.flags |= kWantsLandingList;
      cell.memory[kExtra] = fabric.describe(engine_.listWindow().data() + item.listOffset, r.rows * 8);
    }
    cell.memory[kRows] = fabric.describe(base, span);
  }
  cell.sequence.store(item.sequence + 1, std::memory_order_release);
  if (peer != fabric.rank()) fabric.ring(peer);
}

// Announces what fits into the cells and takes what has arrived; true if anything moved.
bool Transfers::receiveInNode(Queue& queue, int peer) {
  bool moved = false;
  while (queue.next < queue.items.size() && queue.next < kCellDepth) {
    announce(queue.items[queue.next++], peer);
    moved = true;
  }
  Item& item = queue.items.front();
  comm::Fabric& fabric = engine_.fabric();
  const int local = engine_.topology().localIndex(peer);
  const DoneCell& done = cells(fabric.control(fabric.rank()), engine_.nodeRanks(), kTransferChannel, local)
                             .done[item.sequence % kCellDepth];
  if (done.sequence.load(std::memory_order_acquire) < item.sequence + 1) return moved;
  const TransferRequest& r = item.request;
  if (done.status != 0) mismatch(peer, done.bytes, fabric.rank(), r.bytes(), item.sequence);
  if (item.landing != nullptr) {
    const PieceWalk mine(r.listed ? r.list.data() : nullptr, r.rowBytes);
    for (std::size_t at = 0; at < r.bytes();) {
      std::size_t piece = 0;
      const std::size_t to = mine.piece(at, r.bytes() - at, piece);
      std::memcpy(r.base + to, item.landing + at, piece);
      at += piece;
    }
    engine_.statistics().stagedBytes += r.bytes();
  }
  queue.items.pop_front();
  --queue.next;
  return true;
}

bool Transfers::receiveAcross(Item& item, int peer, bool& finished) {
  transport::PostedLink& link =
      engine_.fabric().link(peer, kTransferChannel, engine_.topology().homePath(engine_.fabric().rank(), peer));
  if (item.arriving) {
    if (!passage(false, peer).done()) return true;
    item.arriving = false;
    finished = item.moved == item.request.bytes();
    link.release();
    return true;
  }
  const std::byte* slot = link.peek();
  if (slot == nullptr) return false;
  const Slice slice = readSlice(slot, link.slotBytes());
  const transport::SliceHeader& h = *slice.header;
  const TransferRequest& r = item.request;
  const std::size_t sent = h.signature;
  if (slice.kind() != SliceKind::bytes || h.rows != 1 || h.operation != item.sequence || h.rowOffset != item.moved ||
      sent != r.bytes() || h.rowBytes > r.bytes() - item.moved) {
    mismatch(peer, sent, engine_.fabric().rank(), r.bytes(), item.sequence);
  }
  StageTimer timer(engine_.statistics().placeNs);
  if (engine_.device() != nullptr && h.rowBytes > 0) {
    exec::Passage& way = passage(false, peer);
    const std::byte* const place = engine_.payloadIn(link, slice.payload);
    moveOnDevice(item, const_cast<std::byte*>(way.in(place, h.rowBytes)), h.rowBytes);
    way.close();
    item.moved += h.rowBytes;
    item.arriving = true;
    engine_.statistics().bytesPlaced += h.rowBytes;
    return true;
  }
  const PieceWalk mine(r.listed ? r.list.data() : nullptr, r.rowBytes);
  for (std::size_t unpacked = 0; unpacked < h.rowBytes;) {
    std::size_t piece = 0;
    const std::size_t to = mine.piece(item.moved + unpacked, h.rowBytes - unpacked, piece);
    std::memcpy(r.base + to, slice.payload + unpacked, piece);
    unpacked += piece;
  }
  item.moved += h.rowBytes;
  engine_.statistics().bytesPlaced += h.rowBytes;
  finished = slice.last();
  link.release();
  return true;
}

Outcome Transfers::advanceReceive(int peer) {
  Queue& queue = receives_[static_cast<std::size_t>(peer)];
  bool moved = false;
  while (!queue.items.empty()) {
    bool step = false;
    if (sameNode(peer)) {
      step = receiveInNode(queue, peer);
    } else {
      bool finished = false;
      step = receiveAcross(queue.items.front(), peer, finished);
      if (finished) queue.items.pop_front();
    }
    if (!step) {
      if (!moved) waitingFor_ = peer;
      return moved ? Outcome::moved : Outcome::idle;
    }
    moved = true;
    // The GPU is at work: others get their turn.
    if (!queue.items.empty() && queue.items.front().arriving) return Outcome::moved;
  }
  return Outcome::complete;
}

}  // namespace fusco::engine
