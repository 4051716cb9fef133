// Rows that are written to where they belong: how an end opens memory to the other, and how that writes there.
#include <arpa/inet.h>

#include <algorithm>
#include <cstring>

#include "base/environment.h"
#include "base/status.h"
#include "transport/verbs/link.h"

namespace fusco::transport {

Board* QueuePairLink::board(const Slots& slots, std::uint64_t number) const {
  std::byte* const first = slots.memory.bytes() + static_cast<std::size_t>(options_.slots) * stride_;
  return reinterpret_cast<Board*>(first) + number % static_cast<std::uint64_t>(boards_);
}

// ---- receiving

void QueuePairLink::openPlaces(std::uint64_t tag, std::span<const Segment> pieces) {
  std::lock_guard lock(mutex_);
  if (boards_ == 0) return PostedLink::openPlaces(tag, pieces);
  if (pieces.size() > Board::kMostPieces) pieces = {};
  openTag_ = tag;
  open_.assign(pieces.begin(), pieces.end());
  untold_ = true;
  tellPlaces();
}

// As soon as there is a queue pair and room: until then the peer sends by the ring.
void QueuePairLink::tellPlaces() {
  if (!attached() || state() != State::open || stage_ != Stage::open || !roomFor(2)) return;
  untold_ = false;
  if (peer_.boards != static_cast<std::uint32_t>(boards_)) return;
  if (!prepared(out_)) prepare(out_, 0);
  const std::uint64_t number = ++boardsTold_;
  Board& told = *board(out_, number);
  told.number = number;
  told.tag = openTag_;
  told.count = open_.size();
  for (std::size_t i = 0; i < open_.size(); ++i) {
    const ibv_mr* const region = open_[i].bytes > 0 ? nic_->regionOf(open_[i].address, open_[i].bytes) : nullptr;
    told.pieces[i] = {};
    if (region == nullptr) continue;
    told.pieces[i] = {reinterpret_cast<std::uint64_t>(open_[i].address), open_[i].bytes, region->rkey, 0};
  }
  ibv_sge piece{reinterpret_cast<std::uint64_t>(&told),
                static_cast<std::uint32_t>(offsetof(Board, pieces) + open_.size() * sizeof(Board::Piece)),
                out_.region->lkey};
  ibv_send_wr requests[2] = {};
  requests[0].sg_list = &piece;
  requests[0].num_sge = 1;
  requests[0].opcode = IBV_WR_RDMA_WRITE;
  requests[0].wr.rdma.remote_addr = peer_.address + (reinterpret_cast<std::uint64_t>(board(in_, number)) -
                                                     reinterpret_cast<std::uint64_t>(in_.memory.data()));
  requests[0].wr.rdma.rkey = peer_.key;
  requests[0].wr_id = ++requests_;
  requests[0].next = &requests[1];
  requests[1].opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  requests[1].wr.rdma = requests[0].wr.rdma;
  const Announcement said{false, true, false, static_cast<std::uint32_t>(number),
                          static_cast<std::uint32_t>(released_)};
  requests[1].imm_data = htonl(said.pack());
  requests[1].send_flags = IBV_SEND_SIGNALED;
  requests[1].wr_id = ++requests_;
  awaitAnswer();
  creditSaid_ = released_;
  postRequests(requests, 2);
}

// ---- sending

// A notice that comes twice is no news.
void QueuePairLink::hearBoard(std::uint32_t number) {
  const auto ahead = (number - static_cast<std::uint32_t>(boardsHeard_)) & Announcement::kSequence;
  if (ahead == 0 || ahead > Announcement::kSequence / 2) return;
  boardsHeard_ += ahead;
  heardRound_ = own_.round;
}

std::span<const std::uint64_t> QueuePairLink::placesOf(std::uint64_t tag) {
  std::lock_guard lock(mutex_);
  if (boards_ == 0 || !attached() || state() != State::open) return {};
  const auto heard = [&] {
    return boardsHeard_ > 0 && heardRound_ == own_.round && board(in_, boardsHeard_)->tag == tag;
  };
  if (!heard()) poll();
  if (!heard() || !attached() || state() != State::open) return {};
  const Board& there = *board(in_, boardsHeard_);
  if (there.number != boardsHeard_ || there.count > Board::kMostPieces) return {};
  if (sizesNumber_ != boardsHeard_) {
    sizes_.clear();
    for (std::size_t i = 0; i < there.count; ++i) sizes_.push_back(there.pieces[i].bytes);
    sizesNumber_ = boardsHeard_;
  }
  return sizes_;
}

void QueuePairLink::postPlaced(std::size_t headBytes, std::span<const Segment> rows, std::span<const Target> targets) {
  std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const bool fits = targets.size() == rows.size() && targets[i].piece < sizes_.size() &&
                      targets[i].offset <= sizes_[targets[i].piece] &&
                      rows[i].bytes <= sizes_[targets[i].piece] - targets[i].offset;
    if (!fits) fail(Code::internalError, "rows were posted to places that the peer has not opened");
  }
  // The queue pair may have been lost since, and another one come up: these rows go by the ring.
  const bool same = sizesNumber_ == boardsHeard_ && heardRound_ == own_.round && attached();
  fill(headBytes, rows, same ? targets : std::span<const Target>{});
}

// Each row is a request, to its place; then the head, to the slot. The notice is apart.
int QueuePairLink::layOutPlaced(std::uint64_t sequence) {
  const Filled& filled = filled_[sequence % filled_.size()];
  const ibv_mr* const region = filled.inSlot ? out_.region : regionOf(filled.rows);
  if (region == nullptr) return -1;
  for (const Segment& row : filled.rows) {
    pieces_.push_back(
        {reinterpret_cast<std::uint64_t>(row.address), static_cast<std::uint32_t>(row.bytes), region->lkey});
    if (!filled.inSlot) counts_.bytesGathered += row.bytes;
  }
  pieces_.push_back({reinterpret_cast<std::uint64_t>(slot(out_, sequence)), static_cast<std::uint32_t>(filled.head),
                     out_.region->lkey});
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    ibv_send_wr write{};
    write.sg_list = &pieces_[i];
    write.num_sge = 1;
    write.opcode = IBV_WR_RDMA_WRITE;
    const bool head = i == filled.rows.size();
    write.wr.rdma.remote_addr = head ? peer_.address + sequence % static_cast<std::uint64_t>(options_.slots) * stride_
                                     : filled.places[i].address;
    write.wr.rdma.rkey = head ? peer_.key : filled.places[i].key;
    writes_.push_back(write);
  }
  return static_cast<int>(writes_.size());
}

}  // namespace fusco::transport
