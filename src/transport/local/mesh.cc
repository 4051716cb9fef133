#include "transport/local/mesh.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstring>

#include "base/status.h"
#include "transport/local/socket.h"

namespace fusco::transport {

namespace {

[[noreturn]] void failDescriptors(const std::string& name) {
  fail(Code::systemError,
       name +
           " has no file descriptors left; it needs about three for each rank of its machine and one for "
           "each window: raise `ulimit -n`");
}

void tellFailed(int rank, const std::uint8_t key[32], const MeshMember& waiting) {
  if (waiting.local || waiting.remote) return;
  try {
    MeshMessage message{.kind = MeshMessage::failed, .rank = rank};
    std::memcpy(message.key, key, sizeof(message.key));
    UniqueFd socket = connectAbstract(waiting.socketName, Deadline::afterMs(100));
    if (socket && sameUser(socket.get())) sendMessage(socket.get(), &message, sizeof(message));
  } catch (const std::exception&) {
    // It learns from its own time-out.
  }
}

}  // namespace

void Mesh::tellLower(int rank, const std::uint8_t key[32], const std::vector<MeshMember>& members) {
  for (int lower = 0; lower < rank; ++lower) tellFailed(rank, key, members[static_cast<std::size_t>(lower)]);
}

Mesh::Mesh(int rank, const std::uint8_t key[32], std::vector<MeshMember> members, UniqueFd listener,
           std::size_t controlBytes, Deadline deadline, Handler handler, const std::function<void()>& check)
    : rank_(rank), controlBytes_(controlBytes), peers_(members.size()), handler_(std::move(handler)), check_(check) {
  for (std::size_t i = 0; i < members.size(); ++i) {
    peers_[i].member = std::move(members[i]);
    if (peers_[i].member.local) {
      peers_[i].memory = peers_[i].member.local;
      peers_[i].pid = ::getpid();
    }
  }
  try {
    for (Peer& peer : peers_) {
      if (peer.member.local || peer.member.remote || peer.member.pid <= 0) continue;
      // A thread that is not there any more.
      if (peer.member.pid == ::getpid()) {
        fail(Code::remoteError, peer.member.name + " gave up at init; look at its log");
      }
      watch(peer, peer.member.pid);
    }
    connectLower(key, deadline);
    meet(key, std::move(listener), deadline);
  } catch (const std::exception&) {
    // Connected ranks see the closed sockets; the lower ones that were not reached yet are told. Descriptors may be
    // what is short.
    listener.reset();
    for (Peer& peer : peers_) peer.process.reset();
    for (int lower = 0; lower < rank_; ++lower) {
      if (!peers_[lower].socket) tellFailed(rank_, key, peers_[lower].member);
    }
    throw;
  }
}

std::string Mesh::missing() const {
  std::string names;
  for (const Peer& peer : peers_) {
    if (!peer.memory && !peer.member.remote) names += (names.empty() ? "" : ", ") + peer.member.name;
  }
  return names;
}

void Mesh::connectLower(const std::uint8_t key[32], Deadline deadline) {
  for (int lower = 0; lower < rank_; ++lower) {
    Peer& peer = peers_[lower];
    if (peer.member.local || peer.member.remote) continue;
    UniqueFd socket = connectAbstract(peer.member.socketName, deadline);
    if (!socket) {
      failGone(peer, " cannot be reached at init: " + std::string(std::strerror(errno)) +
                         "; it has died or given up, look at its log");
    }
    if (!sameUser(socket.get())) {
      fail(Code::systemError,
           "the socket of " + peer.member.name + " belongs to another user; run all ranks as one user");
    }
    MeshMessage hello{.kind = MeshMessage::hello, .rank = rank_};
    std::memcpy(hello.key, key, sizeof(hello.key));
    if (sendMessage(socket.get(), &hello, sizeof(hello), peers_[rank_].memory->descriptor()) != Io::done) {
      failGone(peer, " hung up at init; it has died or given up, look at its log");
    }
    peer.socket = std::move(socket);
    watch(peer, credentialsOf(peer.socket.get()).pid);
  }
}

// Welcomes the higher ranks and hears the lower ranks' welcomes. Strangers and the silent hold nobody up.
void Mesh::meet(const std::uint8_t key[32], UniqueFd listener, Deadline deadline) {
  constexpr std::size_t kMostCallers = 4096;
  constexpr std::size_t kManyCallers = 64;
  Lasting lasting;  // descriptors have been short
  std::deque<UniqueFd> callers;
  for (;;) {
    bool complete = true;
    std::vector<pollfd> polled{{listener.get(), POLLIN, 0}};
    std::vector<int> lower;
    for (int i = 0; i < ranks(); ++i) {
      Peer& peer = peers_[i];
      if (peer.memory || peer.member.remote) continue;
      complete = false;
      if (peer.socket) {
        polled.push_back({peer.socket.get(), POLLIN, 0});
        lower.push_back(i);
      }
    }
    if (complete) return;
    for (const UniqueFd& caller : callers) polled.push_back({caller.get(), POLLIN, 0});
    if (deadline.passed()) {
      fail(Code::remoteError, peers_[rank_].member.name + " waited in vain at init for " + missing() +
                                  "; look whether they are alive, or raise the init time-out");
    }
    ::poll(polled.data(), polled.size(), pollMs(deadline, 100));
    check_();

    for (std::size_t k = 0; k < lower.size(); ++k) {
      if ((polled[1 + k].revents) == 0) continue;
      Peer& peer = peers_[lower[k]];
      MeshMessage welcome;
      std::size_t bytes = 0;
      UniqueFd memory;
      const Io io = receiveMessage(peer.socket.get(), &welcome, sizeof(welcome), &bytes, &memory);
      if (io == Io::again) continue;
      if (io == Io::closed || bytes != sizeof(welcome) || welcome.kind != MeshMessage::welcome) {
        failGone(peer, " hung up at init; it has died or given up, look at its log");
      }
      // The kernel drops a passed descriptor when the process can hold no more.
      if (!memory) failDescriptors(peers_[rank_].member.name);
      adopt(peer, std::move(peer.socket), std::move(memory));
    }
    std::size_t k = 1 + lower.size();
    for (auto caller = callers.begin(); caller != callers.end(); ++k) {
      if (polled[k].revents == 0) {
        ++caller;
        continue;
      }
      MeshMessage message;
      std::size_t bytes = 0;
      UniqueFd memory;
      const Io io = receiveMessage(caller->get(), &message, sizeof(message), &bytes, &memory);
      if (io == Io::done && bytes == sizeof(message) && message.magic == MeshMessage::kMagic &&
          sameSecret(message.key, key, sizeof(message.key))) {
        welcomeCaller(&*caller, message, std::move(memory));
      }
      caller = callers.erase(caller);
    }
    for (int turn = 0; turn < kAcceptsAtOnce; ++turn) {
      bool exhausted = false;
      UniqueFd caller = acceptOne(listener.get(), &exhausted);
      if (caller) {
        if (sameUser(caller.get())) callers.push_back(std::move(caller));
        if (callers.size() <= kMostCallers) continue;
      } else if (!exhausted) {
        break;
      }
      // The longest silent make room. Without many of them it is not they who take it.
      const bool starving = exhausted && callers.size() < kManyCallers;
      if (lasting.note(starving) > kStarvingNs || callers.empty()) failDescriptors(peers_[rank_].member.name);
      if (starving) {
        ::poll(nullptr, 0, 10);
        break;
      }
      callers.pop_front();
    }
    const int dead = findDead();
    if (dead >= 0) {
      fail(Code::remoteError, peers_[dead].member.name + " died at init; look at its log");
    }
  }
}

// Who has given up has done so because of who died, if anybody has: that one is named. On another machine it is known
// by word only, which may come a little later than the end of this connection.
void Mesh::failGone(const Peer& peer, const std::string& what) {
  constexpr std::int64_t kWordMs = 300;
  const int dead = findDead();
  if (dead >= 0) fail(Code::remoteError, peers_[dead].member.name + " died at init; look at its log");
  for (const Deadline patience = Deadline::afterMs(kWordMs); !patience.passed(); ::poll(nullptr, 0, 2)) check_();
  fail(Code::remoteError, peer.member.name + what);
}

void Mesh::welcomeCaller(UniqueFd* socket, const MeshMessage& hello, UniqueFd memory) {
  if (hello.rank <= rank_ || hello.rank >= ranks()) return;
  Peer& peer = peers_[hello.rank];
  if (peer.memory || peer.member.remote) return;
  if (hello.kind == MeshMessage::failed) {
    failGone(peer, " failed at init; look at its log");
  }
  if (hello.kind != MeshMessage::hello) return;
  if (!memory) failDescriptors(peers_[rank_].member.name);
  MeshMessage welcome{.kind = MeshMessage::welcome, .rank = rank_};
  if (sendMessage(socket->get(), &welcome, sizeof(welcome), peers_[rank_].memory->descriptor()) != Io::done) {
    failGone(peer, " hung up at init; it has died or given up, look at its log");
  }
  adopt(peer, std::move(*socket), std::move(memory));
  watch(peer, credentialsOf(peer.socket.get()).pid);
}

void Mesh::adopt(Peer& peer, UniqueFd socket, UniqueFd memory) {
  peer.memory = std::make_shared<RankMemory>(memory.get(), peer.member.sameNode ? controlBytes_ : 0);
  peer.socket = std::move(socket);
}

void Mesh::watch(Peer& peer, pid_t pid) {
  if (pid <= 0 || (peer.process && peer.pid == pid)) return;
  peer.pid = pid;
#ifdef SYS_pidfd_open
  peer.process = UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (peer.process) return;
  if (errno == ESRCH) fail(Code::remoteError, peer.member.name + " died at init; look at its log");
  if (errno == EMFILE || errno == ENFILE) failDescriptors(peers_[rank_].member.name);
    // An old kernel: its socket tells of its end as well.
#endif
}

bool Mesh::ended(int rank) const {
  pollfd polled{peers_[rank].process.get(), POLLIN, 0};
  return ::poll(&polled, 1, 0) > 0;
}

void Mesh::send(int rank, const MeshMessage& message, int descriptor) {
  Peer& peer = peers_[rank];
  if (!peer.socket || peer.closed) return;
  if (flush(rank)) {
    const Io io = sendMessage(peer.socket.get(), &message, sizeof(message), descriptor);
    if (io == Io::done) {
      header(rank).mail.fetch_add(1, std::memory_order_seq_cst);
      return;
    }
    if (io == Io::closed) return;
  }
  UniqueFd copy;
  if (descriptor >= 0) {
    copy = UniqueFd(::fcntl(descriptor, F_DUPFD_CLOEXEC, 0));
    if (!copy) failErrno("cannot duplicate a descriptor for " + peer.member.name + " (raise `ulimit -n`)");
  }
  peer.queue.push_back({message, std::move(copy)});
  queued_.fetch_add(1, std::memory_order_release);
}

bool Mesh::flush(int rank) {
  if (rank < 0) {
    bool empty = true;
    for (int i = 0; i < ranks(); ++i) empty = flush(i) && empty;
    return empty;
  }
  Peer& peer = peers_[rank];
  while (!peer.queue.empty()) {
    const Queued& next = peer.queue.front();
    const Io io = peer.closed
                      ? Io::closed
                      : sendMessage(peer.socket.get(), &next.message, sizeof(next.message), next.descriptor.get());
    if (io == Io::again) return false;
    if (io == Io::closed) {
      queued_.fetch_sub(peer.queue.size(), std::memory_order_release);
      peer.queue.clear();
      break;
    }
    peer.queue.pop_front();
    queued_.fetch_sub(1, std::memory_order_release);
    header(rank).mail.fetch_add(1, std::memory_order_seq_cst);
  }
  return true;
}

bool Mesh::drain(int rank) {
  Peer& peer = peers_[rank];
  if (!peer.socket) return true;
  while (!peer.closed) {
    MeshMessage message;
    std::size_t bytes = 0;
    UniqueFd descriptor;
    const Io io = receiveMessage(peer.socket.get(), &message, sizeof(message), &bytes, &descriptor);
    if (io == Io::again) return true;
    if (io == Io::closed) {
      peer.closed = true;
    } else if (bytes == sizeof(message) && message.magic == MeshMessage::kMagic) {
      const bool carries = message.kind == MeshMessage::window || message.kind == MeshMessage::ring;
      if (carries && !descriptor) failDescriptors(peers_[rank_].member.name);
      handler_(rank, message, std::move(descriptor));
    }
  }
  return false;
}

void Mesh::wait(int milliseconds) {
  std::vector<pollfd> polled;
  for (const Peer& peer : peers_) {
    if (!peer.socket || peer.closed) continue;
    const bool queued = !peer.queue.empty();
    polled.push_back({peer.socket.get(), static_cast<short>(POLLIN | (queued ? POLLOUT : 0)), 0});
  }
  ::poll(polled.data(), polled.size(), milliseconds);
}

int Mesh::look() {
  std::vector<pollfd> polled;
  std::vector<int> owners;
  for (int i = 0; i < ranks(); ++i) {
    if (!peers_[i].socket || peers_[i].closed) continue;
    polled.push_back({peers_[i].socket.get(), POLLIN, 0});
    owners.push_back(i);
  }
  if (!polled.empty() && ::poll(polled.data(), polled.size(), 0) > 0) {
    for (std::size_t k = 0; k < polled.size(); ++k) {
      if (polled[k].revents != 0) drain(owners[k]);
    }
  }
  return findDead();
}

int Mesh::findDead() {
  std::vector<pollfd> polled;
  std::vector<int> owners;
  for (int i = 0; i < ranks(); ++i) {
    if (!peers_[i].process) continue;
    polled.push_back({peers_[i].process.get(), POLLIN, 0});
    owners.push_back(i);
  }
  if (!polled.empty() && ::poll(polled.data(), polled.size(), 0) > 0) {
    for (std::size_t k = 0; k < polled.size(); ++k) {
      if (polled[k].revents != 0 && !saidFarewell(owners[k])) return owners[k];
    }
  }
  for (int i = 0; i < ranks(); ++i) {
    if (peers_[i].closed && !saidFarewell(i)) return i;
  }
  return -1;
}

// Asked after the end was seen: a farewell is written before the process ends or the socket closes.
bool Mesh::saidFarewell(int rank) const {
  const Peer& peer = peers_[rank];
  return peer.memory &&
         peer.memory->header().presence.load(std::memory_order_acquire) != static_cast<std::uint32_t>(Presence::here);
}

}  // namespace fusco::transport
