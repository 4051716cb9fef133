#include "plugin/nccl/communicators.h"

#include "base/thread.h"

namespace fusco::nccl {

// Entries are never given back to the system, so that a reader may touch one that has just been taken out; their count
// tells whether it lives. A reader takes part only in counts above zero.
struct CommunicatorRef::Entry {
  std::atomic<int> count{0};
  std::atomic<ncclComm_t> handle{nullptr};
  std::atomic<Entry*> next{nullptr};
  std::unique_ptr<Communicator> communicator;
};

namespace {

using Entry = CommunicatorRef::Entry;
constexpr std::size_t kBuckets = 1024;

struct Table {
  // Odd while a writer is at work: who finds nothing and sees it changed looks again.
  std::atomic<std::uint64_t> version{0};
  std::array<std::atomic<Entry*>, kBuckets> buckets{};
  std::mutex mutex;  // of writers
  std::vector<Entry*> unused;
  std::uint64_t generation = 0;
};

Table& table() {
  static auto& all = *new Table;
  holdAtForks<[]() -> std::mutex& { return all.mutex; }>();
  return all;
}

std::size_t bucketOf(ncclComm_t handle) {
  return (reinterpret_cast<std::uintptr_t>(handle) * 0x9e3779b97f4a7c15 >> 32) % kBuckets;
}

bool tryHold(Entry& entry) {
  int count = entry.count.load(std::memory_order_relaxed);
  while (count > 0) {
    if (entry.count.compare_exchange_weak(count, count + 1, std::memory_order_acquire)) return true;
  }
  return false;
}

void release(Entry& entry) {
  if (entry.count.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  entry.communicator.reset();
  std::lock_guard lock(table().mutex);
  table().unused.push_back(&entry);
}

}  // namespace

Communicator::~Communicator() { endStatistics(*this); }

void Communicator::fail(ncclResult_t code, const std::string& text) {
  std::lock_guard lock(errorMutex);
  if (error != ncclSuccess) return;
  error = code;
  errorText = text;
}

CommunicatorRef::CommunicatorRef(const CommunicatorRef& other) : entry_(other.entry_) {
  if (entry_ != nullptr) entry_->count.fetch_add(1, std::memory_order_relaxed);
}
CommunicatorRef::~CommunicatorRef() {
  if (entry_ != nullptr) release(*entry_);
}
Communicator* CommunicatorRef::get() const { return entry_->communicator.get(); }

CommunicatorRef enter(ncclComm_t handle, std::unique_ptr<Communicator> communicator) {
  Table& all = table();
  std::unique_lock lock(all.mutex);
  Entry* entry = nullptr;
  if (all.unused.empty()) {
    entry = new Entry;
  } else {
    entry = all.unused.back();
    all.unused.pop_back();
  }
  communicator->generation = ++all.generation;
  // No address of user memory looks like this, so that a use after destroy is found.
  if (handle == nullptr) handle = reinterpret_cast<ncclComm_t>((std::uintptr_t{0xf05c0} << 44) + all.generation * 16);
  communicator->handle = handle;
  entry->communicator = std::move(communicator);
  entry->handle.store(handle, std::memory_order_relaxed);
  entry->count.store(2, std::memory_order_release);  // the table's and the caller's
  std::atomic<Entry*>& head = all.buckets[bucketOf(handle)];
  all.version.fetch_add(1, std::memory_order_acq_rel);
  entry->next.store(head.load(std::memory_order_relaxed), std::memory_order_relaxed);
  head.store(entry, std::memory_order_release);
  all.version.fetch_add(1, std::memory_order_acq_rel);
  lock.unlock();  // one lock at a time: a fork takes them in another order
  beginStatistics(*entry->communicator);
  return CommunicatorRef(entry);
}

CommunicatorRef findCommunicator(ncclComm_t handle) {
  if (handle == nullptr) return {};
  Table& all = table();
  for (;;) {
    const std::uint64_t version = all.version.load(std::memory_order_acquire);
    Entry* entry = all.buckets[bucketOf(handle)].load(std::memory_order_acquire);
    while (entry != nullptr && all.version.load(std::memory_order_acquire) == version) {
      if (entry->handle.load(std::memory_order_relaxed) == handle && tryHold(*entry)) {
        if (entry->handle.load(std::memory_order_relaxed) == handle) return CommunicatorRef(entry);
        release(*entry);
      }
      entry = entry->next.load(std::memory_order_acquire);
    }
    if (version % 2 == 0 && all.version.load(std::memory_order_acquire) == version) return {};
  }
}

CommunicatorRef takeOut(ncclComm_t handle) {
  Table& all = table();
  Entry* found = nullptr;
  {
    std::lock_guard lock(all.mutex);
    std::atomic<Entry*>* link = &all.buckets[bucketOf(handle)];
    for (Entry* entry = link->load(); entry != nullptr; link = &entry->next, entry = link->load()) {
      if (entry->handle.load() != handle) continue;
      all.version.fetch_add(1, std::memory_order_acq_rel);
      link->store(entry->next.load(), std::memory_order_release);
      entry->handle.store(nullptr, std::memory_order_relaxed);
      all.version.fetch_add(1, std::memory_order_acq_rel);
      found = entry;
      break;
    }
  }
  // The table's count passes on.
  return found == nullptr ? CommunicatorRef() : CommunicatorRef(found);
}

}  // namespace fusco::nccl
