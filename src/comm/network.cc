#include "comm/network.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>

#include "base/log.h"
#include "base/status.h"
#include "transport/tcp/connect.h"

namespace fusco::comm {

namespace {

constexpr std::int64_t kCallMs = 10000;
constexpr std::int64_t kFarewellMs = 1000;
// Who is missing in the tree is asked for after the first, and given up when its machine says nothing for the second.
constexpr std::int64_t kProbeAfterNs = 300'000'000;
constexpr std::int64_t kSilentNs = 7'500'000'000;
// A link is slow if it has had more to send than went for so long, and less went than this, or than this share of what
// another link of the rank carries at the same time.
constexpr std::int64_t kPaceMs = 1000;
constexpr double kSlowSeconds = 3;
constexpr double kSlowRate = 2e6;  // bytes a second
constexpr double kSlowShare = 1.0 / 16;

std::vector<std::uint64_t> domainsOf(const std::vector<Record>& records) {
  std::vector<std::uint64_t> domains;
  for (const Record& record : records) domains.push_back(record.domain);
  return domains;
}

const transport::Address& addressOf(const Record& record, int lane) {
  return record.addresses[lane % record.addressCount];
}

}  // namespace

Network::Network(const std::vector<Record>& records, int rank, const plan::Topology& topology,
                 const std::uint8_t key[32], std::vector<UniqueFd> listeners, LinkShape shape, Ways ways)
    : records_(records),
      rank_(rank),
      topology_(topology),
      shape_(shape),
      ways_(std::move(ways)),
      treeShape_(treeShape(rank, domainsOf(records))) {
  for (const Record& record : records_) {
    if (record.addressCount > 0) continue;
    fail(Code::systemError,
         record.describe() +
             " cannot be reached by TCP, which these ranks need: it has no network interface that is "
             "up (of those that FUSCO_SOCKET_IFNAME names, where it is set), or could not listen; its log says more, "
             "with "
             "FUSCO_DEBUG=INFO");
  }
  tree_ =
      std::make_unique<Tree>(reactor_, rank_, static_cast<int>(records_.size()), treeShape_,
                             Tree::Ways{ways_.hear, ways_.ringBell, [this](int one) { return other(one).describe(); }});
  switchboard_ = std::make_unique<Switchboard>(
      reactor_, key, std::move(listeners), [this](const Purpose& purpose) { return judge(purpose); },
      [this](const Purpose& purpose, UniqueFd socket) { take(purpose, std::move(socket)); },
      [this] {
        starves_.store(true, std::memory_order_release);
        ways_.ringBell();
      });
  paceNs_ = nowNs();
  paceTimer_ = reactor_.every(kPaceMs, [this] { lookAtPace(); });
  if (treeShape_.parent >= 0) callParent();
}

// First what hands out connections, then what uses them, at last the thread.
Network::~Network() {
  reactor_.cancel(paceTimer_);
  switchboard_.reset();
  tree_.reset();
  // All of them together have as long as one: first each says what it can at once.
  const Deadline patience = Deadline::afterMs(kFarewellMs);
  for (auto& [key, line] : lines_) line.link->farewell(Deadline::afterNs(0));
  for (auto& [key, line] : lines_) line.link->farewell(patience);
  lines_.clear();
}

// ---- the tree

void Network::callParent() {
  const int parent = treeShape_.parent;
  const auto done = [this, parent](UniqueFd socket, bool refused, const std::string& why) {
    if (socket) return tree_->attach(parent, std::move(socket));
    {
      std::lock_guard lock(mutex_);
      parentFailure_ = refused ? "it refused the connection" : why;
      callParent_ = true;
    }
    ways_.ringBell();
  };
  switchboard_->call(addressOf(other(parent), 0), {}, {Purpose::tree, rank_, 0, 0}, Deadline::afterMs(kCallMs), done);
}

namespace {

// Asks a machine's kernel whether it is there, by a connection that means nothing: who has met all others may still be
// late with its calls, or be stopped, and that is no error before the time-out.
class Probe {
 public:
  explicit Probe(const transport::Address& to) : to_(to), heardNs_(nowNs()) {}
  // For how long nothing has been heard.
  std::int64_t silentNs() {
    if (!socket_ && nowNs() >= nextNs_) {
      nextNs_ = nowNs() + kEveryNs;
      socket_ = transport::beginConnect(to_);
      refused_ = !socket_ && errno == ECONNREFUSED;
      starved_ = !socket_ && (errno == EMFILE || errno == ENFILE);
    }
    pollfd polled{socket_.get(), POLLOUT, 0};
    if (socket_ && ::poll(&polled, 1, 0) > 0) {
      const int error = transport::connectResult(socket_.get());
      socket_.reset();
      if (error == 0) heardNs_ = nowNs();
      refused_ = error == ECONNREFUSED;
    }
    return nowNs() - heardNs_;
  }
  // Nobody listens there any more.
  bool refused() const { return refused_; }
  // This process has no descriptor to ask with.
  bool starved() const { return starved_; }

 private:
  static constexpr std::int64_t kEveryNs = 250'000'000;
  const transport::Address to_;
  std::int64_t heardNs_;
  std::int64_t nextNs_ = 0;
  bool refused_ = false;
  bool starved_ = false;
  UniqueFd socket_;
};

}  // namespace

void Network::join(Deadline deadline, const std::function<void()>& check) {
  const std::int64_t begun = nowNs();
  std::map<int, Probe> probes;
  for (;;) {
    const std::vector<int> missing = tree_->missing();
    if (missing.empty()) return;
    for (const int one : missing) {
      if (nowNs() - begun < kProbeAfterNs) break;
      Probe& probe = probes.try_emplace(one, addressOf(other(one), 0)).first->second;
      const std::int64_t silent = probe.silentNs();
      if (probe.refused()) {
        fail(Code::remoteError,
             other(one).describe() + " died or gave up at init, after all ranks had met; look at its log");
      }
      if (probe.starved()) failStarving();
      if (silent < kSilentNs) continue;
      fail(Code::remoteError, other(one).describe() + " cannot be reached at init: its machine has not answered at " +
                                  transport::textOf(addressOf(other(one), 0)) + " for " +
                                  std::to_string(silent / 1'000'000'000) +
                                  " s; look at that machine and at the network between");
    }
    std::string why;
    bool again = false;
    {
      std::lock_guard lock(mutex_);
      std::swap(again, callParent_);
      why = parentFailure_;
    }
    if (starves()) failStarving();
    check();
    if (deadline.passed()) {
      std::string names;
      for (const int one : missing) names += (names.empty() ? "" : ", ") + other(one).describe();
      if (!why.empty() && missing.front() == treeShape_.parent) {
        names += " (at " + transport::textOf(addressOf(other(treeShape_.parent), 0)) + ": " + why + ")";
      }
      fail(Code::remoteError, own().describe() + " was not connected at init with " + names +
                                  "; look whether they are alive and whether the network lets TCP through between "
                                  "these machines");
    }
    ::poll(nullptr, 0, again ? 50 : 1);
    if (again) callParent();
  }
}

// ---- links

void Network::offer(std::unique_ptr<transport::VerbsNics> nics) {
  nics->serve(reactor_);
  std::lock_guard lock(mutex_);
  nics_ = std::move(nics);
}

void Network::useQueuePairs(std::vector<bool> peers) { byQueuePair_ = std::move(peers); }

void Network::forgetWindow(std::uint32_t id) {
  if (nics_) nics_->forgetWindow(id);
}

void Network::knowShared(const void* address, std::size_t bytes) {
  if (nics_) nics_->knowShared(address, bytes);
}

void Network::forgetShared(const void* address) {
  if (nics_) nics_->forgetShared(address);
}

// Known only once it has its link: where memory is short it has none, and all others are still looked after.
Network::Line& Network::lineTo(int peer, int channel, Purpose::Kind kind) {
  const auto found = lines_.find({peer, channel});
  if (found != lines_.end()) return found->second;
  Line line;
  line.kind = kind;
  line.stages.assign(kStreams, Stage::none);
  transport::NetworkLinkOptions options{shape_.slotBytes, shape_.slots, kStreams,
                                        [this, peer, channel] { open(peer, channel); }, ways_.ringBell};
  if (kind == Purpose::verbsLink) {
    // A node that is one lane may still have several NICs: its ranks take those that are near to them.
    const int nic = topology_.lanesPerNode() == 1
                        ? nics_->nearest(topology_.localIndex(rank_))
                        : topology_.laneOf(rank_, peer, channel / shape_.channels) % nics_->count();
    line.link = nics_->link(nic, std::move(options));
  } else {
    line.link = std::make_unique<transport::TcpLink>(reactor_, std::move(options));
  }
  return lines_.emplace(std::pair(peer, channel), std::move(line)).first->second;
}

transport::PostedLink& Network::link(int peer, int channel) {
  const bool verbs = !byQueuePair_.empty() && byQueuePair_[static_cast<std::size_t>(peer)];
  std::lock_guard lock(mutex_);
  return *lineTo(peer, channel, verbs ? Purpose::verbsLink : Purpose::link).link;
}

void Network::open(int peer, int channel) {
  for (int stream = 0; stream < kStreams; ++stream) {
    {
      std::lock_guard lock(mutex_);
      Stage& stage = lines_.at({peer, channel}).stages[static_cast<std::size_t>(stream)];
      if (stage != Stage::none) continue;
      stage = Stage::calling;
    }
    callStream(peer, channel, stream);
  }
}

void Network::callStream(int peer, int channel, int stream) {
  const int path = channel / shape_.channels;
  const transport::Address& to = addressOf(other(peer), topology_.laneOf(peer, rank_, path));
  // With one interface the kernel's routes are good enough.
  const transport::Address from =
      own().addressCount > 1 ? addressOf(own(), topology_.laneOf(rank_, peer, path)) : transport::Address{};
  const auto done = [this, peer, channel, stream, to](UniqueFd socket, bool refused, const std::string& why) {
    // Refused: the lower rank has called as well, and its call counts.
    if (refused) return;
    transport::NetworkLink* link = nullptr;
    {
      std::lock_guard lock(mutex_);
      Line& line = lines_.at({peer, channel});
      Stage& stage = line.stages[static_cast<std::size_t>(stream)];
      if (stage != Stage::calling) return;
      if (socket) {
        stage = Stage::connected;
        link = line.link.get();
      } else {
        line.failure = "cannot be reached at " + transport::textOf(to) + ": " + why;
      }
    }
    if (link != nullptr) link->attach(stream, std::move(socket));
    ways_.ringBell();
  };
  FUSCO_INFO(kLogNet, "{} connects channel {} to {} at {}", own().describe(), channel, other(peer).describe(),
             transport::textOf(to));
  Purpose::Kind kind;
  {
    std::lock_guard lock(mutex_);
    kind = lines_.at({peer, channel}).kind;
  }
  switchboard_->call(to, from, {kind, rank_, channel, stream}, Deadline::afterMs(kCallMs), done);
}

bool Network::judge(const Purpose& purpose) {
  const int peer = purpose.rank;
  if (peer < 0 || peer >= static_cast<int>(records_.size()) || peer == rank_) return false;
  if (purpose.kind == Purpose::tree) return tree_->wants(peer);
  const bool verbs = purpose.kind == Purpose::verbsLink;
  if ((purpose.kind != Purpose::link && !verbs) || purpose.stream < 0 || purpose.stream >= kStreams ||
      purpose.channel < 0 || purpose.channel >= shape_.channels * topology_.paths() ||
      topology_.nodeOf(peer) == topology_.nodeOf(rank_)) {
    return false;
  }
  std::lock_guard lock(mutex_);
  if (verbs && !nics_) return false;
  Line& line = lineTo(peer, purpose.channel, verbs ? Purpose::verbsLink : Purpose::link);
  Stage& stage = line.stages[static_cast<std::size_t>(purpose.stream)];
  if (line.kind != static_cast<Purpose::Kind>(purpose.kind)) return false;
  if (stage == Stage::connected || (stage == Stage::calling && rank_ < peer)) return false;
  stage = Stage::connected;
  return true;
}

void Network::take(const Purpose& purpose, UniqueFd socket) {
  if (purpose.kind == Purpose::tree) return tree_->attach(purpose.rank, std::move(socket));
  transport::NetworkLink* link = nullptr;
  {
    std::lock_guard lock(mutex_);
    link = lines_.at({purpose.rank, purpose.channel}).link.get();
  }
  link->attach(purpose.stream, std::move(socket));
  ways_.ringBell();
}

// A cable that has gone bad costs all ranks its time, and nothing else would say so. What is looked at is the way
// alone: a peer that takes nothing is busy with something else.
void Network::lookAtPace() {
  const std::int64_t now = nowNs();
  const double seconds = static_cast<double>(now - paceNs_) / 1e9;
  paceNs_ = now;
  struct Busy {
    const std::pair<int, int>* key;
    Line* line;
    double rate;
  };
  std::vector<Busy> busy;
  double fastest = 0;
  std::lock_guard lock(mutex_);
  for (auto& [key, line] : lines_) {
    if (line.kind != Purpose::link) continue;
    const transport::PostedLink::Sent sent = line.link->sent();
    const transport::PostedLink::Sent last = std::exchange(line.sent, sent);
    const double waited = static_cast<double>(sent.busyNs - last.busyNs) / 1e9;
    const double bytes = static_cast<double>(sent.bytes - last.bytes);
    if (waited < seconds / 10) {
      line.slowSeconds = line.slowBytes = 0;
      continue;
    }
    fastest = std::max(fastest, bytes / waited);
    // Only what is held up all the time counts.
    if (waited > seconds * 0.8) busy.push_back({&key, &line, bytes / waited});
  }
  for (const auto& [key, line, rate] : busy) {
    if (rate > kSlowRate && rate > fastest * kSlowShare) {
      line->slowSeconds = line->slowBytes = 0;
      continue;
    }
    line->slowSeconds += seconds;
    line->slowBytes += rate * seconds;
    if (line->slowTold || line->slowSeconds < kSlowSeconds) continue;
    line->slowTold = true;
    const int peer = key->first;
    const transport::Address& to = addressOf(other(peer), topology_.laneOf(peer, rank_, key->second / shape_.channels));
    FUSCO_WARN(
        "{} reaches {} at {} slowly: {:.2f} MB/s in the last {:.0f} s, with more waiting all the time; all ranks wait "
        "for that, look at the cable, the port and the network between",
        own().describe(), other(peer).describe(), transport::textOf(to), line->slowBytes / line->slowSeconds / 1e6,
        line->slowSeconds);
  }
}

void Network::failStarving() const {
  fail(Code::systemError, own().describe() +
                              " has no file descriptors left for its connections; it needs one for each rank, channel "
                              "and lane that it sends to by TCP, and some more: raise `ulimit -n`");
}

int Network::brokenLink(const std::function<bool(int peer)>& excused, std::string* how, bool* orderly) const {
  std::lock_guard lock(mutex_);
  int closed = -1;
  *orderly = false;
  for (const auto& [key, line] : lines_) {
    if (!line.failure.empty()) {
      *how = line.failure;
      return key.first;
    }
    const transport::NetworkLink::State state = line.link->state();
    if (state == transport::NetworkLink::State::open || excused(key.first)) continue;
    if (state == transport::NetworkLink::State::closed) {
      closed = key.first;
      continue;
    }
    *how = line.link->failure();
    return key.first;
  }
  *orderly = closed >= 0;
  if (closed >= 0) *how = "closed its connection";
  return closed;
}

std::size_t Network::memoryBytes() const {
  std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& [key, line] : lines_) bytes += line.link->bytesMade();
  return bytes;
}

}  // namespace fusco::comm
