#include "transport/verbs/link.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/clock.h"
#include "base/environment.h"
#include "base/log.h"
#include "base/status.h"

namespace fusco::transport {

namespace {

constexpr std::int64_t kFarewellMs = 1000;
constexpr std::uint64_t kReceive = ~std::uint64_t{0};  // work request id of all receives
constexpr int kPolled = 16;
// Of requests without a slice: now and then one tells that those before it are done.
constexpr std::uint64_t kSignalEvery = 8;

std::uint32_t announcement(bool slice, std::uint64_t sequence, std::uint64_t released) {
  const Announcement said{slice, static_cast<std::uint32_t>(sequence), static_cast<std::uint32_t>(released)};
  const std::uint32_t bits = said.pack();
  return htonl(bits);
}

}  // namespace

QueuePairLink::QueuePairLink(Reactor& reactor, Nic& nic, NetworkLinkOptions options)
    : reactor_(reactor),
      nic_(nic),
      verbs_(nic.verbs()),
      options_(std::move(options)),
      process_(::getpid()),
      stride_((options_.slotBytes + 63) / 64 * 64) {
  if (options_.slots < 1 || options_.slots > 1024 || options_.streams != 1 || options_.slotBytes == 0)
    fail(Code::internalError, "a link by queue pairs has 1 to 1024 slots and one socket");
  // A slice is two requests. Completions may be taken later than the credits that tell the same: twice the slots.
  mostSends_ = 4 * options_.slots + 16;
  // Credits go when half of the slots have been released, or with a slice.
  mostReceives_ = 2 * options_.slots + 8;
  reactor_.join(this);
  nic_.enter(this);
}

QueuePairLink::~QueuePairLink() {
  // A child that was forked off must not touch the parent's queue pairs, nor memory that it was not given.
  if (::getpid() != process_) {
    static_cast<void>(new Slots(std::move(out_)));
    static_cast<void>(new Slots(std::move(in_)));
    return;
  }
  reactor_.leave(this);
  nic_.leave(this);
  const Deadline deadline = Deadline::afterMs(kFarewellMs);
  while (state() != State::failed && !drained() && !deadline.passed()) ::poll(nullptr, 0, 1);
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
  if (socket_) {
    reactor_.remove(socket_.get());
    socket_.reset();
  }
  if (pair_ != nullptr) verbs_.destroyQp(pair_);
  if (queue_ != nullptr) verbs_.destroyCq(queue_);
  pair_ = nullptr;
  queue_ = nullptr;
  giveBack(out_);
  giveBack(in_);
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

void QueuePairLink::fallBy(const std::string& why) {
  std::lock_guard lock(mutex_);
  fall(State::failed, why);
}

void QueuePairLink::abandon() { fallBy("was given up by this rank"); }

std::string QueuePairLink::whereabouts() const {
  std::string text = "between " + nic_.describe() + " of this rank (" + nic_.address() + ")";
  if (peer_.nic[0] != 0) {
    GidBytes gid;
    std::memcpy(gid.data(), peer_.gid, gid.size());
    text += " and " + std::string(peer_.nic) + " of the other (" + textOfGid(gid) + ")";
  }
  return text;
}

// ---- memory

// A child that is forked off would take pages away from under the NIC: it does not get them.
QueuePairLink::Slots QueuePairLink::makeSlots(int access) {
  Slots slots;
  slots.memory = Mapping::anonymous(static_cast<std::size_t>(options_.slots) * stride_);
  ::madvise(slots.memory.data(), slots.memory.size(), MADV_DONTFORK);
  slots.region = nic_.registerMemory(slots.memory.data(), slots.memory.size(), access);
  madeBytes_.fetch_add(slots.memory.size(), std::memory_order_relaxed);
  return slots;
}

void QueuePairLink::giveBack(Slots& slots) {
  if (slots.region != nullptr) verbs_.deregMr(slots.region);
  slots.region = nullptr;
  slots.memory.reset();
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
    if (posted_ - credited_ >= slots || !roomFor(4)) poll();
    if (state() != State::open || posted_ - credited_ >= slots || !roomFor(4)) return nullptr;
    if (!out_.memory) out_ = makeSlots(0);
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
  acquired_ = false;
  const std::uint64_t sequence = posted_++;
  if (state() != State::open) return;

  ibv_sge piece{};
  piece.addr = reinterpret_cast<std::uint64_t>(slot(out_, sequence));
  piece.length = static_cast<std::uint32_t>(bytes);
  piece.lkey = out_.region->lkey;
  ibv_send_wr data{}, notice{};
  data.sg_list = &piece;
  data.num_sge = bytes > 0 ? 1 : 0;
  data.opcode = IBV_WR_RDMA_WRITE;
  data.wr.rdma.remote_addr = peer_.address + sequence % static_cast<std::uint64_t>(options_.slots) * stride_;
  data.wr.rdma.rkey = peer_.key;
  // Where the network may choose a way for each packet, it does so for writes only: a large slice's notice goes apart.
  const bool apart = static_cast<std::int64_t>(bytes) > environment().number(Setting::ibAdaptiveThreshold);
  ibv_send_wr& last = apart ? notice : data;
  if (apart) {
    data.next = &notice;
    data.wr_id = ++requests_;
    notice.wr.rdma = data.wr.rdma;
  }
  last.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  last.imm_data = announcement(true, sequence, released_);
  last.send_flags = IBV_SEND_SIGNALED;
  last.wr_id = ++requests_;
  lastSlice_ = lastSignalled_ = requests_;
  creditSaid_ = released_;
  counts_.bytesWritten += bytes;
  postRequests(&data, apart ? 2 : 1);
}

bool QueuePairLink::postRequests(ibv_send_wr* first, int count) {
  ibv_send_wr* bad = nullptr;
  ++counts_.posts;
  counts_.workRequests += static_cast<std::uint64_t>(count);
  const int error = ::ibv_post_send(pair_, first, &bad);
  if (error == 0) return true;
  fall(State::failed, "cannot be written to any more " + whereabouts() + ": " + std::strerror(error));
  return false;
}

bool QueuePairLink::drained() {
  std::lock_guard lock(mutex_);
  if (retired_ < lastSlice_) poll();
  return retired_ >= lastSlice_ || state() != State::open;
}

// ---- receiving

const std::byte* QueuePairLink::peek() {
  std::lock_guard lock(mutex_);
  if (arrived_ == released_) poll();
  return arrived_ == released_ ? nullptr : slot(in_, released_);
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
  credit.imm_data = announcement(false, 0, released_);
  credit.wr.rdma.remote_addr = peer_.address;
  credit.wr.rdma.rkey = peer_.key;
  credit.wr_id = ++requests_;
  if (requests_ - lastSignalled_ >= kSignalEvery) {
    credit.send_flags = IBV_SEND_SIGNALED;
    lastSignalled_ = requests_;
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
      return fall(State::failed, "cannot be listened to any more " + whereabouts() + ": " + std::strerror(error));
    }
  }
}

// Takes all completions that are there; returns how many.
int QueuePairLink::poll() {
  if (pair_ == nullptr) return 0;
  int total = 0;
  for (;;) {
    ibv_wc completions[kPolled];
    const int count = ::ibv_poll_cq(queue_, kPolled, completions);
    if (count < 0) {
      fall(State::failed, "cannot be heard any more: the completion queue on " + nic_.describe() + " is broken");
      break;
    }
    int received = 0;
    for (int i = 0; i < count; ++i) {
      received += completions[i].wr_id == kReceive && completions[i].status == IBV_WC_SUCCESS ? 1 : 0;
      take(completions[i]);
    }
    if (state() == State::open) postReceives(received);
    total += count;
    if (count < kPolled) break;
  }
  if (total > 0) offerCredit();
  return total;
}

void QueuePairLink::take(const ibv_wc& completion) {
  if (completion.status != IBV_WC_SUCCESS) {
    const bool receive = completion.wr_id == kReceive;
    // What was to come is called off when the queue pair fails or a peer leaves; the reason has been told or follows.
    if (completion.status == IBV_WC_WR_FLUSH_ERR && receive) return;
    return fall(State::failed, std::string(receive ? "could not be heard " : "could not be written to ") +
                                   whereabouts() + ": " + verbs_.statusText(completion.status) + " (work completion " +
                                   std::to_string(completion.status) + ", vendor code " +
                                   std::to_string(completion.vendor_err) + ")");
  }
  if (completion.wr_id != kReceive) {
    ++counts_.sendsDone;
    retired_ = completion.wr_id;
    return;
  }
  ++counts_.arrivals;
  hear(Announcement::unpack(ntohl(completion.imm_data)));
}

void QueuePairLink::hear(Announcement said) {
  const auto slots = static_cast<std::uint64_t>(options_.slots);
  const std::uint64_t credits = (said.released - static_cast<std::uint32_t>(credited_)) & 0xffff;
  const bool inOrder = !said.slice || (said.sequence == (arrived_ & 0x7fff) && arrived_ - released_ < slots);
  if (credits > posted_ - credited_ || !inOrder) {
    return fall(State::failed,
                "announced what does not belong to this link; it runs another version or other settings");
  }
  credited_ += credits;
  if (said.slice) ++arrived_;
}

// ---- with the reactor

bool QueuePairLink::poke() {
  std::lock_guard lock(mutex_);
  const State before = state();
  return poll() > 0 || state() != before;
}

void QueuePairLink::attend() {
  std::lock_guard lock(mutex_);
  if (pair_ == nullptr || notified_ || state() == State::failed) return;
  if (::ibv_req_notify_cq(queue_, 0) != 0) {
    return fall(State::failed, "cannot be waited for: " + nic_.describe() + " gives no events");
  }
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

void QueuePairLink::breakQueuePair() {
  std::lock_guard lock(mutex_);
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_ERR;
  modify(attributes, IBV_QP_STATE, "ERR");
}

}  // namespace fusco::transport
