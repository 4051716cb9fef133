// What the slots of a link lie in: host memory, and for payloads a GPU's, where the link was given one.
#include <sys/mman.h>

#include "base/status.h"
#include "transport/verbs/link.h"

namespace fusco::transport {

// Memory is made once and registered with each NIC that the link comes to. A child that is forked off would take pages
// away from under the NIC: it does not get them.
void QueuePairLink::prepare(Slots& slots, int access) {
  if (!slots.memory) {
    slots.memory = Mapping::anonymous(static_cast<std::size_t>(options_.slots) * stride_ +
                                      static_cast<std::size_t>(boards_) * sizeof(Board));
    ::madvise(slots.memory.data(), slots.memory.size(), MADV_DONTFORK);
    madeBytes_.fetch_add(slots.memory.size(), std::memory_order_relaxed);
  }
  if (slots.region == nullptr) slots.region = nic_->registerMemory(slots.memory.data(), slots.memory.size(), access);
  if (gpu_ == nullptr || slots.mirrorRegion != nullptr) return;
  const std::size_t bytes = static_cast<std::size_t>(options_.slots) * stride_;
  if (slots.mirror == nullptr) {
    slots.mirror = gpu_->allocate(bytes);
    madeBytes_.fetch_add(bytes, std::memory_order_relaxed);
  }
  slots.mirrorRegion = nic_->registerGpu(*gpu_, slots.mirror, bytes, access);
}

bool QueuePairLink::prepared(const Slots& slots) const {
  return slots.region != nullptr && (gpu_ == nullptr || slots.mirrorRegion != nullptr);
}

void QueuePairLink::forget(Slots& slots) {
  if (slots.region != nullptr) verbs_.deregMr(slots.region);
  if (slots.mirrorRegion != nullptr) verbs_.deregMr(slots.mirrorRegion);
  slots.region = slots.mirrorRegion = nullptr;
}

void QueuePairLink::free(Slots& slots) {
  slots.memory.reset();
  if (slots.mirror != nullptr) gpu_->release(slots.mirror);
  slots.mirror = nullptr;
}

std::vector<Segment> QueuePairLink::slotMemory() const {
  std::lock_guard lock(mutex_);
  std::vector<Segment> memory;
  for (const Slots* slots : {&out_, &in_}) {
    if (slots->memory) memory.push_back({slots->memory.data(), slots->memory.size()});
    if (slots->mirror != nullptr) memory.push_back({slots->mirror, static_cast<std::size_t>(options_.slots) * stride_});
  }
  return memory;
}

// The same offset in the other half; null: there is none.
std::byte* QueuePairLink::mirrorOf(const Slots& slots, const std::byte* inSlot) const {
  if (slots.mirror == nullptr) return nullptr;
  if (!slots.memory.contains(inSlot)) fail(Code::internalError, "an address lies in none of a link's slots");
  return slots.mirror + (inSlot - slots.memory.bytes());
}

// ---- sending

std::byte* QueuePairLink::mirrorOf(const std::byte* inSlot) {
  std::lock_guard lock(mutex_);
  return mirrorOf(out_, inSlot);
}

void QueuePairLink::postMirrored(std::size_t headBytes, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  if (!acquired_ || out_.mirror == nullptr || headBytes == 0 || headBytes > bytes || bytes > options_.slotBytes)
    fail(Code::internalError, "a slice was posted with a payload in GPU memory that is not there");
  Filled& filled = filled_[posted_ % filled_.size()];
  filled.head = headBytes;
  filled.mirrored = bytes - headBytes;
  filled.rows.clear();
  filled.places.clear();
  hand(bytes);
}

// Head and payload, each to its half of the peer's slot.
int QueuePairLink::layOutApart(std::uint64_t sequence, std::uint64_t toSlot) {
  const Filled& filled = filled_[sequence % filled_.size()];
  for (ibv_sge& piece : pieces_) {
    const bool head = &piece == pieces_.data();
    ibv_send_wr write{};
    write.sg_list = &piece;
    write.num_sge = 1;
    write.opcode = IBV_WR_RDMA_WRITE;
    write.wr.rdma.remote_addr = head ? toSlot : toSlot - peer_.address + peer_.mirror + filled.head;
    write.wr.rdma.rkey = head ? peer_.key : peer_.mirrorKey;
    writes_.push_back(write);
  }
  return static_cast<int>(writes_.size());
}

// ---- receiving

const std::byte* QueuePairLink::arrivedMirror(const std::byte* inSlot) {
  std::lock_guard lock(mutex_);
  if (arrived_ == released_ || payloads_[released_ % payloads_.size()] != Payload::mirror) return nullptr;
  if (gpu_->flushing() == GpuMemory::Flush::call && flush_.wanted(released_, arrived_)) {
    gpu_->flush();
    ++counts_.flushes;
  }
  return mirrorOf(in_, inSlot);
}

}  // namespace fusco::transport
