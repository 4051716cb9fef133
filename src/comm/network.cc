#include "comm/network.h"

#include <poll.h>

#include "base/log.h"
#include "base/status.h"

namespace fusco::comm {

namespace {

constexpr std::int64_t kCallMs = 10000;

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
             "up, or could not listen; its log says more with FUSCO_DEBUG=INFO");
  }
  tree_ =
      std::make_unique<Tree>(reactor_, rank_, static_cast<int>(records_.size()), treeShape_,
                             Tree::Ways{ways_.hear, ways_.ringBell, [this](int one) { return other(one).describe(); }});
  switchboard_ = std::make_unique<Switchboard>(
      reactor_, key, std::move(listeners), [this](const Purpose& purpose) { return judge(purpose); },
      [this](const Purpose& purpose, UniqueFd socket) { take(purpose, std::move(socket)); });
}

// First what hands out connections, then what uses them, at last the thread.
Network::~Network() {
  switchboard_.reset();
  tree_.reset();
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

void Network::join(Deadline deadline, const std::function<void()>& check) {
  if (treeShape_.parent >= 0) callParent();
  for (;;) {
    const std::vector<int> missing = tree_->missing();
    if (missing.empty()) return;
    std::string why;
    bool again = false;
    {
      std::lock_guard lock(mutex_);
      std::swap(again, callParent_);
      why = parentFailure_;
    }
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

Network::Line& Network::lineTo(int peer, int channel, Purpose::Kind kind) {
  Line& line = lines_[{peer, channel}];
  if (line.link) return line;
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
  return line;
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

int Network::brokenLink(const std::function<bool(int peer)>& excused, std::string* how) const {
  std::lock_guard lock(mutex_);
  for (const auto& [key, line] : lines_) {
    if (!line.failure.empty()) {
      *how = line.failure;
      return key.first;
    }
    if (line.link->state() == transport::NetworkLink::State::open || excused(key.first)) continue;
    *how = line.link->failure();
    return key.first;
  }
  return -1;
}

std::size_t Network::memoryBytes() const {
  std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& [key, line] : lines_) bytes += line.link->bytesMade();
  return bytes;
}

}  // namespace fusco::comm
