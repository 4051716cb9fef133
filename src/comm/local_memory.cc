// The fabric's windows and rings: what ranks tell each other so that they can reach memory.
#include "base/clock.h"
#include "base/status.h"
#include "comm/local_fabric.h"
#include "transport/local/window.h"

namespace fusco::comm {

using transport::MemoryRef;
using transport::MeshMessage;

void LocalFabric::onMessage(int rank, const MeshMessage& message, UniqueFd descriptor) {
  switch (message.kind) {
    case MeshMessage::window: {
      // Mapped now, so that the descriptor can go; its pages come with the first use.
      transport::SharedMemory& memory = imports_[rank][static_cast<std::uint32_t>(message.id)].memory;
      memory = transport::SharedMemory::attach(descriptor.get(), message.bytes);
      if (network_) network_->knowShared(memory.data(), memory.bytes());
      break;
    }
    case MeshMessage::windowFreed: {
      const auto found = imports_[rank].find(static_cast<std::uint32_t>(message.id));
      if (found == imports_[rank].end()) break;
      if (network_) network_->forgetShared(found->second.memory.data());
      imports_[rank].erase(found);
      break;
    }
    case MeshMessage::ring: {
      auto ring = std::make_shared<transport::RingMemory>(
          transport::SharedMemory::attach(descriptor.get(), message.bytes), config_.slots, config_.slotBytes);
      std::lock_guard lock(inbox_->mutex);
      inbox_->rings[{rank, static_cast<int>(message.id)}] = std::move(ring);
      break;
    }
    default:
      break;
  }
}

MemoryRef LocalFabric::describe(const void* address, std::size_t bytes) {
  refuseChild("an operation");
  MemoryRef ref{.kind = MemoryRef::privateMemory, .address = reinterpret_cast<std::uint64_t>(address), .bytes = bytes};
  if (address == nullptr) {
    ref.kind = MemoryRef::none;
    return ref;
  }
  const std::shared_ptr<transport::Window> window = transport::findWindow(address, bytes);
  if (!window) return ref;
  ref.kind = MemoryRef::window;
  ref.windowId = window->id;
  ref.offset = static_cast<std::uint64_t>(static_cast<const std::byte*>(address) - window->memory.data());
  if (!oneProcess_) exportWindow(window);
  return ref;
}

void LocalFabric::exportWindow(const std::shared_ptr<transport::Window>& window) {
  std::unique_lock lock(mutex_);
  if (!exported_.insert(window->id).second) return;
  const MeshMessage message{
      .kind = MeshMessage::window, .rank = config_.rank, .id = window->id, .bytes = window->memory.bytes()};
  for (int rank = 0; rank < config_.ranks; ++rank) {
    if (mesh_->sameNode(rank) && !mesh_->sameProcess(rank)) mesh_->send(rank, message, window->memory.descriptor());
  }
  // Peers wait for this message once they know the memory: it has to be out before the caller tells them. They may be
  // waiting for the same with us, so what they sent is taken in meanwhile.
  while (!mesh_->flush()) {
    mesh_->wait(10);
    if (headers_[config_.rank]->alarm.load(std::memory_order_acquire) != 0) alarmed();
    look(lock);
  }
}

bool LocalFabric::forgetWindow(std::uint32_t id) {
  if (network_) network_->forgetWindow(id);
  std::lock_guard lock(mutex_);
  if (exported_.erase(id) == 0) return false;
  const MeshMessage message{.kind = MeshMessage::windowFreed, .rank = config_.rank, .id = id};
  for (int rank = 0; rank < config_.ranks; ++rank) {
    if (mesh_->sameNode(rank) && !mesh_->sameProcess(rank)) mesh_->send(rank, message);
  }
  return true;
}

std::byte* LocalFabric::reach(int rank, const MemoryRef& memory) {
  if (memory.kind == MemoryRef::none) return nullptr;
  if (mesh_->sameProcess(rank)) return reinterpret_cast<std::byte*>(memory.address);
  if (memory.kind != MemoryRef::window || !mesh_->sameNode(rank)) return nullptr;
  std::unique_lock lock(mutex_);
  auto& known = imports_[rank];
  auto found = known.find(memory.windowId);
  for (const Deadline deadline = Deadline::afterMs(kWindowMessageMs); found == known.end();) {
    mesh_->drain(rank);
    found = known.find(memory.windowId);
    if (found != known.end()) break;
    if (headers_[config_.rank]->alarm.load(std::memory_order_acquire) != 0)
      alarmed([&](int peer) { return peer == rank; });
    look(lock);
    if (deadline.passed()) {
      fail(Code::internalError, names_[rank] + " told of window " + std::to_string(memory.windowId) +
                                    " but has not passed it; was it freed during the operation?");
    }
    mesh_->wait(10);
  }
  Import& import = found->second;
  if (memory.offset > import.memory.bytes() || memory.bytes > import.memory.bytes() - memory.offset) {
    fail(Code::internalError, names_[rank] + " told of bytes outside its window " + std::to_string(memory.windowId));
  }
  if (!import.populated) {
    import.memory.populate();
    import.populated = true;
  }
  return import.memory.data() + memory.offset;
}

transport::PostedLink& LocalFabric::link(int rank, int ofChannel, int path) {
  refuseChild("an operation");
  if (rank < 0 || rank >= config_.ranks || rank == config_.rank || ofChannel < 0 || ofChannel >= kChannels ||
      path < 0 || path >= topology_->paths()) {
    fail(Code::internalError, "no posted link to rank " + std::to_string(rank) + " on channel " +
                                  std::to_string(ofChannel) + ", path " + std::to_string(path));
  }
  if (byNetwork(rank)) return network_->link(rank, path * kChannels + ofChannel);
  // Rings are told apart by one number.
  const int channel = path * kChannels + ofChannel;
  std::lock_guard lock(mutex_);
  std::unique_ptr<transport::RingLink>& place = links_[rank][channel];
  if (!place) {
    place = std::make_unique<transport::RingLink>(
        config_.slotBytes, transport::RingLink::Ways{[this, rank, channel] { return openRing(rank, channel); },
                                                     [this, rank, channel] { return arrivedRing(rank, channel); },
                                                     [this, rank] { headers_[rank]->ring(); }});
  }
  return *place;
}

std::shared_ptr<transport::RingMemory> LocalFabric::openRing(int rank, int channel) {
  const std::size_t bytes = transport::RingMemory::bytesFor(config_.slots, config_.slotBytes);
  if (mesh_->sameProcess(rank)) {
    auto ring = std::make_shared<transport::RingMemory>(transport::SharedMemory::anonymous(bytes), config_.slots,
                                                        config_.slotBytes);
    {
      std::lock_guard lock(locals_[rank].inbox->mutex);
      locals_[rank].inbox->rings[{config_.rank, channel}] = ring;
    }
    headers_[rank]->mail.fetch_add(1, std::memory_order_seq_cst);
    return ring;
  }
  transport::SharedMemory memory = transport::SharedMemory::create("fusco-link", bytes);
  std::lock_guard lock(mutex_);
  mesh_->send(rank,
              MeshMessage{.kind = MeshMessage::ring,
                          .rank = config_.rank,
                          .id = static_cast<std::uint64_t>(channel),
                          .bytes = memory.bytes()},
              memory.descriptor());
  memory.forgetDescriptor();
  return std::make_shared<transport::RingMemory>(std::move(memory), config_.slots, config_.slotBytes);
}

// Asked whenever a link is polled: as long as no mail has come, one load.
std::shared_ptr<transport::RingMemory> LocalFabric::arrivedRing(int rank, int channel) {
  const std::uint32_t mail = headers_[config_.rank]->mail.load(std::memory_order_acquire);
  if (mail == 0) return nullptr;
  if (mailSeen_[rank][channel] == mail) return nullptr;
  {
    std::lock_guard lock(mutex_);
    mesh_->drain(rank);
  }
  mailSeen_[rank][channel] = mail;
  std::lock_guard lock(inbox_->mutex);
  auto found = inbox_->rings.find({rank, channel});
  return found == inbox_->rings.end() ? nullptr : found->second;
}

}  // namespace fusco::comm
