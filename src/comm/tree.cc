#include "comm/tree.h"

#include <linux/sockios.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "base/status.h"
#include "comm/secret.h"
#include "transport/tcp/connect.h"

namespace fusco::comm {

TreeShape treeShape(int rank, std::span<const std::uint64_t> domains) {
  std::map<std::uint64_t, int> indexOf;
  std::vector<int> leaders;
  TreeShape shape;
  const std::uint64_t own = domains[static_cast<std::size_t>(rank)];
  for (int one = 0; one < static_cast<int>(domains.size()); ++one) {
    const std::uint64_t domain = domains[static_cast<std::size_t>(one)];
    if (indexOf.emplace(domain, static_cast<int>(leaders.size())).second) {
      leaders.push_back(one);
    } else if (domain == own) {
      shape.children.push_back(one);
    }
  }
  const int index = indexOf[own];
  const int leader = leaders[static_cast<std::size_t>(index)];
  if (leader != rank) return {leader, {}};
  if (index > 0) shape.parent = leaders[static_cast<std::size_t>((index - 1) / TreeShape::kBranches)];
  for (int branch = 1; branch <= TreeShape::kBranches; ++branch) {
    const std::size_t child = static_cast<std::size_t>(index * TreeShape::kBranches + branch);
    if (child < leaders.size()) shape.children.push_back(leaders[child]);
  }
  return shape;
}

Tree::Tree(transport::Reactor& reactor, int rank, int ranks, TreeShape shape, Ways ways, Patience patience)
    : reactor_(reactor),
      rank_(rank),
      ranks_(ranks),
      shape_(std::move(shape)),
      ways_(std::move(ways)),
      patience_(patience),
      edges_(shape_.children.size() + (shape_.parent >= 0 ? 1 : 0)) {
  std::size_t at = 0;
  if (shape_.parent >= 0) edges_[at++].peer = shape_.parent;
  for (const int child : shape_.children) edges_[at++].peer = child;
  beatNs_ = nowNs();
  timer_ = reactor_.every(patience_.beatMs, [this] { beat(); });
}

Tree::~Tree() {
  reactor_.cancel(timer_);
  for (Edge& edge : edges_) {
    if (edge.socket) reactor_.remove(edge.socket.get());
  }
}

Tree::Edge* Tree::edgeTo(int peer) {
  const auto found = std::find_if(edges_.begin(), edges_.end(), [&](const Edge& edge) { return edge.peer == peer; });
  return found == edges_.end() ? nullptr : &*found;
}

bool Tree::wants(int peer) const {
  std::lock_guard lock(mutex_);
  return std::any_of(edges_.begin(), edges_.end(), [&](const Edge& e) { return e.peer == peer && !e.socket; });
}

std::vector<int> Tree::missing() const {
  std::lock_guard lock(mutex_);
  std::vector<int> peers;
  for (const Edge& edge : edges_) {
    if (!edge.socket) peers.push_back(edge.peer);
  }
  return peers;
}

void Tree::attach(int peer, UniqueFd socket) {
  {
    std::lock_guard lock(mutex_);
    Edge* edge = edgeTo(peer);
    if (edge == nullptr || edge->socket) return;
    transport::keepConnection(socket.get(), patience_.silentKernelMs);
    edge->socket = std::move(socket);
    edge->open = true;
    edge->heardNs = nowNs();
    reactor_.add(edge->socket.get(), [this, edge](std::uint32_t) { onReady(edge); });
    // Something may have been told before there was anyone to hear it.
    edge->frames.flush(edge->socket.get());
    reactor_.arm(edge->socket.get(), EPOLLIN | (edge->frames.queued() ? EPOLLOUT : 0u));
  }
  ways_.ringBell();
}

void Tree::onReady(Edge* edge) {
  std::vector<News> news;
  {
    std::lock_guard lock(mutex_);
    if (!edge->open) return;
    const int descriptor = edge->socket.get();
    int error = 0;
    Frames::State state = edge->frames.receive(
        descriptor, [&](std::uint32_t kind, std::string_view body) { hear(edge, kind, body, &news); }, &error);
    if (state == Frames::State::open) state = edge->frames.flush(descriptor);
    if (state == Frames::State::open) {
      reactor_.arm(descriptor, EPOLLIN | (edge->frames.queued() ? EPOLLOUT : 0u));
    } else {
      fall(edge, state == Frames::State::malformed ? EPROTO : error, &news);
    }
  }
  for (const News& one : news) ways_.hear(one);
}

// Under the lock.
void Tree::send(Edge* edge, Kind kind, std::initializer_list<std::string_view> parts) {
  if (edge->socket && !edge->open) return;
  edge->frames.queue(static_cast<std::uint32_t>(kind), parts);
  if (!edge->open) return;
  // A broken connection is seen by who reads it.
  edge->frames.flush(edge->socket.get());
  if (edge->frames.queued()) reactor_.arm(edge->socket.get(), EPOLLIN | EPOLLOUT);
}

void Tree::hear(Edge* edge, std::uint32_t kind, std::string_view body, std::vector<News>* news) {
  edge->heardNs = nowNs();
  if (edge->stalled) {
    edge->stalled = false;
    FUSCO_WARN("{} is heard again", ways_.nameOf(edge->peer));
  }
  switch (static_cast<Kind>(kind)) {
    case Kind::beat:
      return;
    case Kind::news: {
      std::uint32_t what[2];
      if (body.size() < sizeof(what)) return;
      std::memcpy(what, body.data(), sizeof(what));
      const News one{static_cast<News::Kind>(what[0]), static_cast<std::int32_t>(what[1]),
                     std::string(body.substr(sizeof(what)))};
      if (!isRank(one.rank)) return;
      if (one.rank == edge->peer && (one.kind == News::left || one.kind == News::exited)) edge->farewell = true;
      pass(one, edge);
      news->push_back(one);
      return;
    }
    case Kind::up: {
      UpHead head;
      if (body.size() < sizeof(head)) return;
      std::memcpy(&head, body.data(), sizeof(head));
      if (isRank(head.rank) && isNear(head.round)) takeUp(head, body.substr(sizeof(head)));
      return;
    }
    case Kind::down: {
      DownHead head;
      if (body.size() < sizeof(head)) return;
      std::memcpy(&head, body.data(), sizeof(head));
      const bool differ = isRank(head.rank) && isRank(head.other);
      if ((head.rank < 0 || differ) && isNear(head.round)) takeDown(head, body.substr(sizeof(head)));
      return;
    }
  }
}

// ---- news

// Everyone who hears of an abort outside the tree tells it before leaving: once is enough.
void Tree::pass(const News& news, const Edge* from) {
  if (news.kind == News::aborted) {
    if (abortPassed_) return;
    abortPassed_ = true;
  }
  const std::uint32_t what[2] = {news.kind, static_cast<std::uint32_t>(news.rank)};
  for (Edge& edge : edges_) {
    if (&edge != from) send(&edge, Kind::news, {bytesOf(what), news.text});
  }
}

void Tree::tell(const News& news) {
  std::lock_guard lock(mutex_);
  pass(news, nullptr);
}

void Tree::fall(Edge* edge, int error, std::vector<News>* news) {
  edge->open = false;
  reactor_.remove(edge->socket.get());
  ::shutdown(edge->socket.get(), SHUT_RDWR);
  if (edge->farewell) return;
  News one{News::died, edge->peer, {}};
  switch (error) {
    case 0:
      one.text = "died: its process has ended without destroying the communicator; look at its log";
      break;
    case ETIMEDOUT:
    case EHOSTUNREACH:
    case ENETUNREACH:
      one.text = "cannot be reached any more: its machine has acknowledged nothing for " +
                 std::to_string(patience_.silentKernelMs / 1000) + " s (" + std::strerror(error) +
                 "); look at that machine and at the network between";
      break;
    default:
      one.text = std::string("died, or the connection with it was cut (") + std::strerror(error) +
                 "); look at its log and at the network between";
  }
  pass(one, edge);
  news->push_back(one);
}

void Tree::beat() {
  std::vector<News> news;
  {
    std::lock_guard lock(mutex_);
    const std::int64_t now = nowNs();
    // This process itself may have been stopped: what came meanwhile has yet to be read.
    const bool wasStopped = now - beatNs_ > 2'000'000 * patience_.beatMs;
    beatNs_ = now;
    for (Edge& edge : edges_) {
      if (!edge.open) continue;
      // A process that is stopped may have closed the window, and that is answered for by its machine.
      if (!wasStopped && transport::peerKernelIsSilent(edge.socket.get(), patience_.silentKernelMs)) {
        fall(&edge, ETIMEDOUT, &news);
        continue;
      }
      if (!edge.frames.queued()) send(&edge, Kind::beat, {});
      if (wasStopped) edge.heardNs = now;
      if (edge.stalled || edge.farewell || now - edge.heardNs < patience_.stallMs * 1'000'000) continue;
      edge.stalled = true;
      FUSCO_WARN(
          "{} has given no sign of life for {} s, though its machine answers: its process is stopped, or short of "
          "CPU time; waiting goes on",
          ways_.nameOf(edge.peer), (now - edge.heardNs) / 1'000'000'000);
    }
  }
  for (const News& one : news) ways_.hear(one);
}

void Tree::flush(std::int64_t milliseconds) {
  for (const Deadline deadline = Deadline::afterMs(milliseconds);;) {
    bool waiting = false;
    {
      std::lock_guard lock(mutex_);
      for (Edge& edge : edges_) {
        if (!edge.open) continue;
        int unacknowledged = 0;
        waiting = waiting || edge.frames.queued() ||
                  (::ioctl(edge.socket.get(), SIOCOUTQ, &unacknowledged) == 0 && unacknowledged > 0);
      }
    }
    if (!waiting || deadline.passed()) return;
    ::poll(nullptr, 0, 1);
  }
}

// ---- gathers

void Tree::contribute(std::string_view chunk, std::uint64_t whole) {
  std::lock_guard lock(mutex_);
  ++round_;
  chunkBytes_ = chunk.size();
  takeUp({round_, whole, rank_, 0}, chunk);
}

// Each rank's chunk goes on at once; what has passed is noted, so that whoever is missing can be named.
void Tree::takeUp(const UpHead& head, std::string_view chunk) {
  Round& round = rounds_[head.round];
  if (round.come.empty()) round.come.resize(static_cast<std::size_t>(ranks_));
  if (round.come[static_cast<std::size_t>(head.rank)]) return;
  round.come[static_cast<std::size_t>(head.rank)] = true;
  ++round.count;
  if (shape_.parent >= 0) return send(&edges_.front(), Kind::up, {bytesOf(head), chunk});
  if (round.failed) return;
  if (round.count == 1) {
    round.first = head.rank;
    round.whole = head.whole;
    round.all.resize(chunk.size() * static_cast<std::size_t>(ranks_));
  } else if (round.whole != head.whole || chunk.size() * static_cast<std::size_t>(ranks_) != round.all.size()) {
    round.failed = true;
    return takeDown({head.round, round.first, head.rank, round.whole, head.whole}, {});
  }
  if (!chunk.empty()) {
    std::memcpy(round.all.data() + static_cast<std::size_t>(head.rank) * chunk.size(), chunk.data(), chunk.size());
  }
  if (round.count < ranks_) return;
  const std::string all = std::move(round.all);
  takeDown({head.round, -1, -1, head.whole, head.whole}, all);
}

void Tree::takeDown(const DownHead& head, std::string_view all) {
  for (Edge& edge : edges_) {
    if (edge.peer != shape_.parent) send(&edge, Kind::down, {bytesOf(head), all});
  }
  if (head.rank >= 0) {
    // The round before may lie here untaken.
    disagreements_.emplace(head.round, head);
  } else {
    rounds_.erase(rounds_.begin(), rounds_.upper_bound(head.round));
    downRound_ = head.round;
    down_.assign(all);
  }
  ways_.ringBell();
}

bool Tree::gathered(std::string* all) {
  std::lock_guard lock(mutex_);
  if (downRound_ >= round_) {
    *all = std::move(down_);
    if (all->size() != chunkBytes_ * static_cast<std::size_t>(ranks_)) {
      fail(Code::internalError, "a collective call brought " + std::to_string(all->size()) + " bytes from " +
                                    std::to_string(ranks_) + " ranks, " + std::to_string(chunkBytes_) +
                                    " of each are wanted: a rank runs another version, or its memory is damaged");
    }
    return true;
  }
  const auto found = disagreements_.find(round_);
  if (found == disagreements_.end()) return false;
  const DownHead& head = found->second;
  fail(Code::invalidUsage, "ranks disagree in a collective call: " + ways_.nameOf(head.rank) + " brings " +
                               std::to_string(head.whole) + " bytes, " + ways_.nameOf(head.other) + " " +
                               std::to_string(head.otherWhole) + "; call in the same order on all ranks");
}

std::vector<int> Tree::late() const {
  std::lock_guard lock(mutex_);
  std::vector<int> ranks;
  const auto found = rounds_.find(round_);
  for (int rank = 0; rank < ranks_; ++rank) {
    // Only the root hears of all; the others know their children.
    const bool own =
        shape_.parent < 0 || std::find(shape_.children.begin(), shape_.children.end(), rank) != shape_.children.end();
    if (own && (found == rounds_.end() || !found->second.come[static_cast<std::size_t>(rank)])) ranks.push_back(rank);
  }
  return ranks;
}

}  // namespace fusco::comm
