#include "engine/device/peers.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>

#include "base/log.h"
#include "comm/bootstrap.h"
#include "engine/engine.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {

constexpr std::size_t kMostImports = 128;  // of a peer, for one communicator
constexpr std::int64_t kPartingMs = 1000;  // for peers that have not fetched yet what was sent
constexpr std::int64_t kDrainMs = 5000;

struct PeerRecord {
  std::uint64_t process[2];
  std::uint64_t end;  // its address, for ranks of the same process
  std::uint64_t eventsReach;
  cuda::Handle events[2][DeviceEnd::kEvents];
};

bool within(std::int64_t milliseconds, const std::function<bool()>& condition) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
}

}  // namespace

DeviceEnd::DeviceEnd(int device, bool betweenProcesses) : device_(device) {
  const cuda::OnDevice on(device_);
  for (int kind = 0; kind < kKinds; ++kind) {
    for (auto& event : events_[kind])
      event = std::make_unique<cuda::SharedEvent>(betweenProcesses && (kind == ready || kind == done));
  }
}

DeviceEnd::~DeviceEnd() {
  try {
    const cuda::OnDevice on(device_);
    if (staging != nullptr) cuda::release(staging);
    for (auto& ofKind : events_) {
      for (auto& event : ofKind) event.reset();
    }
  } catch (const std::exception& e) {
    FUSCO_WARN("GPU memory of a communicator could not be freed: {}", e.what());
  }
}

DevicePeers::DevicePeers(Engine& engine, DeviceDomain& domain, std::int64_t timeoutMs)
    : engine_(engine), domain_(domain), pending_(static_cast<std::size_t>(engine.fabric().ranks())) {
  const cuda::OnDevice on(domain_.device());
  comm::Fabric& fabric = engine_.fabric();
  lane_ = std::make_unique<cuda::OwnStream>();
  joining_ = std::make_unique<cuda::Event>();
  const auto ranks = static_cast<std::size_t>(fabric.ranks());
  PeerRecord mine{};
  comm::processIdentity(mine.process);
  mine.eventsReach = 1;
  if (!fabric.oneProcess()) {
    try {
      end_ = std::make_shared<DeviceEnd>(domain_.device(), true);
      for (int k = 0; k < DeviceEnd::kEvents; ++k) {
        mine.events[0][k] = end_->event(DeviceEnd::ready, k).handle();
        mine.events[1][k] = end_->event(DeviceEnd::done, k).handle();
      }
    } catch (const Error& e) {
      FUSCO_INFO(kLogInit, "{}: events cannot be shared between processes: {}", fabric.describeRank(fabric.rank()),
                 e.what());
      mine.eventsReach = 0;
      end_.reset();
    }
  }
  if (!end_) end_ = std::make_shared<DeviceEnd>(domain_.device(), false);
  mine.end = reinterpret_cast<std::uintptr_t>(end_.get());
  std::vector<PeerRecord> all(ranks);
  fabric.allGather(&mine, sizeof mine, all.data(), timeoutMs);
  bool reach = mine.eventsReach != 0;
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    const PeerRecord& r = all[static_cast<std::size_t>(engine_.nodeRank(i))];
    Peer peer;
    std::memcpy(peer.process, r.process, sizeof peer.process);
    peer.sameProcess = r.process[0] == mine.process[0] && r.process[1] == mine.process[1];
    if (peer.sameProcess) {
      peer.end = reinterpret_cast<DeviceEnd*>(r.end)->shared_from_this();
    } else if (r.eventsReach == 0) {
      reach = false;
    } else {
      try {
        for (int kind = 0; kind < 2; ++kind) {
          for (int k = 0; k < DeviceEnd::kEvents; ++k)
            peer.events[kind][k] = std::make_unique<cuda::SharedEvent>(r.events[kind][k]);
        }
      } catch (const Error& e) {
        FUSCO_INFO(kLogInit, "{}: the events of {} are out of reach: {}", fabric.describeRank(fabric.rank()),
                   fabric.describeRank(engine_.nodeRank(i)), e.what());
        reach = false;
      }
    }
    peers_.push_back(std::move(peer));
  }
  // Nobody lets go of its end before all have taken it over.
  eventsReach_ = agree(reach, timeoutMs);
  if (!eventsReach_) {
    FUSCO_INFO(kLogInit, "{}: transfers between processes wait for the GPU on the host",
               fabric.describeRank(fabric.rank()));
  }
  // A rank that is alone on its node has nobody to wait for.
  if (!fabric.oneProcess() && agree(domain_.meetsOnGpu() || engine_.nodeRanks() == 1, timeoutMs))
    meetByWords(timeoutMs);
  captures_ = std::make_unique<cuda::Order>(words_);
  const std::int64_t bound = engine_.config().maxStagingBytes;
  if (bound > 0) {
    slotBytes_ =
        std::min(slotBytes_, std::max<std::size_t>(65536, static_cast<std::size_t>(bound) / kSlots / 256 * 256));
    slots_ = std::clamp(static_cast<int>(static_cast<std::size_t>(bound) / slotBytes_), 1, kSlots);
  }
}

namespace {
// Of each kind: the peers' words, what was told to them, what was awaited of them.
constexpr std::size_t kWordsOfKind = 3 * kernels::kMaxNodeRanks;
constexpr std::size_t kWordBytes = DeviceEnd::kKinds * kWordsOfKind * sizeof(std::uint32_t);
std::uint32_t* wordsOf(std::byte* memory, int kind, int which) {
  return reinterpret_cast<std::uint32_t*>(memory) + static_cast<std::size_t>(kind) * kWordsOfKind +
         static_cast<std::size_t>(which) * kernels::kMaxNodeRanks;
}
struct WordRecord {
  std::uint64_t process[2];
  std::uint64_t address;
  cuda::Exported exported;
};
}  // namespace

void DevicePeers::meetByWords(std::int64_t timeoutMs) {
  comm::Fabric& fabric = engine_.fabric();
  wordMemory_ = static_cast<std::byte*>(cuda::allocate(kWordBytes));
  engine_.ledger().bytes += kWordBytes;
  cuda::fillNow(wordMemory_, 0, kWordBytes);
  WordRecord mine{};
  comm::processIdentity(mine.process);
  mine.address = reinterpret_cast<std::uintptr_t>(wordMemory_);
  mine.exported = cuda::exportMemory(wordMemory_);
  std::vector<WordRecord> all(static_cast<std::size_t>(fabric.ranks()));
  fabric.allGather(&mine, sizeof mine, all.data(), timeoutMs);
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    if (peers_[static_cast<std::size_t>(i)].sameProcess) continue;
    const WordRecord& r = all[static_cast<std::size_t>(engine_.nodeRank(i))];
    wordImports_.push_back(std::make_unique<cuda::Imported>(cuda::Foreign{
        r.exported.handle, {r.process[0], r.process[1]}, r.address - r.exported.offset, r.exported.bytes}));
    std::byte* const theirs = wordImports_.back()->start() + r.exported.offset;
    for (int kind = 0; kind < DeviceEnd::kKinds; ++kind)
      telling_[kind].theirs[i] = wordsOf(theirs, kind, 0) + engine_.localIndex();
  }
  for (int kind = 0; kind < DeviceEnd::kKinds; ++kind) {
    awaiting_[kind].mine = wordsOf(wordMemory_, kind, 0);
    telling_[kind].told = wordsOf(wordMemory_, kind, 1);
    awaiting_[kind].awaited = wordsOf(wordMemory_, kind, 2);
    awaiting_[kind].wait = domain_.meetingWait();
  }
  ranksApart_ = engine_.nodeRanks() == fabric.ranks();
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j)
      ranksApart_ = ranksApart_ && (all[i].process[0] != all[j].process[0] || all[i].process[1] != all[j].process[1]);
  }
  localPeers_ = std::count_if(peers_.begin(), peers_.end(), [](const Peer& p) { return p.sameProcess; }) > 1;
  words_ = agree(true, timeoutMs);
}

bool DevicePeers::agree(bool mine, std::int64_t timeoutMs) {
  const char yes = mine ? 1 : 0;
  std::vector<char> all(static_cast<std::size_t>(engine_.fabric().ranks()));
  engine_.fabric().allGather(&yes, 1, all.data(), timeoutMs);
  return std::all_of(all.begin(), all.end(), [](char one) { return one != 0; });
}

void DevicePeers::leave() {
  left_ = true;
  try {
    const cuda::OnDevice on(domain_.device());
    // What lies in the window for a rank of this process stays there as long as that rank; others need to have fetched
    // it.
    within(kPartingMs, [&] {
      bool left = false;
      for (int i = 0; i < engine_.nodeRanks(); ++i) {
        const int rank = engine_.nodeRank(i);
        if (peers_[static_cast<std::size_t>(i)].sameProcess) continue;
        takeAnswers(rank, lane_->get(), false);
        left = left || !pending_[static_cast<std::size_t>(rank)].empty();
      }
      if (left) engine_.fabric().check();
      return !left;
    });
  } catch (const std::exception& e) {
    FUSCO_INFO(kLogInit, "a communicator ends with rows that were not fetched: {}", e.what());
  }
  try {
    const cuda::OnDevice on(domain_.device());
    settle(false, lane_->get());
    within(kDrainMs, [&] { return lane_->drained() && captures_->reached(); });
  } catch (const std::exception& e) {
    FUSCO_WARN("GPU {}: a communicator that is destroyed: {}", domain_.device(), e.what());
  }
}

DevicePeers::~DevicePeers() {
  if (!left_) leave();
  try {
    const cuda::OnDevice on(domain_.device());
    // Waits have been ended meanwhile.
    if (!within(kPartingMs, [&] { return lane_->drained(); })) {
      FUSCO_WARN("GPU {}: copies of a communicator that is destroyed still wait for a peer; their memory is not freed",
                 domain_.device());
      for (Peer& peer : peers_) {
        for (auto& [handle, imported] : peer.imports) static_cast<void>(imported.release());
      }
      for (auto& imported : wordImports_) static_cast<void>(imported.release());
      new std::shared_ptr<DeviceEnd>(end_);
      static_cast<void>(lane_.release());
    } else if (wordMemory_ != nullptr) {
      wordImports_.clear();
      cuda::release(wordMemory_);
    }
    if (wordMemory_ != nullptr) engine_.ledger().bytes -= kWordBytes;
    if (end_->staging != nullptr) engine_.ledger().bytes -= slotBytes_ * static_cast<std::size_t>(slots_);
    peers_.clear();
    joining_.reset();
    captures_.reset();
    lane_.reset();
  } catch (const std::exception& e) {
    FUSCO_WARN("GPU memory of a communicator could not be freed: {}", e.what());
  }
}

void DevicePeers::beginCaptured(cuda::Stream stream) {
  keepsMapped_ = true;
  if (words_) captures_->begin(stream);
}

void DevicePeers::endCaptured(cuda::Stream stream) {
  if (words_) captures_->end(stream);
}

void DevicePeers::recordFor(int localIndex, DeviceEnd::Kind kind) {
  if (!words_ || peers_[static_cast<std::size_t>(localIndex)].sameProcess) return;
  ++telling_[kind].more[localIndex];
  tells_[kind] = true;
}

int DevicePeers::record(DeviceEnd::Kind kind, cuda::Stream stream) {
  settle(kind == DeviceEnd::capturedReady || kind == DeviceEnd::capturedDone, stream);
  const int index = recorded_[kind]++ % DeviceEnd::kEvents;
  if (localPeers_) end_->event(kind, index).record(stream);
  if (tells_[kind]) {
    cuda::tell(telling_[kind], stream);
    std::fill(std::begin(telling_[kind].more), std::end(telling_[kind].more), std::uint16_t{0});
    tells_[kind] = false;
  }
  if (!words_ && !eventsReach_) cuda::synchronize(stream);
  return index;
}

void DevicePeers::settle(bool captured, cuda::Stream stream) {
  for (const int kind :
       {captured ? DeviceEnd::capturedReady : DeviceEnd::ready, captured ? DeviceEnd::capturedDone : DeviceEnd::done}) {
    if (!awaits_[kind]) continue;
    cuda::await(awaiting_[kind], stream);
    std::fill(std::begin(awaiting_[kind].more), std::end(awaiting_[kind].more), std::uint16_t{0});
    awaits_[kind] = false;
  }
}

void DevicePeers::wait(int localIndex, DeviceEnd::Kind kind, int index, cuda::Stream stream) {
  Peer& peer = peers_[static_cast<std::size_t>(localIndex)];
  if (peer.sameProcess) {
    peer.end->event(kind, index).waitOn(stream);
  } else if (words_) {
    ++awaiting_[kind].more[localIndex];
    awaits_[kind] = true;
  } else if (eventsReach_) {
    peer.events[kind == DeviceEnd::ready ? 0 : 1][index]->waitOn(stream);
  }
}

void DevicePeers::join(cuda::Stream from, cuda::Stream to) {
  if (from == to) return;
  joining_->record(from);
  joining_->waitOn(to);
}

bool DevicePeers::describe(const void* pointer, std::size_t bytes, bool sameProcess, PeerMemory& out) {
  out = {};
  if (bytes == 0) return true;
  out.memory.kind = transport::MemoryRef::privateMemory;
  out.memory.address = reinterpret_cast<std::uintptr_t>(pointer);
  out.memory.bytes = bytes;
  if (sameProcess) return true;
  if (cuda::whereIs(pointer).place != cuda::Place::device) return false;
  const cuda::Allocation allocation = cuda::allocationOf(pointer);
  if (out.memory.address + bytes > allocation.start + allocation.bytes) return false;
  // Handles are looked up by allocation, whose number tells it from one that lay there before.
  const auto refused = notExported_.find(allocation.start);
  if (refused != notExported_.end() && refused->second == allocation.id) return false;
  auto& known = exported_[allocation.start];
  if (known.first != allocation.id || allocation.id == 0) {
    if (!cuda::tryExport(allocation, known.second)) {
      exported_.erase(allocation.start);
      notExported_[allocation.start] = allocation.id;
      return false;
    }
    known.first = allocation.id;
  }
  out.handle = known.second;
  out.memory.offset = out.memory.address - allocation.start;
  out.allocationBytes = allocation.bytes;
  return true;
}

void DevicePeers::forgetImports() {
  if (keepsMapped_) return;
  bool idle = false;
  for (Peer& peer : peers_) {
    if (peer.imports.size() < kMostImports) continue;
    if (!idle) cuda::synchronize(lane_->get());
    idle = true;
    std::erase_if(peer.imports, [](const auto& one) { return one.second->unmapped(); });
    if (peer.imports.size() >= kMostImports) peer.imports.clear();
  }
}

std::byte* DevicePeers::reach(int localIndex, const PeerMemory& memory) {
  if (memory.memory.kind == transport::MemoryRef::none) return nullptr;
  Peer& peer = peers_[static_cast<std::size_t>(localIndex)];
  if (peer.sameProcess) return reinterpret_cast<std::byte*>(memory.memory.address);
  auto found = peer.imports.find(memory.handle);
  if (found != peer.imports.end() && found->second->unmapped()) {
    peer.imports.erase(found);
    found = peer.imports.end();
  }
  if (found == peer.imports.end()) {
    const cuda::Foreign foreign{memory.handle,
                                {peer.process[0], peer.process[1]},
                                memory.memory.address - memory.memory.offset,
                                memory.allocationBytes};
    found = peer.imports.emplace(memory.handle, std::make_unique<cuda::Imported>(foreign)).first;
  }
  return found->second->start() + memory.memory.offset;
}

int DevicePeers::takeSlot() {
  if (end_->staging == nullptr) {
    end_->staging = static_cast<std::byte*>(cuda::allocate(slotBytes_ * static_cast<std::size_t>(slots_)));
    engine_.ledger().bytes += slotBytes_ * static_cast<std::size_t>(slots_);
    for (int slot = slots_; slot-- > 0;) freeSlots_.push_back(slot);
  }
  if (freeSlots_.empty()) return -1;
  const int slot = freeSlots_.back();
  freeSlots_.pop_back();
  return slot;
}

const DoneCell& DevicePeers::answerTo(int rank, const Pending& send) const {
  comm::Fabric& fabric = engine_.fabric();
  return cells(fabric.control(fabric.rank()), engine_.nodeRanks(), kTransferChannel,
               engine_.topology().localIndex(rank))
      .done[send.sequence % kCellDepth];
}

void DevicePeers::complain(int rank, const Pending& send) const {
  fail(Code::invalidUsage,
       fmt::format("send/receive {} of the pair: rank {} sends {} bytes, rank {} expects {}; the k-th send must "
                   "match the k-th receive",
                   send.sequence, engine_.fabric().rank(), send.bytes, rank, answerTo(rank, send).bytes));
}

void DevicePeers::hearComplaints() const {
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    const int rank = engine_.nodeRank(i);
    for (const Pending& send : pending_[static_cast<std::size_t>(rank)]) {
      const DoneCell& answer = answerTo(rank, send);
      if (answer.sequence.load(std::memory_order_acquire) == send.sequence + 1 && answer.status != 0)
        complain(rank, send);
    }
  }
}

std::uint64_t DevicePeers::takeAnswers(int rank, cuda::Stream stream, bool captured) {
  std::vector<Pending>& pending = pending_[static_cast<std::size_t>(rank)];
  const int local = engine_.topology().localIndex(rank);
  std::uint64_t inPlace = 0;
  while (!pending.empty()) {
    const Pending first = pending.front();
    const DoneCell& cell = answerTo(rank, first);
    if (cell.sequence.load(std::memory_order_acquire) < first.sequence + 1) break;
    if (cell.status != 0) complain(rank, first);
    // 0: nothing was read. The window is filled again on the lane only.
    if (cell.bytes != 0 && first.slot >= 0)
      wait(local, DeviceEnd::done, static_cast<int>(cell.bytes) - 1, lane_->get());
    if (cell.bytes != 0 && first.slot == kInPlace)
      wait(local, captured ? DeviceEnd::capturedDone : DeviceEnd::done, static_cast<int>(cell.bytes) - 1, stream);
    if (first.slot >= 0) freeSlot(first.slot);
    if (first.slot == kInPlace) ++inPlace;
    pending.erase(pending.begin());
  }
  return inPlace;
}

}  // namespace fusco::engine
