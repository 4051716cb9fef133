#include "transport/verbs/link.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/clock.h"
#include "base/environment.h"
#include "base/log.h"
#include "base/status.h"

namespace fusco::transport {

namespace {

constexpr std::int64_t kFarewellMs = 1000;
constexpr std::uint64_t kReceive = ~std::uint64_t{0};  // work request id of all receives
constexpr int kPolled = 16;
// A row of less is packed: a piece costs a NIC about as much as some kilobytes do.
constexpr std::size_t kLeastRow = 4096;
// Of a request. NICs take about thirty; each makes the queue larger.
constexpr int kMostPieces = 16;
// Of requests without a slice: now and then one tells that those before it are done.
constexpr std::uint64_t kSignalEvery = 8;
// A completion that was found after a longer time than this, and not by an event, may have been there for long.
constexpr std::int64_t kBlindNs = 1'000'000;

std::uint32_t announcement(bool slice, bool places, bool mirrored, std::uint64_t sequence, std::uint64_t released) {
  const Announcement said{slice, places, mirrored, static_cast<std::uint32_t>(sequence),
                          static_cast<std::uint32_t>(released)};
  const std::uint32_t bits = said.pack();
  return htonl(bits);
}

}  // namespace

QueuePairLink::QueuePairLink(Reactor& reactor, std::vector<Nic*> nics, int nic, NetworkLinkOptions options,
                             std::shared_ptr<GpuMemory> gpu)
    : reactor_(reactor),
      nics_(std::move(nics)),
      verbs_(nics_.front()->verbs()),
      options_(std::move(options)),
      gpu_(std::move(gpu)),
      process_(::getpid()),
      stride_((options_.slotBytes + 63) / 64 * 64) {
  if (options_.slots < 1 || options_.slots > 1024 || options_.streams != 1 || options_.slotBytes == 0)
    fail(Code::internalError, "a link by queue pairs has 1 to 1024 slots and one socket");
  const int living = livingNic(nic);
  enterNic(living >= 0 ? living : nic);
  // A slice whose rows are gathered, all of them as small as may be, takes some requests for its pieces and one for the
  // notice; else it is two.
  sges_ = std::min({kMostPieces, nic_->limits().max_sge, static_cast<int>(options_.slotBytes / kLeastRow)});
  if (sges_ < 2) sges_ = 1;
  if (sges_ > 1) mostOfSlice_ = static_cast<int>(options_.slotBytes / kLeastRow + 1) / sges_ + 2;
  // Head and payload to two places, and the notice.
  const int least = gpu_ != nullptr ? 3 : 2;
  mostOfSlice_ = std::max(mostOfSlice_, least);
  // Completions may be taken later than the credits that tell the same: twice the slots.
  mostSends_ = 2 * options_.slots * mostOfSlice_ + 16;
  if (environment().flag(Setting::ibPlaceRows) && sges_ > 1) {
    // A row each, the head, the notice; and boards.
    const int most = static_cast<int>(options_.slotBytes / kLeastRow) + 3;
    const int sends = 2 * options_.slots * most + 4 * options_.slots + 16;
    if (sends <= nic_->limits().max_qp_wr) {
      boards_ = options_.slots + 2;
      mostOfSlice_ = most;
      mostSends_ = sends;
    }
  }
  if (mostSends_ > nic_->limits().max_qp_wr) {
    sges_ = 1;
    mostOfSlice_ = least;
    mostSends_ = 2 * options_.slots * least + 16;
  }
  // Credits go when half of the slots have been released, or with a slice.
  mostReceives_ = 2 * options_.slots + 8 + boards_;
  filled_.resize(static_cast<std::size_t>(options_.slots));
  payloads_.resize(filled_.size());
  reactor_.join(this);
}

QueuePairLink::~QueuePairLink() {
  // A child that was forked off must not touch the parent's queue pairs, nor memory that it was not given.
  if (::getpid() != process_) {
    static_cast<void>(new Slots(std::move(out_)));
    static_cast<void>(new Slots(std::move(in_)));
    return;
  }
  reactor_.leave(this);
  std::uint64_t timer = 0;
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
    timer = moveTimer_;
  }
  // From here on the reactor changes nothing any more, but for what the NIC tells.
  if (timer != 0) reactor_.cancel(timer);
  if (socket_) reactor_.remove(socket_.get());
  nic_->leave(this);
  const Deadline deadline = Deadline::afterMs(kFarewellMs);
  while (state() != State::failed && !allSent() && !deadline.passed()) ::poll(nullptr, 0, 1);
  report();
  stop();
}

void QueuePairLink::report() const {
  if (pair_ == nullptr) return;
  FUSCO_INFO(
      kLogNet,
      "queue pair {} ends {}: {} slices sent, {} of them released by the other; {} came, {} released, {} told; {} "
      "requests of which {} are done, in {} posts; {} completions of sends, {} of receives; {} events of {} asked "
      "for{}",
      pair_->qp_num, whereabouts(), posted_, credited_, arrived_, released_, creditSaid_, requests_, retired_,
      counts_.posts, counts_.sendsDone, counts_.arrivals, counts_.events, counts_.notifications,
      notified_ ? ", one still to come" : "");
}

// Nobody else knows this link any more, but for events of the NIC: destroying waits until they are acknowledged.
void QueuePairLink::stop() {
  socket_.reset();
  dropQueuePair();
  free(out_);
  free(in_);
}

void QueuePairLink::dropQueuePair() {
  if (pair_ != nullptr) verbs_.destroyQp(pair_);
  if (queue_ != nullptr) verbs_.destroyCq(queue_);
  pair_ = nullptr;
  queue_ = nullptr;
  notified_ = false;
  forget(out_);
  forget(in_);
}

std::string QueuePairLink::failure() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

VerbsLink::Counts QueuePairLink::counts() const {
  std::lock_guard lock(mutex_);
  return counts_;
}

// Under the lock.
void QueuePairLink::fall(State state, const std::string& why) {
  if (state_.load(std::memory_order_relaxed) != State::open) return;
  failure_ = why;
  state_.store(state, std::memory_order_release);
  options_.ringBell();
}

void QueuePairLink::abandon() {
  std::lock_guard lock(mutex_);
  fall(State::failed, "was given up by this rank");
  // The NIC reads no row any more, and lets none be written.
  if (pair_ == nullptr || (lastGathered_ == 0 && boardsTold_ == 0)) return;
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_ERR;
  verbs_.modifyQp(pair_, &attributes, IBV_QP_STATE);
}

std::string QueuePairLink::whereabouts() const {
  std::string text = "between " + nic_->describe() + " of this rank (" + nic_->address() + ")";
  if (peer_.nicName[0] != 0) {
    GidBytes gid;
    std::memcpy(gid.data(), peer_.gid, gid.size());
    text += " and " + std::string(peer_.nicName) + " of the other (" + textOfGid(gid) + ")";
  }
  return text;
}

std::byte* QueuePairLink::slot(const Slots& slots, std::uint64_t sequence) const {
  return slots.memory.bytes() + sequence % static_cast<std::uint64_t>(options_.slots) * stride_;
}

// ---- sending

bool QueuePairLink::roomFor(int requests) const {
  return requests_ - retired_ + static_cast<std::uint64_t>(requests) <= static_cast<std::uint64_t>(mostSends_);
}

std::byte* QueuePairLink::acquire() {
  std::unique_lock lock(mutex_);
  if (!attached()) {
    const bool ask = !openAsked_ && options_.open && stage_ == Stage::none;
    openAsked_ = true;
    lock.unlock();
    if (ask) options_.open();
    return nullptr;
  }
  if (!acquired_) {
    const auto slots = static_cast<std::uint64_t>(options_.slots);
    const bool full = posted_ - credited_ >= slots || !roomFor(mostOfSlice_ + 2);
    if (full) poll();
    if (state() != State::open || posted_ - credited_ >= slots || !roomFor(mostOfSlice_ + 2)) return nullptr;
    if (!prepared(out_)) prepare(out_, 0);
    acquired_ = true;
  }
  return slot(out_, posted_);
}

void QueuePairLink::post(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  if (!acquired_) fail(Code::internalError, "a slice was posted without a slot");
  if (bytes > options_.slotBytes) {
    fail(Code::internalError, "a slice of " + std::to_string(bytes) + " bytes was written to a slot of " +
                                  std::to_string(options_.slotBytes));
  }
  Filled& filled = filled_[posted_ % filled_.size()];
  filled.head = bytes;
  filled.mirrored = 0;
  filled.rows.clear();
  filled.places.clear();
  hand(bytes);
}

void QueuePairLink::postRows(std::size_t headBytes, std::span<const Segment> rows) {
  std::lock_guard lock(mutex_);
  if (sges_ < 2) return PostedLink::postRows(headBytes, rows);
  fill(headBytes, rows, {});
}

// Lays the slice out and hands it over. Rows that follow each other are one piece, if their targets do as well.
void QueuePairLink::fill(std::size_t headBytes, std::span<const Segment> rows, std::span<const Target> targets) {
  if (!acquired_) fail(Code::internalError, "a slice was posted without a slot");
  std::size_t bytes = headBytes;
  for (const Segment& row : rows) bytes += row.bytes;
  if (bytes > options_.slotBytes) {
    fail(Code::internalError, "a slice of " + std::to_string(bytes) + " bytes was gathered for a slot of " +
                                  std::to_string(options_.slotBytes));
  }
  Filled& filled = filled_[posted_ % filled_.size()];
  filled.rows.clear();
  filled.places.clear();
  filled.head = headBytes;
  filled.mirrored = 0;
  filled.inSlot = regionOf(rows) == nullptr;
  std::byte* to = slot(out_, posted_) + headBytes;
  if (filled.inSlot) {
    for (const Segment& row : rows) {
      std::memcpy(to, row.address, row.bytes);
      to += row.bytes;
    }
    to = slot(out_, posted_) + headBytes;
    if (targets.empty()) filled.head = bytes;
  }
  const Board* const there = targets.empty() ? nullptr : board(in_, boardsHeard_);
  for (std::size_t i = 0; i < rows.size() && (!filled.inSlot || there != nullptr); ++i) {
    Segment row = rows[i];
    if (filled.inSlot) row.address = to;
    to += row.bytes;
    Segment* last = filled.rows.empty() ? nullptr : &filled.rows.back();
    bool follows = last != nullptr && static_cast<std::byte*>(last->address) + last->bytes == row.address;
    Filled::Place place{};
    if (there != nullptr) {
      const Board::Piece& piece = there->pieces[targets[i].piece];
      place = {piece.address + targets[i].offset, piece.key};
      follows = follows && filled.places.back().key == place.key &&
                filled.places.back().address + last->bytes == place.address;
      counts_.bytesPlaced += row.bytes;
    }
    if (follows) {
      last->bytes += row.bytes;
      continue;
    }
    filled.rows.push_back(row);
    if (there != nullptr) filled.places.push_back(place);
  }
  hand(bytes);
}

// The registration that all rows have in common, if they are large enough and in one window.
const ibv_mr* QueuePairLink::regionOf(std::span<const Segment> rows) {
  if (rows.empty() || sges_ < 2) return nullptr;
  for (const Segment& row : rows) {
    if (row.bytes < kLeastRow) return nullptr;
  }
  const ibv_mr* region = nic_->regionOf(rows.front().address, rows.front().bytes);
  if (region == nullptr) return nullptr;
  const auto* begin = static_cast<const std::byte*>(region->addr);
  for (const Segment& row : rows) {
    const auto* at = static_cast<const std::byte*>(row.address);
    if (at < begin || at + row.bytes > begin + region->length) return nullptr;
  }
  return region;
}

void QueuePairLink::hand(std::size_t bytes) {
  acquired_ = false;
  const std::uint64_t sequence = posted_++;
  filled_[sequence % filled_.size()].bytes = bytes;
  // Else the next queue pair takes it along.
  if (state() == State::open && attached()) send(sequence);
}

// The slice's writes into writes_, without the notice; returns how many. -1: its rows cannot be reached by this NIC.
int QueuePairLink::layOut(std::uint64_t sequence) {
  const Filled& filled = filled_[sequence % filled_.size()];
  pieces_.clear();
  writes_.clear();
  if (!filled.places.empty()) return layOutPlaced(sequence);
  if (filled.head > 0) {
    pieces_.push_back({reinterpret_cast<std::uint64_t>(slot(out_, sequence)), static_cast<std::uint32_t>(filled.head),
                       out_.region->lkey});
  }
  std::uint64_t to = peer_.address + sequence % static_cast<std::uint64_t>(options_.slots) * stride_;
  if (filled.mirrored > 0) {
    pieces_.push_back({reinterpret_cast<std::uint64_t>(mirrorOf(out_, slot(out_, sequence)) + filled.head),
                       static_cast<std::uint32_t>(filled.mirrored), out_.mirrorRegion->lkey});
    counts_.bytesMirrored += filled.mirrored;
    if (peer_.mirror != 0) return layOutApart(sequence, to);
  }
  if (!filled.rows.empty()) {
    const ibv_mr* region = regionOf(filled.rows);
    if (region == nullptr) return -1;
    for (const Segment& row : filled.rows) {
      pieces_.push_back(
          {reinterpret_cast<std::uint64_t>(row.address), static_cast<std::uint32_t>(row.bytes), region->lkey});
      counts_.bytesGathered += row.bytes;
    }
  }
  const auto most = static_cast<std::size_t>(sges_);
  // A slice of nothing is one request all the same.
  for (std::size_t at = 0; at < pieces_.size() || at == 0; at += most) {
    ibv_send_wr write{};
    write.sg_list = pieces_.data() + at;
    write.num_sge = static_cast<int>(std::min(most, pieces_.size() - at));
    write.opcode = IBV_WR_RDMA_WRITE;
    write.wr.rdma.remote_addr = to;
    write.wr.rdma.rkey = peer_.key;
    for (int i = 0; i < write.num_sge; ++i) to += write.sg_list[i].length;
    writes_.push_back(write);
  }
  return static_cast<int>(writes_.size());
}

// One call for all of a slice, one completion, whatever its size.
void QueuePairLink::send(std::uint64_t sequence) {
  const Filled& filled = filled_[sequence % filled_.size()];
  const bool places = !filled.places.empty();
  int count = layOut(sequence);
  if (count < 0) return fall(State::failed, "cannot be written to: rows on their way are in no window any more");
  // Where the network may choose a way for each packet, it does so for writes only: a large slice's notice goes apart.
  const bool apart =
      count > 1 || static_cast<std::int64_t>(filled.bytes) > environment().number(Setting::ibAdaptiveThreshold);
  if (apart) {
    ibv_send_wr notice{};
    notice.wr.rdma = writes_.front().wr.rdma;
    writes_.push_back(notice);
    ++count;
  }
  for (int i = 0; i < count; ++i) {
    ibv_send_wr& write = writes_[static_cast<std::size_t>(i)];
    write.wr_id = ++requests_;
    write.next = i + 1 < count ? &write + 1 : nullptr;
  }
  ibv_send_wr& last = writes_.back();
  last.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  last.imm_data = announcement(true, places, filled.mirrored > 0 && peer_.mirror != 0, sequence, released_);
  last.send_flags = IBV_SEND_SIGNALED;
  awaitAnswer();
  lastSlice_ = requests_;
  if (!filled.rows.empty() && !filled.inSlot) lastGathered_ = requests_;
  creditSaid_ = released_;
  counts_.bytesWritten += filled.bytes;
  const bool first = flying_.empty();
  flying_.emplace_back(requests_, filled.bytes);
  postRequests(writes_.data(), count);
  if (first) seenNs_ = nowNs();
}

// The last request is signalled.
void QueuePairLink::awaitAnswer() {
  if (retired_ >= lastSignalled_) silentNs_ = nowNs();
  lastSignalled_ = requests_;
}

bool QueuePairLink::postRequests(ibv_send_wr* first, int count) {
  ibv_send_wr* bad = nullptr;
  ++counts_.posts;
  counts_.workRequests += static_cast<std::uint64_t>(count);
  const int error = ::ibv_post_send(pair_, first, &bad);
  if (error == 0) return true;
  lose("cannot be written to any more " + whereabouts() + ": " + std::strerror(error));
  return false;
}

bool QueuePairLink::drained() {
  std::lock_guard lock(mutex_);
  if (lastGathered_ == 0 || state() != State::open) return true;
  if (retired_ < lastGathered_) poll();
  // Another queue pair may send them once more.
  return (retired_ >= lastGathered_ && attached()) || state() != State::open;
}

bool QueuePairLink::allSent() {
  std::lock_guard lock(mutex_);
  if (retired_ < lastSlice_) poll();
  return (retired_ >= lastSlice_ && lost_.empty()) || state() != State::open;
}

// ---- receiving

const std::byte* QueuePairLink::peek() {
  std::lock_guard lock(mutex_);
  if (arrived_ == released_) poll();
  return arrived_ == released_ ? nullptr : slot(in_, released_);
}

PostedLink::Arrival QueuePairLink::peekHead() {
  const std::byte* const slot = peek();
  const bool placed = slot != nullptr && payloads_[released_ % payloads_.size()] == Payload::placed;
  return {slot, slot != nullptr && !placed, placed};
}

void QueuePairLink::release() {
  std::lock_guard lock(mutex_);
  if (arrived_ == released_) fail(Code::internalError, "a slice was released that has not arrived");
  ++released_;
  offerCredit();
}

// Half of the slots at once: the peer goes on with the others meanwhile, or a slice of ours carries the news.
void QueuePairLink::offerCredit() {
  const std::uint64_t step = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(options_.slots) / 2);
  if (released_ - creditSaid_ < step || state() != State::open || !attached()) return;
  // Without room the next poll says it.
  if (!roomFor(3)) return;
  ibv_send_wr credit{};
  credit.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  credit.imm_data = announcement(false, false, false, 0, released_);
  credit.wr.rdma.remote_addr = peer_.address;
  credit.wr.rdma.rkey = peer_.key;
  credit.wr_id = ++requests_;
  if (requests_ - lastSignalled_ >= kSignalEvery) {
    credit.send_flags = IBV_SEND_SIGNALED;
    awaitAnswer();
  }
  creditSaid_ = released_;
  postRequests(&credit, 1);
}

void QueuePairLink::postReceives(int count) {
  for (int i = 0; i < count; ++i) {
    ibv_recv_wr receive{};
    receive.wr_id = kReceive;
    ibv_recv_wr* bad = nullptr;
    ++counts_.receives;
    if (const int error = ::ibv_post_recv(pair_, &receive, &bad); error != 0) {
      return lose("cannot be listened to any more " + whereabouts() + ": " + std::strerror(error));
    }
  }
}

// Takes all completions that are there; returns how many.
int QueuePairLink::poll() {
  if (pair_ == nullptr) return 0;
  const bool waiting = !flying_.empty();
  // Where an event was asked for, it comes at once.
  const bool watched = waiting && (notified_ || nowNs() - seenNs_ <= kBlindNs);
  int total = 0;
  for (;;) {
    ibv_wc completions[kPolled];
    const int count = ::ibv_poll_cq(queue_, kPolled, completions);
    if (count < 0) {
      lose("cannot be heard any more: the completion queue on " + nic_->describe() + " is broken");
      break;
    }
    int received = 0;
    for (int i = 0; i < count; ++i) {
      received += completions[i].wr_id == kReceive && completions[i].status == IBV_WC_SUCCESS ? 1 : 0;
      take(completions[i]);
    }
    if (state() == State::open && lost_.empty()) postReceives(received);
    total += count;
    if (count < kPolled) break;
  }
  if (waiting) meter(watched);
  if (total > 0) {
    taken_ = true;
    if (untold_) tellPlaces();
    offerCredit();
  }
  return total;
}

// What became of the slices on their way since the last look.
void QueuePairLink::meter(bool watched) {
  const std::int64_t now = nowNs();
  busyNs_ = watched ? busyNs_ + now - seenNs_ : 0;
  seenNs_ = now;
  if (flying_.front().first > retired_) return;
  for (; !flying_.empty() && flying_.front().first <= retired_; flying_.pop_front()) {
    if (watched) sent_.bytes += flying_.front().second;
  }
  sent_.busyNs += busyNs_;
  busyNs_ = 0;
}

PostedLink::Sent QueuePairLink::sent() {
  std::lock_guard lock(mutex_);
  if (!flying_.empty()) poll();
  return sent_;
}

void QueuePairLink::take(const ibv_wc& completion) {
  if (completion.status != IBV_WC_SUCCESS) {
    const bool receive = completion.wr_id == kReceive;
    // What was to come is called off when the queue pair fails or a peer leaves; the reason has been told or follows.
    if (completion.status == IBV_WC_WR_FLUSH_ERR && (receive || !lost_.empty())) return;
    return lose(std::string(receive ? "could not be heard " : "could not be written to ") + whereabouts() + ": " +
                verbs_.statusText(completion.status) + " (work completion " + std::to_string(completion.status) +
                ", vendor code " + std::to_string(completion.vendor_err) + ")");
  }
  if (completion.wr_id != kReceive) {
    ++counts_.sendsDone;
    retired_ = completion.wr_id;
    return;
  }
  ++counts_.arrivals;
  hear(Announcement::unpack(ntohl(completion.imm_data)));
}

// Soft-RoCE that sends a packet again has been seen to announce twice: what is known already is no news.
void QueuePairLink::hear(Announcement said) {
  const auto slots = static_cast<std::uint64_t>(options_.slots);
  const auto credits = static_cast<std::int16_t>(said.released - static_cast<std::uint32_t>(credited_));
  // Of 13 bits.
  const auto ahead = static_cast<std::int16_t>((said.sequence - static_cast<std::uint32_t>(arrived_)) << 3) / 8;
  const bool known = said.slice && ahead < 0 && -ahead <= options_.slots;
  if (credits > static_cast<std::int64_t>(posted_ - credited_) || credits < -options_.slots ||
      (said.slice && !known && (ahead != 0 || arrived_ - released_ >= slots)) ||
      (said.mirrored && (!said.slice || in_.mirror == nullptr))) {
    return fall(State::failed,
                "announced what does not belong to this link; it runs another version or other settings");
  }
  if (credits > 0) credited_ += static_cast<std::uint64_t>(credits);
  if (!said.slice && said.places) hearBoard(said.sequence);
  if (said.slice && !known) {
    payloads_[arrived_++ % slots] = said.places ? Payload::placed : said.mirrored ? Payload::mirror : Payload::slot;
  }
}

// ---- with the reactor

bool QueuePairLink::poke() {
  std::lock_guard lock(mutex_);
  const State before = state();
  poll();
  return std::exchange(taken_, false) || state() != before;
}

void QueuePairLink::attend() {
  std::lock_guard lock(mutex_);
  if (pair_ == nullptr || notified_ || state() == State::failed || !lost_.empty()) return;
  if (::ibv_req_notify_cq(queue_, 0) != 0)
    return lose("cannot be waited for: " + nic_->describe() + " gives no events");
  ++counts_.notifications;
  notified_ = true;
  // What came before the NIC was asked raises no event.
  if (poll() > 0) options_.ringBell();
}

void QueuePairLink::onCompletionEvent() {
  std::lock_guard lock(mutex_);
  notified_ = false;
  ++counts_.events;
  // Credits for which there was no room.
  if (stage_ == Stage::open) poll();
  options_.ringBell();
}

int QueuePairLink::moves() const {
  std::lock_guard lock(mutex_);
  return static_cast<int>(own_.round);
}

void QueuePairLink::spoilKey() {
  std::lock_guard lock(mutex_);
  peer_.key ^= 0x5500;
}

void QueuePairLink::breakQueuePair() {
  std::lock_guard lock(mutex_);
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_ERR;
  modify(attributes, IBV_QP_STATE, "ERR");
}

}  // namespace fusco::transport
