#include "engine/device/domain.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/environment.h"
#include "base/log.h"
#include "comm/bootstrap.h"
#include "engine/device/operation.h"
#include "engine/engine.h"
#include "exec/cuda_virtual.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

void DeviceGroup::arrive(int channel, int member, DeviceOperation& operation) {
  std::lock_guard lock(mutex_);
  auto& waiting = waiting_[channel];
  waiting.resize(static_cast<std::size_t>(members_), nullptr);
  waiting[static_cast<std::size_t>(member)] = &operation;
  if (std::count(waiting.begin(), waiting.end(), nullptr) > 0) return;
  std::vector<DeviceOperation*> all;
  all.swap(waiting);
  std::exception_ptr error;
  try {
    operation.launchTogether(all);
  } catch (...) {
    error = std::current_exception();
  }
  for (DeviceOperation* one : all) one->launched(error, one == &operation);
}

void DeviceGroup::withdraw(int channel, int member, const DeviceOperation& operation) {
  std::lock_guard lock(mutex_);
  auto& waiting = waiting_[channel];
  if (!waiting.empty() && waiting[static_cast<std::size_t>(member)] == &operation)
    waiting[static_cast<std::size_t>(member)] = nullptr;
}

WaitWords::WaitWords() : words_(static_cast<std::uint32_t*>(cuda::allocatePinned(2 * sizeof(std::uint32_t)))) {
  words_[0] = words_[1] = 0;
}
WaitWords::~WaitWords() {
  try {
    cuda::releasePinned(words_);
  } catch (const std::exception& e) {
    FUSCO_WARN("pinned memory of a communicator could not be freed: {}", e.what());
  }
}

namespace {

// What ranks tell each other once.
struct DeviceRecord {
  std::uint64_t process[2];
  cuda::DeviceId gpu;
  std::int32_t device;
  std::int32_t apart;
  std::uint64_t counts;
  cuda::Exported exported;
};

constexpr std::size_t kMostImports = 256;

constexpr std::size_t kCountsOfSlot = sizeof(kernels::PlanCounts) + DeviceDomain::kMaxKeys * 2 * 4;
constexpr std::size_t kMeetingOfSlot = 512;
static_assert((kernels::kMaxNodeRanks + 1) * sizeof(std::uint32_t) <= kMeetingOfSlot);

std::size_t meetingsAt(int ranks) {
  return kOperationSlots * (kCountsOfSlot + static_cast<std::size_t>(ranks) * sizeof(void*));
}
// Words of a slot's meetings by local index, and behind them the count.
std::uint32_t* meetingOf(std::byte* counts, int ranks, int slot) {
  return reinterpret_cast<std::uint32_t*>(counts + meetingsAt(ranks) + static_cast<std::size_t>(slot) * kMeetingOfSlot);
}

// Brought maps lie behind the meetings, two for each rank and slot, where as many ranks can plan small maps.
std::size_t mapsAtOf(int ranks) { return (meetingsAt(ranks) + kOperationSlots * kMeetingOfSlot + 63) / 64 * 64; }
std::size_t mapsOf(int ranks) {
  return ranks > kernels::kMaxPlanRanks ? 0 : 2 * static_cast<std::size_t>(ranks) * kernels::kMapBytes;
}

}  // namespace

std::size_t DeviceDomain::bytesOf(int ranks) { return mapsAtOf(ranks) + kOperationSlots * mapsOf(ranks); }

DeviceDomain::DeviceDomain(Engine& engine, int device, int maxSms, std::int64_t timeoutMs)
    : engine_(engine), device_(device), maxSms_(maxSms), pool_(device, engine.ledger()) {
  const cuda::OnDevice on(device_);
  comm::Fabric& fabric = engine.fabric();
  const int ranks = fabric.ranks();
  countsBytes_ = bytesOf(ranks);
  countsMemory_ = static_cast<std::byte*>(cuda::allocate(countsBytes_));
  engine_.ledger().bytes += countsBytes_;
  cuda::fillNow(countsMemory_, 0, countsBytes_);
  for (auto& event : events_) event = std::make_unique<cuda::Event>();
  for (auto& stream : beside_) stream = std::make_unique<cuda::OwnStream>();
  waits_ = std::make_shared<WaitWords>();

  DeviceRecord mine{};
  comm::processIdentity(mine.process);
  mine.gpu = cuda::deviceId(device_);
  mine.device = device_;
  mine.apart = environment().flag(Setting::gpuApart) ? 1 : 0;
  mine.counts = reinterpret_cast<std::uintptr_t>(countsMemory_);
  if (!fabric.oneProcess()) mine.exported = cuda::exportMemory(countsMemory_);
  std::vector<DeviceRecord> all(static_cast<std::size_t>(ranks));
  fabric.allGather(&mine, sizeof mine, all.data(), timeoutMs);

  if (engine.nodeRanks() > kernels::kMaxNodeRanks) {
    fail(Code::invalidArgument,
         fmt::format("{} ranks with GPUs on one node; at most {}", engine.nodeRanks(), kernels::kMaxNodeRanks));
  }
  const int self = engine.localIndex();
  const bool apart = mine.apart != 0;
  for (int rank = 0; rank < ranks; ++rank) {
    if (all[static_cast<std::size_t>(rank)].apart == mine.apart) continue;
    fail(Code::invalidUsage,
         fmt::format("FUSCO_GPU_APART is {} for {} and {} for {}; set it for all ranks alike", mine.apart,
                     fabric.describeRank(fabric.rank()), 1 - mine.apart, fabric.describeRank(rank)));
  }
  const auto recordOf = [&](int i) -> const DeviceRecord& { return all[static_cast<std::size_t>(engine.nodeRank(i))]; };
  const auto sameProcess = [](const DeviceRecord& a, const DeviceRecord& b) {
    return a.process[0] == b.process[0] && a.process[1] == b.process[1];
  };
  bool allHere = true;
  std::vector<std::byte*> countsOfRanks;  // by local index
  std::vector<const kernels::PlanCounts*> addresses(static_cast<std::size_t>(ranks) * kOperationSlots, nullptr);
  for (int i = 0; i < engine.nodeRanks(); ++i) {
    const int rank = engine.nodeRank(i);
    const DeviceRecord& r = all[static_cast<std::size_t>(rank)];
    const bool here = sameProcess(r, mine);
    int part = i;
    for (int j = i; j-- > 0 && !apart;) {
      if (sameProcess(recordOf(j), r) && recordOf(j).gpu == r.gpu) part = j;
    }
    peers_.push_back({here, r.device, part, {r.process[0], r.process[1]}});
    allHere = allHere && here;
    if (here && r.gpu != mine.gpu && !cuda::reachDevice(device_, r.device)) {
      fail(Code::systemError,
           fmt::format("{}: GPU {} cannot reach the memory of {} on GPU {}, though CUDA told of a path when the "
                       "communicator was made; set FUSCO_P2P_DISABLE=1 (the host carries the rows then), or give them "
                       "nodes of their own (nodeId)",
                       fabric.describeRank(fabric.rank()), device_, fabric.describeRank(rank), r.device));
    }
    std::byte* counts = reinterpret_cast<std::byte*>(r.counts);
    if (!here) {
      counts =
          mapped(peers_.back(), r.exported.handle, r.counts - r.exported.offset, r.exported.bytes) + r.exported.offset;
    }
    countsOfRanks.push_back(counts);
    for (int slot = 0; slot < kOperationSlots; ++slot) {
      meetings_[slot].theirs[i] = meetingOf(counts, ranks, slot);
      addresses[static_cast<std::size_t>(slot * ranks + rank)] =
          reinterpret_cast<const kernels::PlanCounts*>(counts + static_cast<std::size_t>(slot) * kCountsOfSlot);
    }
  }
  part_ = peers_[static_cast<std::size_t>(self)].part;
  for (int i = 0; i < engine.nodeRanks(); ++i) {
    const bool shares = peers_[static_cast<std::size_t>(i)].part == part_;
    sharing_ += shares ? 1 : 0;
    if (!shares && !allHere) continue;
    if (i == self) member_ = static_cast<int>(members_.size());
    members_.push_back(i);
  }
  together_ = allHere;
  meetsOnGpu_ = !allHere;
  for (int i = 0; i < engine.nodeRanks(); ++i) {
    for (int j = 0; j < i; ++j) {
      const bool onePart = peers_[static_cast<std::size_t>(i)].part == peers_[static_cast<std::size_t>(j)].part;
      const bool ownGpu = onePart || recordOf(i).gpu != recordOf(j).gpu;
      ownGpus_ = ownGpus_ && ownGpu;
      // A process makes one launch at a time, which waits for no other one of its own: a thread that drives several
      // GPUs could not make it. Processes that share a GPU take turns on it: that is slow, but ends.
      meetsOnGpu_ = meetsOnGpu_ && (onePart || (!sameProcess(recordOf(i), recordOf(j)) && (ownGpu || apart)));
    }
  }
  for (auto& order : slotOrders_) order = std::make_unique<cuda::Order>(meetsOnGpu_);
  for (int slot = 0; slot < kOperationSlots; ++slot) {
    kernels::MeetArgs& meeting = meetings_[slot];
    std::uint32_t* const own = meetingOf(countsMemory_, ranks, slot);
    meeting.mine = own;
    meeting.count = own + kernels::kMaxNodeRanks;
    meeting.wait = meetingWait();
    for (int i = 0; i < engine.nodeRanks(); ++i) {
      // The first rank of each other part, and there the word of this part.
      const int part = peers_[static_cast<std::size_t>(i)].part;
      std::uint32_t*& word = meeting.theirs[i];
      word = part == i && part != part_ ? word + part_ : nullptr;
    }
  }
  for (int i = 0; i < engine.nodeRanks(); ++i) {
    if (peers_[static_cast<std::size_t>(i)].part == i && i != part_)
      countsOfOthers_.push_back(countsOfRanks[static_cast<std::size_t>(i)]);
  }
  oneLaunch_ = sharing_ == engine.nodeRanks();
  constexpr int kStreamsApart = 8;  // have hardware queues of their own, so that none stands behind one that waits
  haveRoom_ = together_ && maxSms_ > 0 && maxSms_ * engine.nodeRanks() <= cuda::multiprocessors(device_) &&
              2 * engine.nodeRanks() <= kStreamsApart;
  if (sharing_ > kernels::kMaxLocalRanks) {
    fail(Code::invalidArgument,
         fmt::format("{} ranks of one process on GPU {}; at most {}", sharing_, device_, kernels::kMaxLocalRanks));
  }
  cuda::copyNow(countsMemory_ + kOperationSlots * kCountsOfSlot, addresses.data(), addresses.size() * sizeof(void*));

  // The first member makes the group, the others of the process take it over.
  if (member_ == 0) group_ = std::make_shared<DeviceGroup>(static_cast<int>(members_.size()));
  const auto address = reinterpret_cast<std::uintptr_t>(group_.get());
  std::vector<std::uintptr_t> groups(static_cast<std::size_t>(ranks));
  fabric.allGather(&address, sizeof address, groups.data(), timeoutMs);
  if (member_ != 0) {
    const int first = engine.nodeRank(members_.front());
    group_ = reinterpret_cast<DeviceGroup*>(groups[static_cast<std::size_t>(first)])->shared_from_this();
  }
  char token = 0;
  std::vector<char> tokens(static_cast<std::size_t>(ranks));
  fabric.allGather(&token, 1, tokens.data(), timeoutMs);
  FUSCO_INFO(kLogInit, "{}: GPU {} ({}), launches with {} of {} ranks of its node", fabric.describeRank(fabric.rank()),
             device_, cuda::deviceName(device_), members_.size(), engine.nodeRanks());
}

DeviceDomain::~DeviceDomain() {
  try {
    const cuda::OnDevice on(device_);
    imports_.clear();
    for (auto& event : events_) event.reset();
    for (auto& order : slotOrders_) order.reset();
    for (auto& stream : beside_) stream.reset();
    for (int slot = 0; slot < kOperationSlots; ++slot) {
      outgrown_.push_back(arrivals_[slot].memory);
      outgrown_.push_back(partials_[slot].memory);
    }
    for (std::byte* memory : outgrown_) {
      if (memory != nullptr) cuda::release(memory);
    }
    cuda::release(countsMemory_);
  } catch (const std::exception& e) {
    FUSCO_WARN("GPU memory of a communicator could not be freed: {}", e.what());
  }
  engine_.ledger().bytes -= countsBytes_ + landingBytes_;
}

int DeviceDomain::parts() const {
  int count = 0;
  for (std::size_t i = 0; i < peers_.size(); ++i) count += peers_[i].part == static_cast<int>(i) ? 1 : 0;
  return count;
}

void DeviceDomain::meet(int slot, cuda::Stream stream) const { cuda::meet(meetings_[slot], stream); }

std::byte* DeviceDomain::mapsAt(std::byte* counts, int slot, int number) const {
  const int ranks = engine_.fabric().ranks();
  return counts + mapsAtOf(ranks) + static_cast<std::size_t>(slot) * mapsOf(ranks) +
         static_cast<std::size_t>(number) * kernels::kMapBytes;
}

void DeviceDomain::bringMaps(int slot, kernels::BringMapsArgs& args, cuda::Stream stream) const {
  args.meet = meetings_[slot];
  args.ranks = engine_.fabric().ranks();
  for (std::byte* counts : countsOfOthers_) args.maps[args.others++] = mapsAt(counts, slot, 0);
  cuda::bringMaps(args, stream);
}

void DeviceDomain::setTurn(int slot, kernels::PlanArgs& args) const {
  args.turn = meetings_[slot].count;
  args.turnBytes = mapsOf(engine_.fabric().ranks()) / 2;
}

bool DeviceDomain::slotsEnded() const {
  return std::all_of(std::begin(slotOrders_), std::end(slotOrders_),
                     [](const auto& order) { return order->reached(); });
}

bool DeviceDomain::ends(int withinMs) const {
  if (!meetsOnGpu_) return true;
  try {
    const cuda::OnDevice on(device_);
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(withinMs);
    while (!slotsEnded()) {
      if (std::chrono::steady_clock::now() > until) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  } catch (const std::exception& e) {
    FUSCO_WARN("GPU {}: a communicator that is destroyed: {}", device_, e.what());
  }
  return true;
}

cuda::Stream DeviceDomain::beside(cuda::Stream stream, bool captured) {
  const cuda::Stream other = beside_[captured ? 1 : 0]->get();
  event(2).record(stream);
  event(2).waitOn(other);
  if (captured) cuda::setCaptureEdges(other, cuda::captureEdges(stream));  // not what was beside another operation
  return other;
}

void DeviceDomain::joinBeside(cuda::Stream stream, bool captured) {
  event(3).record(beside_[captured ? 1 : 0]->get());
  event(3).waitOn(stream);
}

// Ranks may be apart by as much as the caller allows; the watch ends what nobody can end.
kernels::ArrivalWait DeviceDomain::meetingWait() const {
  const std::int64_t ms = engine_.config().operationTimeoutMs;
  return {ms > 0 ? static_cast<std::uint64_t>(ms) * 1000000u : ~std::uint64_t{0}, waits_->abort(), waits_->failed()};
}

kernels::ArrivalWait DeviceDomain::arrivalWait() const {
  constexpr std::int64_t kMostMs = 300000;
  const std::int64_t limit = engine_.config().operationTimeoutMs;
  const std::int64_t ms = limit > 0 ? std::min(limit, kMostMs) : kMostMs;
  return {static_cast<std::uint64_t>(ms) * 1000000u, waits_->abort(), waits_->failed()};
}

void DeviceDomain::checkArrivals(const WaitWords& waits) const {
  if (std::atomic_ref(*waits.failed()).load() == 0) return;
  fail(Code::remoteError,
       fmt::format("rank {}: GPU {} has waited in vain for other GPUs or for rows from them, an earlier operation has "
                   "not completed; look for what keeps those GPUs busy, or raise operationTimeoutMs",
                   engine_.fabric().rank(), device_));
}

void DeviceDomain::endWaits() { std::atomic_ref(*waits_->abort()).store(1); }

std::byte* DeviceDomain::landing(Landing& landing, std::size_t bytes) {
  if (landing.bytes >= bytes) return landing.memory;  // also nothing for nobody
  const cuda::OnDevice on(device_);
  // Twice as much, so that it seldom grows: as far as staging may go.
  const std::int64_t bound = engine_.config().maxStagingBytes;
  const std::size_t twice =
      bound > 0 ? std::min<std::size_t>(2 * landing.bytes, static_cast<std::size_t>(bound)) : 2 * landing.bytes;
  const std::size_t size = std::max(bytes, twice);
  auto* memory = static_cast<std::byte*>(cuda::tryAllocate(size));
  if (memory == nullptr) {
    if (!saidNoMemory_)
      FUSCO_WARN(
          "GPU {} has no {} bytes left to bring rows over links once; they are brought one by one, which takes "
          "longer",
          device_, size);
    saidNoMemory_ = true;
    return nullptr;
  }
  cuda::fillNow(memory, 0, size);
  if (landing.memory != nullptr) outgrown_.push_back(landing.memory);
  landing = {memory, size};
  landingBytes_ += size;
  engine_.ledger().bytes += size;
  return memory;
}

std::uint32_t* DeviceDomain::arrivals(int slot, std::size_t words) {
  return reinterpret_cast<std::uint32_t*>(landing(arrivals_[slot], words * sizeof(std::uint32_t)));
}

std::byte* DeviceDomain::partials(int slot, std::size_t bytes) { return landing(partials_[slot], bytes); }

kernels::PlanCounts* DeviceDomain::counts(int slot) const {
  return reinterpret_cast<kernels::PlanCounts*>(countsMemory_ + static_cast<std::size_t>(slot) * kCountsOfSlot);
}

const kernels::PlanCounts* const* DeviceDomain::allCounts(int slot) const {
  return reinterpret_cast<const kernels::PlanCounts* const*>(countsMemory_ + kOperationSlots * kCountsOfSlot) +
         slot * engine_.fabric().ranks();
}

transport::MemoryRef DeviceDomain::describe(const void* pointer, std::size_t bytes, transport::MemoryRef* handle) {
  transport::MemoryRef ref;
  if (bytes == 0) return ref;
  ref.kind = transport::MemoryRef::privateMemory;
  ref.address = reinterpret_cast<std::uintptr_t>(pointer);
  ref.bytes = bytes;
  if (!engine_.fabric().oneProcess()) {
    const cuda::OnDevice on(device_);
    const cuda::Exported exported = cuda::exportMemory(pointer, bytes);
    ref.offset = exported.offset;
    // As far as the allocation goes, whatever the caller says: peers tell allocations apart by where they lie.
    ref.bytes = exported.bytes - exported.offset;
    static_assert(sizeof exported.handle == 2 * sizeof(transport::MemoryRef));
    std::memcpy(static_cast<void*>(handle), exported.handle.data(), sizeof exported.handle);
  }
  return ref;
}

std::byte* DeviceDomain::reach(int localIndex, const transport::MemoryRef& memory, const transport::MemoryRef* handle) {
  if (memory.kind == transport::MemoryRef::none) return nullptr;
  if (sameProcess(localIndex)) return reinterpret_cast<std::byte*>(memory.address);
  cuda::Handle key;
  std::memcpy(key.data(), static_cast<const void*>(handle), sizeof key);
  try {
    return mapped(peers_[static_cast<std::size_t>(localIndex)], key, memory.address - memory.offset,
                  memory.offset + memory.bytes) +
           memory.offset;
  } catch (const Error& error) {
    fail(error.code(),
         fmt::format("{} cannot reach a tensor of {}: {}", engine_.fabric().describeRank(engine_.fabric().rank()),
                     engine_.fabric().describeRank(engine_.nodeRank(localIndex)), error.what()));
  }
}

// No launch uses what this operation does not ask for.
bool DeviceDomain::mayUnmap() const { return waitsOnHost() || (!keepsMapped_ && slotsEnded()); }

std::byte* DeviceDomain::mapped(const Peer& peer, const cuda::Handle& handle, std::uint64_t start,
                                std::uint64_t bytes) {
  std::lock_guard lock(importMutex_);
  ++asked_;
  Import& known = imports_[handle];
  if (known.memory == nullptr || known.memory->unmapped()) {
    const cuda::OnDevice on(device_);
    known.memory.reset();
    known.memory =
        std::make_unique<cuda::Imported>(cuda::Foreign{handle, {peer.process[0], peer.process[1]}, start, bytes});
    // Two operations may be under way; neither asks more often than so.
    const std::uint64_t recent = 2 * std::uint64_t{kMemoryRoles} * peers_.size();
    if (imports_.size() > kMostImports && asked_ > recent && mayUnmap()) {
      std::erase_if(imports_, [&](const auto& one) {
        return cuda::isVirtual(one.first) && one.second.used < asked_ - recent && one.second.memory != known.memory;
      });
    }
  }
  known.used = asked_;
  return known.memory->start();
}

void DeviceDomain::checkPointer(const char* what, const void* pointer) const {
  if (pointer == nullptr) return;
  const cuda::Where where = cuda::whereIs(pointer);
  if (where.place == cuda::Place::device && where.device != device_) {
    fail(Code::invalidArgument,
         fmt::format("rank {}: {} lies on GPU {}, the communicator's is GPU {}; give memory of that one, or make the "
                     "communicator with the other current (or named: fuscoConfig_t.gpu)",
                     engine_.fabric().rank(), what, where.device, device_));
  }
  if (where.place != cuda::Place::host || where.pinned) return;
  fail(Code::invalidArgument,
       fmt::format("rank {}: {} is host memory that GPU {} cannot reach; give memory of the GPU (or pinned memory)",
                   engine_.fabric().rank(), what, device_));
}

void DeviceDomain::checkRowBytes(std::size_t rowBytes) const {
  constexpr std::size_t kMost = std::size_t{1} << 31;
  if (rowBytes <= kMost) return;
  fail(Code::invalidArgument, fmt::format("rank {}: rows of {} bytes; on GPUs at most {}: cut them into several rows",
                                          engine_.fabric().rank(), rowBytes, kMost));
}

}  // namespace fusco::engine
