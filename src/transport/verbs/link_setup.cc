// How the two ends of a link bring up their queue pairs, over the socket.
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/clock.h"
#include "base/environment.h"
#include "base/log.h"
#include "base/status.h"
#include "transport/verbs/link.h"

namespace fusco::transport {

namespace {

// As NCCL has them: until the receiver posts (0.64 ms), hops of a routed packet.
constexpr int kMinRnrTimer = 12;
constexpr int kHopLimit = 255;
constexpr int kRnrRetries = 7;  // for ever

std::uint32_t firstPacket() {
  std::uint32_t number = 0;
  if (::getrandom(&number, sizeof(number), 0) != sizeof(number)) number = 1;
  return number & 0xffffff;
}

template <std::size_t kRoom>
void copyText(char (&to)[kRoom], const std::string& text) {
  const std::size_t length = std::min(text.size(), kRoom - 1);
  std::memcpy(to, text.data(), length);
  to[length] = 0;
}

}  // namespace

void QueuePairLink::attach(int stream, UniqueFd socket) {
  std::lock_guard lock(mutex_);
  if (socket_ || stream != 0) fail(Code::internalError, "the socket of a link by queue pairs came twice");
  const int flags = ::fcntl(socket.get(), F_GETFL);
  if (flags < 0 || ::fcntl(socket.get(), F_SETFL, flags | O_NONBLOCK) != 0) failErrno("cannot set up a socket");
  socket_ = std::move(socket);
  begin();
  reactor_.add(socket_.get(), [this](std::uint32_t events) { onSocket(events); });
  reactor_.arm(socket_.get(), EPOLLIN | EPOLLRDHUP);
}

// A queue pair for this round, and the greeting that tells of it.
void QueuePairLink::begin() {
  stage_ = Stage::greeted;
  std::string failure = failure_;
  if (failure.empty()) {
    try {
      makeQueuePair();
    } catch (const Error& error) {
      failure = error.what();
    }
  }
  greet(failure);
  if (!failure.empty()) fall(State::failed, "could not be connected: this rank " + failure);
}

void QueuePairLink::makeQueuePair() {
  prepare(in_, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
  if (out_.memory) prepare(out_, 0);
  const auto give = [&](const char* what) {
    const int error = errno;
    fail(Code::systemError, "gets no " + std::string(what) + " from " + nic_->describe() + ": " + std::strerror(error) +
                                (error == ENOMEM ? "; raise the limit of locked memory (`ulimit -l`)" : ""));
  };
  queue_ = verbs_.createCq(nic_->context(), mostSends_ + mostReceives_, this, nic_->channel(), 0);
  if (queue_ == nullptr) give("completion queue");
  ibv_qp_init_attr wanted{};
  wanted.qp_context = this;
  wanted.send_cq = queue_;
  wanted.recv_cq = queue_;
  wanted.qp_type = IBV_QPT_RC;
  wanted.cap.max_send_wr = static_cast<std::uint32_t>(mostSends_);
  wanted.cap.max_recv_wr = static_cast<std::uint32_t>(mostReceives_);
  wanted.cap.max_send_sge = static_cast<std::uint32_t>(sges_);
  wanted.cap.max_recv_sge = 1;
  pair_ = verbs_.createQp(nic_->domain(), &wanted);
  if (pair_ == nullptr) give("queue pair");
  toInit();
  postReceives(mostReceives_);
}

void QueuePairLink::greet(const std::string& failure) {
  const std::uint64_t round = own_.round;
  own_ = {};
  own_.round = round;
  own_.arrived = arrived_;
  own_.released = creditSaid_ = released_;
  own_.nic = static_cast<std::uint32_t>(nicNumber_);
  own_.nics = static_cast<std::uint32_t>(nics_.size());
  own_.wish = wish_;
  own_.boards = static_cast<std::uint32_t>(boards_);
  std::memcpy(own_.gid, nic_->gid().gid.data(), sizeof(own_.gid));
  copyText(own_.nicName, nic_->describe());
  copyText(own_.failure, failure);
  if (failure.empty()) {
    own_.queuePair = pair_->qp_num;
    own_.packet = firstPacket();
    own_.localId = nic_->attributes().lid;
    own_.mtu = nic_->attributes().active_mtu;
    own_.infiniband = nic_->infiniband() ? 1 : 0;
    own_.key = in_.region->rkey;
    own_.address = reinterpret_cast<std::uint64_t>(in_.memory.data());
    own_.mirror = reinterpret_cast<std::uint64_t>(in_.mirror);
    own_.mirrorKey = in_.mirrorRegion != nullptr ? in_.mirrorRegion->rkey : 0;
    own_.slotBytes = options_.slotBytes;
    own_.slots = static_cast<std::uint64_t>(options_.slots);
  }
  say(&own_, sizeof(own_));
}

// Little enough for a socket that has sent nothing yet.
void QueuePairLink::say(const void* bytes, std::size_t count) {
  const ssize_t sent = ::send(socket_.get(), bytes, count, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent == static_cast<ssize_t>(count)) return;
  fall(State::failed, std::string("broke the connection: ") + (sent < 0 ? std::strerror(errno) : "it takes nothing"));
}

void QueuePairLink::onSocket(std::uint32_t) {
  std::lock_guard lock(mutex_);
  try {
    while (!socketEnded_ && readSocket()) {
    }
  } catch (const Error& error) {
    fall(State::failed, std::string("could not be connected: this rank ") + error.what());
  }
  if (!socketEnded_) reactor_.arm(socket_.get(), EPOLLIN | EPOLLRDHUP);
}

// One read. False: there is nothing more to read for now.
bool QueuePairLink::readSocket() {
  // The first word tells what it is.
  std::uint64_t magic = 0;
  if (messageGot_ >= sizeof(magic)) std::memcpy(&magic, message_, sizeof(magic));
  const std::size_t whole = messageGot_ < sizeof(magic) ? sizeof(magic)
                            : magic == Greeting::kMagic ? sizeof(Greeting)
                                                        : sizeof(Ready);
  const ssize_t got = ::recv(socket_.get(), message_ + messageGot_, whole - messageGot_, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return errno == EINTR;
  if (got <= 0) {
    socketEnded_ = true;
    const std::string error = got < 0 ? std::strerror(errno) : "";
    // What had arrived is taken before the end is told.
    poll();
    if (got < 0) {
      fall(State::failed, "broke the connection: " + error);
    } else {
      fall(State::closed, "closed its connection");
    }
    return false;
  }
  messageGot_ += static_cast<std::size_t>(got);
  if (messageGot_ == sizeof(magic)) {
    std::memcpy(&magic, message_, sizeof(magic));
    if (magic == Greeting::kMagic || (magic == Ready::kMagic && peer_.magic == Greeting::kMagic)) return true;
    socketEnded_ = true;
    fall(State::failed, "sent what does not belong to this link; it runs another version, or is no rank");
    return false;
  }
  if (messageGot_ < whole) return true;
  messageGot_ = 0;
  onMessage();
  return true;
}

void QueuePairLink::onMessage() {
  std::uint64_t magic;
  std::memcpy(&magic, message_, sizeof(magic));
  if (magic == Greeting::kMagic) {
    Greeting peer;
    std::memcpy(&peer, message_, sizeof(peer));
    peer.nicName[sizeof(peer.nicName) - 1] = 0;
    peer.failure[sizeof(peer.failure) - 1] = 0;
    return onGreeting(peer);
  }
  Ready ready;
  std::memcpy(&ready, message_, sizeof(ready));
  // Of an earlier round: it was lost meanwhile.
  if (ready.round != own_.round || stage_ != Stage::up || state() != State::open || !lost_.empty()) return;
  stage_ = Stage::open;
  lostNs_ = 0;
  if (own_.round > 0) {
    FUSCO_INFO(kLogNet, "a link goes on {} (queue pair number {} of it)", whereabouts(), own_.round + 1);
  }
  attached_.store(true, std::memory_order_release);
  for (std::uint64_t sequence = peer_.arrived; sequence < posted_ && lost_.empty(); ++sequence) {
    // The keys of places went with the queue pair.
    Filled& filled = filled_[sequence % filled_.size()];
    if (!filled.places.empty() && filled.inSlot) {
      filled.head = filled.bytes;
      filled.rows.clear();
    }
    filled.places.clear();
    send(sequence);
  }
  if (untold_ || own_.round > 0) {
    untold_ = openTag_ != 0;
    if (untold_) tellPlaces();
  }
  offerCredit();
  options_.ringBell();
}

void QueuePairLink::onGreeting(const Greeting& peer) {
  if (state() != State::open || closing_) return;
  if (peer.failure[0] != 0) {
    return fall(State::failed, std::string("could not be connected: it ") + peer.failure);
  }
  if (peer.slotBytes != options_.slotBytes || peer.slots != static_cast<std::uint64_t>(options_.slots)) {
    return fall(State::failed, "has slices of " + std::to_string(peer.slotBytes) + " bytes, this rank " +
                                   std::to_string(options_.slotBytes) + "; give all ranks the same settings");
  }
  const bool knownSlices = peer.arrived >= credited_ && peer.arrived <= posted_ && peer.released >= credited_ &&
                           peer.released <= peer.arrived;
  if (!knownSlices || peer.round < own_.round || peer.round > own_.round + 1) {
    return fall(State::failed, "told of slices that it was not sent; it runs another version, or is no rank");
  }
  if (peer.round == own_.round + 1) {
    // The other has lost this queue pair, whether we have seen it or not.
    if (lost_.empty()) lost_ = lostFirst_ = "lost its way to this rank";
    if (lostNs_ == 0) lostNs_ = nowNs();
    attached_.store(false, std::memory_order_release);
    const int nic = livingNic(static_cast<int>(peer.wish % nics_.size()));
    if (nic < 0) return fall(State::failed, lost_ + ", and no port of this rank is left");
    change(nic);
    if (state() != State::open) return;
  }
  if (stage_ != Stage::greeted) {
    return fall(State::failed, "greeted twice; it runs another version, or is no rank");
  }
  peer_ = peer;
  credited_ = peer.released;
  connect();
}

void QueuePairLink::connect() {
  if ((peer_.infiniband != 0) != nic_->infiniband()) {
    return fall(State::failed, "could not be connected " + whereabouts() +
                                   ": one is InfiniBand, the other RoCE; choose with FUSCO_IB_HCA");
  }
  toReceive(peer_);
  toSend();
  stage_ = Stage::up;
  lost_.clear();
  Ready up;
  up.round = own_.round;
  say(&up, sizeof(up));
  FUSCO_INFO(kLogNet, "queue pair {} of {} ({}) with queue pair {} of {}", pair_->qp_num, nic_->describe(),
             nic_->gid().describe(), peer_.queuePair, peer_.nicName);
}

void QueuePairLink::modify(ibv_qp_attr& attributes, int mask, const char* step) {
  const int error = verbs_.modifyQp(pair_, &attributes, mask);
  if (error == 0) return;
  fail(Code::systemError, "cannot bring its queue pair to " + std::string(step) + " " + whereabouts() + ": " +
                              std::strerror(error) +
                              "; look whether the two addresses are of one network (FUSCO_IB_HCA, FUSCO_IB_GID_INDEX)");
}

void QueuePairLink::toInit() {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.pkey_index = static_cast<std::uint16_t>(environment().number(Setting::ibPkey));
  attributes.port_num = static_cast<std::uint8_t>(nic_->port());
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
  modify(attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, "INIT");
}

void QueuePairLink::toReceive(const Greeting& peer) {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu = static_cast<ibv_mtu>(std::min<std::uint32_t>(peer.mtu, nic_->attributes().active_mtu));
  attributes.dest_qp_num = peer.queuePair;
  attributes.rq_psn = peer.packet;
  attributes.max_dest_rd_atomic = 1;
  attributes.min_rnr_timer = kMinRnrTimer;
  ibv_ah_attr& way = attributes.ah_attr;
  way.port_num = static_cast<std::uint8_t>(nic_->port());
  way.sl = static_cast<std::uint8_t>(environment().number(Setting::ibServiceLevel));
  way.dlid = static_cast<std::uint16_t>(peer.localId);
  // RoCE always routes; InfiniBand between subnets, which have different prefixes.
  const bool sameSubnet = std::memcmp(peer.gid, nic_->gid().gid.data(), 8) == 0;
  if (!nic_->infiniband() || !sameSubnet) {
    way.is_global = 1;
    std::memcpy(way.grh.dgid.raw, peer.gid, sizeof(peer.gid));
    way.grh.sgid_index = static_cast<std::uint8_t>(nic_->gid().index);
    way.grh.hop_limit = kHopLimit;
    way.grh.traffic_class = static_cast<std::uint8_t>(environment().number(Setting::ibTrafficClass));
  }
  modify(attributes,
         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
             IBV_QP_MIN_RNR_TIMER,
         "RTR");
}

void QueuePairLink::toSend() {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTS;
  attributes.timeout = static_cast<std::uint8_t>(environment().number(Setting::ibTimeout));
  attributes.retry_cnt = static_cast<std::uint8_t>(environment().number(Setting::ibRetryCount));
  attributes.rnr_retry = kRnrRetries;
  attributes.sq_psn = own_.packet;
  attributes.max_rd_atomic = 1;
  modify(attributes,
         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC,
         "RTS");
}

}  // namespace fusco::transport
