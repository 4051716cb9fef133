#include "comm/local_fabric.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>

#include "base/clock.h"
#include "base/environment.h"
#include "base/log.h"
#include "base/point.h"
#include "base/status.h"
#include "comm/bootstrap.h"
#include "transport/local/process_vm.h"
#include "transport/local/socket.h"
#include "transport/local/window.h"
#include "transport/tcp/connect.h"

namespace fusco::comm {

using transport::MeshMessage;
using transport::Presence;
using transport::RankHeader;

namespace {

constexpr std::int64_t kLookEveryNs = 50'000'000;
// What a rank says at the end of init: that it reaches its node's private memory, and which RDMA ports it has.
constexpr std::uint8_t kProcessVmVote = 1, kInfinibandVote = 2, kRoceVote = 4;
// A rank that has destroyed its communicator may have done its part of the operation that we still wait in: its leaving
// is an error only when the wait goes on and nobody rings.
constexpr std::int64_t kFarewellGraceNs = 1'000'000'000;
// How often waiting ranks look whether peers of their machine are stopped, and after what time they say so.
constexpr std::int64_t kStoppedEveryNs = 1'000'000'000;
constexpr std::int64_t kStoppedWarningNs = 3'000'000'000;
// A step of a peer takes milliseconds; one that is stopped in the middle of it is not waited for forever.
constexpr std::int64_t kMovesMs = 1000;
// For the news of a rank's end to leave this one.
constexpr std::int64_t kFarewellMs = 500;
// A link that breaks is the first that is seen of a death, or of a rank that has left: who died, and that it left, is
// told by the tree a little later.
constexpr std::int64_t kBrokenLinkGraceNs = 500'000'000;
// One that was closed in order is that of a rank that has left or, if it was killed between two slices, of a dead one:
// the tree tells which, as soon as machines that are busy get to it.
constexpr std::int64_t kClosedLinkGraceNs = 10'000'000'000;
// Of a gather that goes through the tree: what all ranks together bring in a round, and the least of one.
constexpr std::size_t kGatherRoundBytes = std::size_t{1} << 20;
constexpr std::size_t kGatherLeastBytes = 64;

// The fabrics of this process, for windows that are freed and for exit. Never destroyed.
struct Fabrics {
  std::mutex mutex;
  std::set<LocalFabric*> all;
};

Fabrics& fabrics() {
  static Fabrics* const instance = [] {
    static Fabrics* made = new Fabrics;
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] {
                     made->all.clear();
                     made->mutex.unlock();
                   });
    std::atexit([] {
      std::lock_guard lock(made->mutex);
      for (LocalFabric* fabric : made->all) fabric->exiting();
    });
    return made;
  }();
  return *instance;
}

void copyText(char* to, std::size_t room, const std::string& text) {
  const std::size_t length = std::min(text.size(), room - 1);
  std::memcpy(to, text.data(), length);
  to[length] = 0;
}

std::uint64_t randomWord() {
  std::uint64_t word;
  transport::randomBytes(&word, sizeof(word));
  return word;
}

bool isStopped(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return false;
  // The name before it may hold anything.
  const std::size_t end = line.rfind(')');
  return end != std::string::npos && end + 2 < line.size() && (line[end + 2] == 'T' || line[end + 2] == 't');
}

int usableCores() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
}

}  // namespace

LocalFabric::LocalFabric(const FabricConfig& config, const UniqueId& id)
    : config_(config), forks_(forkCount()), probeWord_(randomWord()) {
  try {
    prepare(id);
    meetAll(id);
  } catch (const Error& error) {
    std::string text = error.what();
    if (text.find("rank ") == std::string::npos) text = record_.describe() + ": " + text;
    const std::string phase = text.find("init") == std::string::npos ? " (during init)" : "";
    tellOthers(text + phase);
    release();
    throw Error(error.code(), text + phase);
  } catch (const std::exception& error) {
    tellOthers(error.what());
    release();
    throw;
  }
  Fabrics& known = fabrics();
  std::lock_guard lock(known.mutex);
  known.all.insert(this);
  entered_ = true;
}

LocalFabric::~LocalFabric() { release(); }

// Set-up has failed here. Ranks of other machines may be waiting for this one, and should hear why and not only that it
// has gone.
void LocalFabric::tellOthers(const std::string& reason) {
  if (!network_) return;
  network_->tree().tell({News::aborted, config_.rank, reason});
  for (const Deadline deadline = Deadline::afterMs(kFarewellMs); !deadline.passed(); ::usleep(2000)) {
    if (network_->tree().missing().empty()) break;
  }
  network_->tree().flush(kFarewellMs);
}

void LocalFabric::release() {
  if (entered_) {
    Fabrics& known = fabrics();
    std::lock_guard lock(known.mutex);
    known.all.erase(this);
  }
  // A child that was forked off gives back its copies only; the rank lives on in the parent.
  if (forks_ == forkCount()) {
    passPoint("destroy", 0);
    // Who has not come through init has told why, and has not been there to leave.
    if (entered_) say(Presence::left);
    passPoint("destroy", 1);
    network_.reset();
    passPoint("destroy", 2);
  } else {
    // Its thread and locks are the parent's.
    static_cast<void>(network_.release());
  }
  mesh_.reset();
}

void LocalFabric::exiting() {
  if (forks_ == forkCount()) say(Presence::exited);
}

void LocalFabric::say(Presence presence) {
  if (!memory_ || headers_.empty()) return;
  // What was said first stays: a destructor may run after exit has begun.
  auto here = static_cast<std::uint32_t>(Presence::here);
  if (!memory_->header().presence.compare_exchange_strong(here, static_cast<std::uint32_t>(presence))) return;
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peer != config_.rank && headers_[peer] != nullptr) headers_[peer]->raiseAlarm();
  }
  if (!network_) return;
  // Who has heard of an abort by shared memory may leave before the tree brings it, and so would cut it off from
  // others.
  RankHeader& own = memory_->header();
  if (own.aborted.load(std::memory_order_acquire) == 2) {
    network_->tree().tell({News::aborted, config_.rank, {own.reason, strnlen(own.reason, RankHeader::kReasonBytes)}});
  }
  network_->tree().tell({presence == Presence::left ? News::left : News::exited, config_.rank, {}});
  network_->tree().flush(kFarewellMs);
}

void LocalFabric::refuseChild(const char* what) const {
  if (forks_ == forkCount()) return;
  fail(Code::invalidUsage, std::string(what) + " was called in a process forked after init; rank " +
                               std::to_string(config_.rank) +
                               " belongs to the parent: make a communicator after the fork");
}

// ---- set-up

void LocalFabric::prepare(const UniqueId& id) {
  Record& record = record_;
  record.rank = config_.rank;
  record.ranks = config_.ranks;
  record.nodeId = config_.nodeId;
  record.lanesPerNode = config_.lanesPerNode;
  record.pid = ::getpid();
  processIdentity(record.process);
  record.member = randomWord();
  record.domain = domainIdentity(config_.hostId);
  record.boot = bootIdentity();
  record.pidNamespace = pidNamespace();
  copyText(record.settings, sizeof(record.settings), config_.settings);
  record.controlBytes = config_.controlBytes;
  record.slotBytes = config_.slotBytes;
  record.slots = config_.slots;
  record.net = static_cast<std::int32_t>(config_.net);
  record.initTimeoutMs = config_.initTimeoutMs;
  record.probeAddress = config_.allowProcessVm ? reinterpret_cast<std::uint64_t>(&probeWord_) : 0;
  record.probeValue = probeWord_;
  copyText(record.hostName, sizeof(record.hostName), shortHostName());
  try {
    const std::string name = transport::randomName("fusco-rank-");
    copyText(record.socketName, sizeof(record.socketName), name);
    listener_ = transport::listenAbstract(name, 4096);
    listen();
    memory_ = std::make_shared<transport::RankMemory>(config_.controlBytes);
    inbox_ = std::make_shared<Inbox>();
    group_ = LocalGroup::of(id.key);
    group_->add(record.member, {memory_, inbox_});
  } catch (const Error& error) {
    tellMeetingPlace(id, error);
    throw;
  }
}

// The other ranks are told at once and need not wait for their time-outs.
void LocalFabric::tellMeetingPlace(const UniqueId& id, const Error& error) {
  // Descriptors may be what is short.
  listener_.reset();
  networkListeners_.clear();
  copyText(record_.failure, sizeof(record_.failure), error.what());
  record_.failureCode = static_cast<int>(error.code());
  try {
    meet(id, record_, Deadline::afterMs(1000));
  } catch (const Error&) {
    // Its answer is our own error.
  }
}

// One listener for each interface that the settings name, else one; without a network the ranks of a machine do well.
void LocalFabric::listen() {
  if (config_.net == Net::sharedMemory) return;
  try {
    std::vector<transport::Interface> interfaces = transport::usableInterfaces();
    if (!environment().isSet(Setting::socketInterfaces)) interfaces.resize(1);
    for (const transport::Interface& one : interfaces) {
      if (record_.addressCount == Record::kMostAddresses) break;
      transport::Address& address = record_.addresses[record_.addressCount];
      address = one.address;
      networkListeners_.push_back(transport::listenTcp(&address, 1024));
      ++record_.addressCount;
    }
  } catch (const Error& error) {
    FUSCO_INFO(kLogNet, "rank {} listens nowhere: {}", config_.rank, error.what());
    networkListeners_.clear();
    record_.addressCount = 0;
  }
}

void LocalFabric::meetAll(const UniqueId& id) {
  const Deadline deadline = Deadline::afterMs(config_.initTimeoutMs);
  if ((id.flags & UniqueId::kByAddress) != 0 && config_.rank == 0) openAgreedPlace(id);
  // The meeting place knows who is missing: its answer at the time-out should come before our own.
  const std::int64_t grace = config_.initTimeoutMs / 20 + 50;
  std::vector<Record> records;
  try {
    records =
        meet(id, record_, config_.initTimeoutMs > 0 ? Deadline::afterMs(config_.initTimeoutMs + grace) : deadline);
  } catch (const Error& error) {
    if (error.code() == Code::systemError) tellMeetingPlace(id, error);
    throw;
  }
  passPoint("connect", 0);
  arrange(records);
  // First of all, so that what happens from here on can be told to all.
  startNetwork(id, records);
  connectMesh(id, records, deadline);
  passPoint("connect", 1);
  joinNetwork(deadline);
  passPoint("connect", 2);
  vote(records);
  listener_.reset();
  leaveMeetingPlace(id);
}

void LocalFabric::arrange(const std::vector<Record>& records) {
  std::map<std::pair<std::uint64_t, int>, int> labels;
  std::vector<int> nodeOf;
  int onMachine = 0;
  for (const Record& record : records) {
    names_.push_back(record.describe());
    nodeOf.push_back(
        labels.emplace(std::pair(record.domain, record.nodeId), static_cast<int>(labels.size())).first->second);
    onMachine += record.boot == record_.boot ? 1 : 0;
  }
  topology_.emplace(nodeOf, config_.lanesPerNode);
  remotePresence_ = std::vector<std::atomic<std::uint32_t>>(records.size());
  headers_.assign(records.size(), nullptr);
  headers_[static_cast<std::size_t>(config_.rank)] = &memory_->header();
  // With a core for each, waking a sleeper (a halted core, on a virtual machine) costs far more than to look on for a
  // while; without, one look after the others have run is enough.
  spinMicroseconds_ = onMachine <= usableCores() ? 50 : 0;
}

void LocalFabric::connectMesh(const UniqueId& id, const std::vector<Record>& records, Deadline deadline) {
  std::vector<transport::MeshMember> members;
  oneProcess_ = true;
  for (const Record& record : records) {
    transport::MeshMember member{record.describe(),
                                 record.socketName,
                                 nullptr,
                                 topology_->nodeOf(record.rank) == topology_->nodeOf(config_.rank),
                                 record.domain != record_.domain,
                                 record.pidNamespace == record_.pidNamespace ? static_cast<pid_t>(record.pid) : 0};
    const bool sameProcess =
        !member.remote && std::memcmp(record.process, record_.process, sizeof(record.process)) == 0;
    LocalMember local = sameProcess ? group_->find(record.member) : LocalMember{};
    if (sameProcess && !local.memory) {
      fail(Code::remoteError, record.describe() + " gave up at init; look at its log");
    }
    if (member.sameNode && !sameProcess) oneProcess_ = false;
    member.local = local.memory;
    inboxes_.push_back(local.inbox);
    members.push_back(std::move(member));
  }
  imports_.resize(records.size());
  links_.resize(records.size());
  for (auto& links : links_) links.resize(static_cast<std::size_t>(kChannels * topology_->paths()));
  mailSeen_.assign(records.size(),
                   std::vector<std::uint32_t>(static_cast<std::size_t>(kChannels * topology_->paths())));
  mesh_ = std::make_unique<transport::Mesh>(
      config_.rank, id.key, std::move(members), std::move(listener_), config_.controlBytes, deadline,
      [this](int rank, const MeshMessage& message, UniqueFd descriptor) {
        onMessage(rank, message, std::move(descriptor));
      },
      [this] { checkDuringInit(); });
  for (int rank = 0; rank < config_.ranks; ++rank) {
    // This rank's own is in use already, by the network's thread.
    if (rank != config_.rank && !mesh_->remote(rank)) headers_[static_cast<std::size_t>(rank)] = &mesh_->header(rank);
  }
}

// Whether links to a rank (of another node) go by TCP.
bool LocalFabric::byNetwork(int rank) const {
  return mesh_->remote(rank) || config_.net == Net::tcp || config_.net == Net::verbs;
}

void LocalFabric::checkDuringInit() {
  if (headers_[config_.rank]->alarm.load(std::memory_order_acquire) != 0) tellOfEnds();
}

void LocalFabric::startNetwork(const UniqueId& id, const std::vector<Record>& records) {
  bool needed = (config_.net == Net::tcp || config_.net == Net::verbs) && topology_->nodes() > 1;
  for (const Record& record : records) {
    if (record.domain == records.front().domain) continue;
    needed = true;
    if (config_.net != Net::sharedMemory) continue;
    fail(Code::invalidUsage, "FUSCO_NET=shm, but " + records.front().describe() + " and " + record.describe() +
                                 " share no memory (other machines, network namespaces or FUSCO_HOSTID); use "
                                 "FUSCO_NET=auto");
  }
  std::vector<UniqueFd> listeners = std::move(networkListeners_);
  networkListeners_.clear();
  if (!needed) return;
  network_ = std::make_unique<Network>(
      records, config_.rank, *topology_, id.key, std::move(listeners),
      Network::LinkShape{config_.slotBytes, config_.slots, kChannels},
      Network::Ways{[this](const News& news) { hear(news); }, [this] { headers_[config_.rank]->ring(); }});
}

void LocalFabric::joinNetwork(Deadline deadline) {
  if (!network_) return;
  network_->join(deadline, [this] { check(); });
  if (config_.net != Net::tcp) openNics();
}

void LocalFabric::openNics() {
  try {
    std::unique_ptr<transport::VerbsNics> nics = transport::VerbsNics::open();
    try {
      nics->tryMemory(4 * config_.slotBytes * static_cast<std::size_t>(config_.slots));
    } catch (const Error& error) {
      if (config_.net == Net::automatic) FUSCO_WARN("RDMA is left unused, TCP is slower: {}", error.what());
      throw;
    }
    nicVote_ = nics->infiniband() ? kInfinibandVote : kRoceVote;
    network_->offer(std::move(nics));
  } catch (const Error& error) {
    nicFailure_ = error.what();
    FUSCO_INFO(kLogNet, "{} uses no RDMA: {}", names_[config_.rank], nicFailure_);
  }
}

// After this all ranks know who reaches whom by what.
void LocalFabric::chooseMedia(const std::vector<std::uint8_t>& votes) {
  if (!network_ || config_.net == Net::tcp) return;
  std::vector<bool> peers;
  for (const std::uint8_t one : votes) peers.push_back((one & nicVote_ & (kInfinibandVote | kRoceVote)) != 0);
  for (int rank = 0; rank < config_.ranks && config_.net == Net::verbs; ++rank) {
    if (topology_->nodeOf(rank) == topology_->nodeOf(config_.rank) || peers[static_cast<std::size_t>(rank)]) continue;
    if (nicVote_ == 0)
      fail(Code::systemError, "FUSCO_NET=verbs, but " + names_[config_.rank] + " has none: " + nicFailure_);
    const bool other = (votes[static_cast<std::size_t>(rank)] & (kInfinibandVote | kRoceVote)) != 0;
    fail(Code::remoteError, "FUSCO_NET=verbs, but " + names_[rank] +
                                (other ? " has another kind of port (InfiniBand or RoCE) than " + names_[config_.rank]
                                       : std::string(" has no RDMA port that can be used; its error or log says why")));
  }
  network_->useQueuePairs(std::move(peers));
}

void LocalFabric::vote(const std::vector<Record>& records) {
  std::uint8_t works = config_.allowProcessVm ? kProcessVmVote : 0;
  for (const Record& record : records) {
    if (!mesh_->sameNode(record.rank) || mesh_->sameProcess(record.rank) || !works) continue;
    const bool reached =
        record.probeAddress != 0 && transport::probeVm(mesh_->pid(record.rank), record.probeAddress, record.probeValue);
    if (!reached) works = 0;
  }
  works |= nicVote_;
  std::vector<std::uint8_t> votes(records.size());
  // Also the end of init: nobody goes on before all are connected.
  allGather(&works, 1, votes.data(), config_.initTimeoutMs);
  processVm_ = true;
  for (int rank : topology_->ranksOf(topology_->nodeOf(config_.rank)))
    processVm_ = processVm_ && (votes[rank] & kProcessVmVote) != 0;
  chooseMedia(votes);
  FUSCO_INFO(kLogInit, "{}: {} ranks on {} nodes; {}; process_vm {}; other nodes by {}", names_[config_.rank],
             config_.ranks, topology_->nodes(),
             oneProcess_ ? "own node in one process" : "own node in several processes", processVm_ ? "on" : "off",
             !network_       ? "shared memory"
             : nicVote_ == 0 ? "TCP where they share no memory"
                             : "RDMA or TCP where they share no memory");
}

// ---- small things

void LocalFabric::sleep(std::uint32_t seen, std::int64_t microseconds) {
  if (network_) {
    // While this rank is awake it reads and writes its links itself; from here on the network's thread does.
    if (network_->reactor().poke()) return;
    network_->reactor().attend();
  }
  headers_[config_.rank]->sleep(seen, microseconds, spinMicroseconds_);
}

std::string LocalFabric::describeRank(int rank) const {
  if (rank < 0 || rank >= config_.ranks) return "rank " + std::to_string(rank) + " (no such rank)";
  return names_[rank];
}

std::byte* LocalFabric::control(int rank) {
  if (!mesh_->sameNode(rank)) {
    fail(Code::internalError, "control memory of " + names_[rank] + " on another node was asked for");
  }
  return mesh_->memory(rank).control();
}

void LocalFabric::vmWrite(int rank, std::span<const transport::Segment> local,
                          std::span<const transport::Segment> remote) {
  moveVm(rank, true, local, remote);
}

void LocalFabric::vmRead(int rank, std::span<const transport::Segment> local,
                         std::span<const transport::Segment> remote) {
  moveVm(rank, false, local, remote);
}

void LocalFabric::moveVm(int rank, bool write, std::span<const transport::Segment> local,
                         std::span<const transport::Segment> remote) {
  const auto direction = write ? transport::VmDirection::write : transport::VmDirection::read;
  if (mesh_->sameProcess(rank)) return transport::moveLocal(direction, local, remote);
  transport::moveVm(direction, mesh_->pid(rank), names_[rank], local, remote);
}

std::size_t LocalFabric::memoryBytes() const {
  std::lock_guard lock(mutex_);
  std::size_t bytes = memory_->bytes() + (network_ ? network_->memoryBytes() : 0);
  for (const auto& channels : links_) {
    for (const auto& link : channels) bytes += link ? link->bytesMade() : 0;
  }
  return bytes;
}

// ---- liveness

void LocalFabric::check() {
  refuseChild("an operation");
  if (headers_[config_.rank]->alarm.load(std::memory_order_acquire) != 0) alarmed();
  const std::int64_t now = nowNs();
  std::int64_t last = lastLookNs_.load(std::memory_order_relaxed);
  if (!failed_.load(std::memory_order_acquire)) {
    if (now - last < kLookEveryNs || !lastLookNs_.compare_exchange_strong(last, now, std::memory_order_relaxed)) return;
    // Who holds the lock looks by itself while it waits.
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) look(lock);
    return;
  }
  std::unique_lock lock(mutex_);
  look(lock);
}

// Whoever polls this from beside an operation must not disturb it: that one may hold the lock for as long as it likes.
void LocalFabric::checkPeers() {
  if (forks_ != forkCount()) return;
  if (headers_[config_.rank]->alarm.load(std::memory_order_acquire) != 0) tellOfEnds();
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock) look(lock);
}

bool LocalFabric::settled() {
  if (!mesh_->queued()) return true;
  std::lock_guard lock(mutex_);
  return mesh_->flush();
}

void LocalFabric::look(std::unique_lock<std::mutex>& lock) {
  if (failure_.empty()) {
    mesh_->flush();
    lookForStopped();
    const int dead = mesh_->look();
    if (dead >= 0) {
      failure_ = names_[dead] + " died: its process has ended without destroying the communicator; look at its log";
      failed_.store(true, std::memory_order_release);
    } else if (network_) {
      lookAtLinks();
    }
  }
  if (failure_.empty()) return;
  const std::string text = failure_;
  lock.unlock();
  fail(Code::remoteError, text);
}

// Under the lock. A stopped process is alive and may go on: whoever waits is told, and waits on.
void LocalFabric::lookForStopped() {
  const std::int64_t now = nowNs();
  if (now - lookedForStoppedNs_ < kStoppedEveryNs) return;
  lookedForStoppedNs_ = now;
  stopped_.resize(static_cast<std::size_t>(config_.ranks));
  for (int rank = 0; rank < config_.ranks; ++rank) {
    if (mesh_->remote(rank) || mesh_->sameProcess(rank) || mesh_->pid(rank) <= 0) continue;
    Stopped& known = stopped_[static_cast<std::size_t>(rank)];
    if (!isStopped(mesh_->pid(rank))) {
      if (known.told) FUSCO_WARN("{} goes on", names_[rank]);
      known = {};
      continue;
    }
    if (known.sinceNs == 0) known.sinceNs = now;
    if (known.told || now - known.sinceNs < kStoppedWarningNs) continue;
    known.told = true;
    FUSCO_WARN(
        "{} is stopped (SIGSTOP, or a debugger holds it) since {} s; waiting goes on, `kill -CONT {}` continues it",
        names_[rank], (now - known.sinceNs) / 1'000'000'000, mesh_->pid(rank));
  }
}

// Under the lock.
void LocalFabric::lookAtLinks() {
  std::string how;
  bool orderly = false;
  const int peer =
      network_->brokenLink([this](int rank) { return presenceOf(rank) != Presence::here; }, &how, &orderly);
  if (peer < 0) {
    brokenLinkNs_.store(0);
    return;
  }
  const std::int64_t grace = orderly ? kClosedLinkGraceNs : kBrokenLinkGraceNs;
  const std::int64_t now = nowNs();
  std::int64_t none = 0;
  if (brokenLinkNs_.compare_exchange_strong(none, now) || now - brokenLinkNs_.load() < grace) return;
  // Other ranks will read it, too.
  const std::string_view self = "this rank";
  for (std::size_t at = 0; (at = how.find(self, at)) != std::string::npos; at += names_[config_.rank].size()) {
    how.replace(at, self.size(), names_[config_.rank]);
  }
  failure_ = names_[peer] + " " + how + "; look at its log and at the network between";
  failed_.store(true, std::memory_order_release);
}

// From the network's thread, which must not wait for locks that are held for long.
void LocalFabric::hear(const News& news) {
  RankHeader& own = *headers_[config_.rank];
  switch (news.kind) {
    case News::aborted:
      return own.abort(news.text);
    case News::left:
    case News::exited:
      remotePresence_[news.rank].store(
          static_cast<std::uint32_t>(news.kind == News::left ? Presence::left : Presence::exited));
      return own.raiseAlarm();
    case News::died: {
      std::lock_guard lock(newsMutex_);
      if (!newsOfDeath_.empty()) break;
      newsOfDeath_ = names_[news.rank] + " " + news.text;
      if (news.rank == config_.rank) newsOfDeath_ = "this rank is taken for dead, another one says: " + newsOfDeath_;
    }
      deathTold_.store(true, std::memory_order_release);
      return own.raiseAlarm();
  }
}

Presence LocalFabric::presenceOf(int rank) const {
  if (headers_[rank] != nullptr) {
    return static_cast<Presence>(headers_[rank]->presence.load(std::memory_order_acquire));
  }
  return static_cast<Presence>(remotePresence_[rank].load(std::memory_order_acquire));
}

// What ends operations whether or not anything is waited for.
void LocalFabric::tellOfEnds() {
  RankHeader& own = *headers_[config_.rank];
  if (own.aborted.load(std::memory_order_acquire) == 2) {
    fail(Code::remoteError, std::string(own.reason, strnlen(own.reason, RankHeader::kReasonBytes)));
  }
  if (deathTold_.load(std::memory_order_acquire)) {
    std::lock_guard lock(newsMutex_);
    fail(Code::remoteError, newsOfDeath_);
  }
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (presenceOf(peer) == Presence::exited) {
      fail(Code::remoteError, names_[peer] +
                                  " left: its process exited without destroying the communicator; look at "
                                  "its log, or destroy communicators before the end");
    }
  }
}

void LocalFabric::alarmed() {
  tellOfEnds();
  RankHeader& own = *headers_[config_.rank];
  int left = -1;
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (presenceOf(peer) == Presence::left && peer != config_.rank) left = peer;
  }
  if (left < 0) return;
  int first = -1;
  if (!firstLeft_.compare_exchange_strong(first, left)) left = first;
  // As long as somebody rings (for another reason than an alarm), the operation still goes on.
  const std::uint32_t rung = own.bell.load(std::memory_order_acquire) - own.alarm.load(std::memory_order_acquire);
  const std::int64_t now = nowNs();
  const std::int64_t since = farewellSeenNs_.load(std::memory_order_acquire);
  if (since == 0 || farewellBell_.exchange(rung, std::memory_order_acq_rel) != rung) {
    farewellBell_.store(rung, std::memory_order_release);
    farewellSeenNs_.store(now, std::memory_order_release);
  } else if (now - since > kFarewellGraceNs) {
    fail(Code::remoteError, names_[left] + " left: it destroyed its communicator while " + names_[config_.rank] +
                                " was still waiting in an operation; destroy only when all ranks have completed");
  }
}

void LocalFabric::abort(const std::string& reason) {
  refuseChild("abort");
  headers_[config_.rank]->abort(reason);
  for (RankHeader* header : headers_) {
    if (header != nullptr) header->abort(reason);
  }
  if (network_) network_->tree().tell({News::aborted, config_.rank, reason});
}

// Who moves says so, then looks whether anybody has aborted; who aborts says so, then looks who moves. Between the two
// lies a fence on both sides, so at least one of them sees the other.
void LocalFabric::moveBegins() {
  RankHeader& own = *headers_[config_.rank];
  own.moving.store(1, std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (own.aborted.load(std::memory_order_seq_cst) == 0) return;
  own.moving.store(0, std::memory_order_release);
  // The reason may be under way.
  for (int turn = 0; turn < 1000 && own.aborted.load(std::memory_order_acquire) != 2; ++turn) ::usleep(10);
  tellOfEnds();
  fail(Code::remoteError, "a rank of this machine has aborted; look at the others' logs");
}

void LocalFabric::awaitMoves() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const Deadline patience = Deadline::afterMs(kMovesMs);
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peer == config_.rank || headers_[peer] == nullptr) continue;
    while (headers_[peer]->moving.load(std::memory_order_seq_cst) != 0 && !patience.passed()) {
      if (!mesh_->sameProcess(peer) && mesh_->ended(peer)) break;
      ::usleep(50);
    }
  }
}

// ---- gather

// Chunks go through the ranks' mailboxes, two rounds in turn: a mailbox is written again only after everyone has begun
// the round between, and so has read it.
void LocalFabric::allGather(const void* mine, std::size_t bytes, void* all, std::int64_t timeoutMs) {
  refuseChild("a collective call");
  const Deadline deadline = Deadline::afterMs(timeoutMs);
  if (network_) {
    return gatherByNetwork(static_cast<const std::byte*>(mine), bytes, static_cast<std::byte*>(all), deadline,
                           timeoutMs);
  }
  std::size_t at = 0;
  do {
    const std::size_t step = std::min(bytes - at, RankHeader::kMailboxBytes);
    gatherRound(static_cast<const std::byte*>(mine) + at, step, bytes, static_cast<std::byte*>(all) + at, bytes,
                deadline, timeoutMs);
    at += step;
  } while (at < bytes);
}

void LocalFabric::gatherByNetwork(const std::byte* mine, std::size_t bytes, std::byte* all, Deadline deadline,
                                  std::int64_t timeoutMs) {
  Tree& tree = network_->tree();
  const std::size_t most = std::max(kGatherRoundBytes / static_cast<std::size_t>(config_.ranks), kGatherLeastBytes);
  std::size_t at = 0;
  do {
    const std::size_t step = std::min(bytes - at, most);
    tree.contribute({reinterpret_cast<const char*>(mine) + at, step}, bytes);
    std::string chunks;
    for (;;) {
      const std::uint32_t seen = bell();
      if (tree.gathered(&chunks)) break;
      check();
      if (deadline.passed()) {
        std::string names;
        for (const int one : tree.late()) names += (names.empty() ? "" : ", ") + names_[one];
        fail(Code::remoteError,
             names_[config_.rank] + " waited " + std::to_string(timeoutMs) + " ms in a collective call for " +
                 (names.empty() ? "ranks that it is not connected to" : names) + "; look whether they are alive");
      }
      sleep(seen, 50000);
    }
    for (std::size_t rank = 0; step > 0 && rank < static_cast<std::size_t>(config_.ranks); ++rank) {
      std::memcpy(all + rank * bytes + at, chunks.data() + rank * step, step);
    }
    at += step;
  } while (at < bytes);
}

void LocalFabric::gatherRound(const std::byte* mine, std::size_t bytes, std::size_t whole, std::byte* all,
                              std::size_t stride, Deadline deadline, std::int64_t timeoutMs) {
  const std::uint64_t round = ++gatherRound_;
  const std::size_t box = round % 2;
  RankHeader& own = *headers_[config_.rank];
  if (bytes > 0) std::memcpy(own.mailbox[box], mine, bytes);
  own.gatherBytes[box] = whole;
  own.gathered.store(round, std::memory_order_release);
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peer != config_.rank) headers_[peer]->ring();
  }
  for (int peer = 0; peer < config_.ranks; ++peer) {
    RankHeader& other = *headers_[peer];
    for (;;) {
      const std::uint32_t seen = bell();
      if (other.gathered.load(std::memory_order_acquire) >= round) break;
      check();
      if (deadline.passed()) {
        std::string late;
        for (int one = 0; one < config_.ranks; ++one) {
          if (headers_[one]->gathered.load(std::memory_order_acquire) < round)
            late += (late.empty() ? "" : ", ") + names_[one];
        }
        if (late.empty()) continue;
        fail(Code::remoteError, names_[config_.rank] + " waited " + std::to_string(timeoutMs) +
                                    " ms in a collective call for " + late + "; look whether they are alive");
      }
      sleep(seen, 50000);
    }
    if (other.gatherBytes[box] != whole) {
      fail(Code::invalidUsage, "ranks disagree in a collective call: " + names_[config_.rank] + " brings " +
                                   std::to_string(whole) + " bytes, " + names_[peer] + " " +
                                   std::to_string(other.gatherBytes[box]) + "; call in the same order on all ranks");
    }
    if (bytes > 0) std::memcpy(all + static_cast<std::size_t>(peer) * stride, other.mailbox[box], bytes);
  }
}

// ---- the interface's static part

std::unique_ptr<Fabric> Fabric::connect(const FabricConfig& config, const char id[128]) {
  if (config.ranks <= 0 || config.rank < 0 || config.rank >= config.ranks) {
    fail(Code::invalidArgument, "rank " + std::to_string(config.rank) + " of " + std::to_string(config.ranks) +
                                    ": ranks count from 0 to the number of ranks minus 1");
  }
  if (config.lanesPerNode < 1 || config.slots < 1 || config.slotBytes < sizeof(transport::SliceHeader) ||
      config.slotBytes % 64 != 0 || config.controlBytes > (std::size_t{1} << 40)) {
    fail(Code::invalidArgument, "rank " + std::to_string(config.rank) +
                                    ": lanes and slots must be at least 1, slots a "
                                    "multiple of 64 bytes and control memory at most 1 TiB");
  }
  UniqueId known;
  std::memcpy(&known, id, sizeof(known));
  if (known.magic != UniqueId::kMagic || std::memchr(known.socketName, 0, sizeof(known.socketName)) == nullptr) {
    fail(Code::invalidArgument, "rank " + std::to_string(config.rank) +
                                    ": this is no unique id of FUSCO; make one with "
                                    "fuscoGetUniqueId on one rank and give it to all");
  }
  if (known.version != UniqueId::kVersion) {
    fail(Code::invalidUsage, "rank " + std::to_string(config.rank) + ": the unique id has version " +
                                 std::to_string(known.version) + ", this library has " +
                                 std::to_string(UniqueId::kVersion) + "; use one version of the library on all ranks");
  }
  return std::make_unique<LocalFabric>(config, known);
}

void* windowAllocate(std::size_t bytes) { return transport::allocateWindow(bytes); }

bool windowFree(void* pointer) {
  const std::shared_ptr<transport::Window> window = transport::removeWindow(pointer);
  if (!window) return false;
  Fabrics& known = fabrics();
  std::lock_guard lock(known.mutex);
  bool exported = false;
  for (LocalFabric* fabric : known.all) exported = fabric->forgetWindow(window->id) || exported;
  // Peers unmap it when they next look at their sockets; the memory itself need not wait for them.
  if (exported) window->memory.discard();
  return true;
}

bool windowContains(const void* address, std::size_t bytes) { return transport::findWindow(address, bytes) != nullptr; }

}  // namespace fusco::comm
