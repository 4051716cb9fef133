// How a fabric comes to be: what a rank says of itself, whom it meets, and how it is connected to each.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/environment.h"
#include "base/log.h"
#include "base/point.h"
#include "base/status.h"
#include "comm/bootstrap.h"
#include "comm/islands.h"
#include "comm/local_fabric.h"
#include "transport/local/process_vm.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm {

using transport::MeshMessage;

namespace {

// What a rank says at the end of init: that it reaches its node's private memory, and which RDMA ports it has.
constexpr std::uint8_t kProcessVmVote = 1, kInfinibandVote = 2, kRoceVote = 4;

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

int usableCores() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
}

}  // namespace

void LocalFabric::prepare(const UniqueId& id) {
  probeWord_ = randomWord();
  Record& record = record_;
  record.rank = config_.rank;
  record.ranks = config_.ranks;
  record.nodeId = config_.nodeId;
  record.gpu = config_.gpu;
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
  // Before anything that may fail, so that others can be told.
  if ((id.flags & UniqueId::kByAddress) != 0 && config_.rank == 0) openAgreedPlace(id);
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
  if (group_) group_->add(record_.member, {});
  memory_.reset();
  copyText(record_.failure, sizeof(record_.failure), error.what());
  record_.failureCode = static_cast<int>(error.code());
  // By an agreed address the place may be yet to open.
  tellFailure(id, record_, Deadline::afterMs((id.flags & UniqueId::kByAddress) != 0 ? 10000 : 1000));
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
  // The meeting place knows who is missing: its answer at the time-out should come before our own.
  const std::int64_t grace = config_.initTimeoutMs / 20 + 1000;
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
  std::vector<transport::MeshMember> members = membersOf(records);
  try {
    // First of all, so that what happens from here on can be told to all.
    startNetwork(id, records);
  } catch (const std::exception&) {
    // Descriptors may be what is short.
    listener_.reset();
    transport::Mesh::tellLower(config_.rank, id.key, members);
    throw;
  }
  connectMesh(id, std::move(members), deadline);
  passPoint("connect", 1);
  joinNetwork(deadline);
  passPoint("connect", 2);
  vote(records);
  listener_.reset();
  leaveMeetingPlace(id);
}

void LocalFabric::arrange(const std::vector<Record>& records) {
  int onMachine = 0, firstOfDomain = config_.rank;
  for (const Record& record : records) {
    names_.push_back(record.describe());
    onMachine += record.boot == record_.boot ? 1 : 0;
    if (record.domain == record_.domain) firstOfDomain = std::min(firstOfDomain, record.rank);
  }
  const std::vector<int> nodeOf = nodesOf(records);
  topology_.emplace(nodeOf, config_.lanesPerNode);
  if (firstOfDomain == config_.rank) {
    const std::string gpus = describeGpus(records, nodeOf, record_.domain);
    if (!gpus.empty()) FUSCO_INFO(kLogInit, "{}", gpus);
  }
  remotePresence_ = std::vector<std::atomic<std::uint32_t>>(records.size());
  headers_.assign(records.size(), nullptr);
  headers_[static_cast<std::size_t>(config_.rank)] = &memory_->header();
  // With a core for each, waking a sleeper (a halted core, on a virtual machine) costs far more than to look on for a
  // while; without, one look after the others have run is enough.
  spinMicroseconds_ = onMachine <= usableCores() ? 50 : 0;
}

std::vector<transport::MeshMember> LocalFabric::membersOf(const std::vector<Record>& records) {
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
    if (member.sameNode && !sameProcess) oneProcess_ = false;
    member.local = local.memory;
    if (local.memory) headers_[static_cast<std::size_t>(record.rank)] = &local.memory->header();
    locals_.push_back(std::move(local));
    members.push_back(std::move(member));
  }
  return members;
}

void LocalFabric::connectMesh(const UniqueId& id, std::vector<transport::MeshMember> members, Deadline deadline) {
  imports_.resize(members.size());
  links_.resize(members.size());
  for (auto& links : links_) links.resize(static_cast<std::size_t>(kChannels * topology_->paths()));
  mailSeen_.assign(members.size(),
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
    if (config_.gpuMemory) {
      std::string how;
      const bool used = nics->useGpuMemory(config_.gpuMemory, &how);
      FUSCO_LOG(used ? LogLevel::info : LogLevel::warn, kLogNet, "{}: {}", names_[config_.rank], how);
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

}  // namespace fusco::comm
