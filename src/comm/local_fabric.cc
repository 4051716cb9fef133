#include "comm/local_fabric.h"

#include <pthread.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <set>

#include "base/clock.h"
#include "base/point.h"
#include "base/status.h"
#include "comm/bootstrap.h"
#include "transport/local/process_vm.h"
#include "transport/local/window.h"

namespace fusco::comm {

using transport::Presence;
using transport::RankHeader;

namespace {

// For the news of a rank's end to leave this one.
constexpr std::int64_t kFarewellMs = 500;

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

}  // namespace

LocalFabric::LocalFabric(const FabricConfig& config, const UniqueId& id) : config_(config), forks_(forkCount()) {
  try {
    prepare(id);
    meetAll(id);
  } catch (const Error& error) {
    const std::string text = ownText(error.code(), error.what(), record_.describe());
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

// Set-up has failed here. Others may be waiting for this rank, and should hear why and not only that it has gone.
void LocalFabric::tellOthers(const std::string& reason) {
  for (std::size_t rank = 0; rank < headers_.size(); ++rank) {
    if (headers_[rank] != nullptr && static_cast<int>(rank) != config_.rank) headers_[rank]->abort(reason);
  }
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

// ---- the interface's static part

std::unique_ptr<Fabric> Fabric::connect(const FabricConfig& config, const char id[128]) {
  constexpr std::size_t kMostControlBytes = std::size_t{1} << 40;
  if (config.ranks <= 0 || config.rank < 0 || config.rank >= config.ranks) {
    fail(Code::invalidArgument, "rank " + std::to_string(config.rank) + " of " + std::to_string(config.ranks) +
                                    ": ranks count from 0 to the number of ranks minus 1");
  }
  if (config.controlBytes > kMostControlBytes) {
    fail(Code::invalidArgument,
         "rank " + std::to_string(config.rank) + ": " + std::to_string(config.ranks) + " ranks would need " +
             std::to_string(config.controlBytes >> 30) +
             " GiB of control memory on each node, more than 1 TiB; is the number of ranks right?");
  }
  if (config.lanesPerNode < 1 || config.slots < 1 || config.slotBytes < sizeof(transport::SliceHeader) ||
      config.slotBytes % 64 != 0) {
    fail(Code::invalidArgument,
         "rank " + std::to_string(config.rank) + ": lanes and slots must be at least 1, slots a multiple of 64 bytes");
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
