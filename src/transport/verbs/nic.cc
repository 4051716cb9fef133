#include "transport/verbs/nic.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/clock.h"
#include "base/environment.h"
#include "base/log.h"
#include "base/status.h"
#include "transport/local/window.h"
#include "transport/verbs/link.h"

namespace fusco::transport {

namespace {

void makeNonBlocking(int descriptor) {
  const int flags = ::fcntl(descriptor, F_GETFL);
  if (flags < 0 || ::fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) != 0) failErrno("cannot set up a NIC's events");
}

std::string lockedMemoryLimit() {
  rlimit limit{};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  return limit.rlim_cur == RLIM_INFINITY ? "unlimited" : std::to_string(limit.rlim_cur >> 10) + " KiB";
}

}  // namespace

Nic::Nic(const VerbsLibrary& verbs, ibv_device* device, int port, const ibv_port_attr& attributes, const GidEntry& gid)
    : verbs_(verbs),
      device_(verbs.getDeviceName(device)),
      node_(device->dev_path),
      port_(port),
      attributes_(attributes),
      gid_(gid) {
  const auto give = [&](const char* what) {
    const int error = errno;
    const std::string text =
        "the RDMA device " + device_ + " gives no " + what + ": " + std::strerror(error) +
        (error == ENOMEM ? " (locked memory is limited to " + lockedMemoryLimit() + "; raise `ulimit -l`)" : "");
    close();
    fail(Code::systemError, text);
  };
  context_ = verbs_.openDevice(device);
  if (context_ == nullptr) give("context (look at the permissions of /dev/infiniband)");
  if (verbs_.queryDevice(context_, &limits_) != 0) give("attributes");
  domain_ = verbs_.allocPd(context_);
  if (domain_ == nullptr) give("protection domain");
  channel_ = verbs_.createCompChannel(context_);
  if (channel_ == nullptr) give("completion channel");
  makeNonBlocking(context_->async_fd);
  makeNonBlocking(channel_->fd);
}

Nic::~Nic() {
  if (reactor_ != nullptr) {
    reactor_->remove(channel_->fd);
    reactor_->remove(context_->async_fd);
    reactor_->cancel(lookTimer_);
    if (portTimer_ != 0) reactor_->cancel(portTimer_);
  }
  close();
}

void Nic::close() {
  for (const auto& [id, region] : regions_) {
    if (region != nullptr) verbs_.deregMr(region);
  }
  for (const auto& [address, one] : shared_) {
    if (one.region != nullptr) verbs_.deregMr(one.region);
  }
  if (channel_ != nullptr) verbs_.destroyCompChannel(channel_);
  if (domain_ != nullptr) verbs_.deallocPd(domain_);
  if (context_ != nullptr) verbs_.closeDevice(context_);
}

std::string Nic::address() const { return textOfGid(gid_.gid); }

ibv_mr* Nic::registerMemory(void* address, std::size_t bytes, int access) {
  ibv_mr* region = verbs_.regMr(domain_, address, bytes, access);
  if (region != nullptr) return region;
  const int error = errno;
  std::string text = "cannot register " + std::to_string((bytes + 1023) >> 10) + " KiB of memory with " + describe() +
                     ": " + std::strerror(error);
  if (error == ENOMEM || error == EPERM || error == EAGAIN) {
    text += "; locked memory is limited to " + lockedMemoryLimit() +
            " for this process: raise it (`ulimit -l unlimited`, or memlock in /etc/security/limits.conf, or "
            "LimitMEMLOCK of its service)";
  }
  fail(Code::systemError, text);
}

ibv_mr* Nic::registerGpu(GpuMemory& gpu, std::byte* address, std::size_t bytes, int access) {
  const GpuRegion made = registerGpuMemory(verbs_, domain_, gpu, address, bytes, access);
  if (made.region != nullptr) return made.region;
  fail(Code::systemError, "cannot register " + std::to_string((bytes + 1023) >> 10) + " KiB of " + gpu.name() +
                              " with " + describe() + ": " + made.why + "; FUSCO_IB_GPU_MEMORY=0 does without");
}

const ibv_mr* Nic::regionOf(const void* address, std::size_t bytes) {
  const std::shared_ptr<Window> window = findWindow(address, bytes);
  std::lock_guard lock(regionsMutex_);
  if (window) {
    const auto [found, fresh] = regions_.emplace(window->id, nullptr);
    if (fresh) found->second = registerWindow(window->memory.data(), window->memory.bytes());
    return found->second;
  }
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  auto found = shared_.upper_bound(at);
  if (found == shared_.begin()) return nullptr;
  --found;
  Shared& one = found->second;
  if (at + bytes > found->first + one.bytes) return nullptr;
  if (!one.tried) one.region = registerWindow(reinterpret_cast<void*>(found->first), one.bytes);
  one.tried = true;
  return one.region;
}

ibv_mr* Nic::registerWindow(void* address, std::size_t bytes) {
  const int access = environment().flag(Setting::ibPlaceRows) ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE : 0;
  try {
    return registerMemory(address, bytes, access);
  } catch (const Error& error) {
    FUSCO_WARN("rows of a window of {} bytes are packed, which is slower: {}", bytes, error.what());
    return nullptr;
  }
}

void Nic::knowShared(const void* address, std::size_t bytes) {
  std::lock_guard lock(regionsMutex_);
  shared_[reinterpret_cast<std::uintptr_t>(address)] = {bytes, false, nullptr};
}

void Nic::forgetShared(const void* address) {
  std::lock_guard lock(regionsMutex_);
  const auto found = shared_.find(reinterpret_cast<std::uintptr_t>(address));
  if (found == shared_.end()) return;
  if (found->second.region != nullptr) verbs_.deregMr(found->second.region);
  shared_.erase(found);
}

void Nic::forgetWindow(std::uint32_t id) {
  std::lock_guard lock(regionsMutex_);
  const auto found = regions_.find(id);
  if (found == regions_.end()) return;
  if (found->second != nullptr) verbs_.deregMr(found->second);
  regions_.erase(found);
}

// ---- events, on the reactor's thread

void Nic::serve(Reactor& reactor) {
  reactor_ = &reactor;
  reactor.add(channel_->fd, [this](std::uint32_t) { onCompletions(); });
  reactor.add(context_->async_fd, [this](std::uint32_t) { onAsync(); });
  reactor.arm(channel_->fd, EPOLLIN);
  reactor.arm(context_->async_fd, EPOLLIN);
  lookTimer_ = reactor.every(kLookMs, [this] { look(); });
}

void Nic::look() {
  // Not every driver tells its users; the kernel then waits for them to close it.
  if (!removed_ && seen_ && ::access(node_.c_str(), F_OK) != 0) {
    removed_ = true;
    failAll("cannot be reached any more: the device " + device_ +
            " of this rank has failed or was removed (the kernel has taken it away)");
  }
  std::lock_guard lock(mutex_);
  for (QueuePairLink* link : links_) link->look();
}

void Nic::enter(QueuePairLink* link) {
  std::lock_guard lock(mutex_);
  links_.insert(link);
}

void Nic::leave(QueuePairLink* link) {
  std::lock_guard lock(mutex_);
  links_.erase(link);
}

// A completion queue is destroyed only after its events have been acknowledged: until then the link is there.
void Nic::onCompletions() {
  ibv_cq* queue = nullptr;
  void* link = nullptr;
  while (verbs_.getCqEvent(channel_, &queue, &link) == 0) {
    static_cast<QueuePairLink*>(link)->onCompletionEvent();
    verbs_.ackCqEvents(queue, 1);
  }
  reactor_->arm(channel_->fd, EPOLLIN);
}

void Nic::onAsync() {
  ibv_async_event event{};
  while (verbs_.getAsyncEvent(context_, &event) == 0) {
    onEvent(event);
    verbs_.ackAsyncEvent(&event);
  }
  reactor_->arm(context_->async_fd, EPOLLIN);
}

void Nic::onEvent(const ibv_async_event& event) {
  const std::string text = verbs_.eventText(event.event_type);
  switch (event.event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_PATH_MIG_ERR: {
      auto* link = static_cast<QueuePairLink*>(event.element.qp->qp_context);
      return link->loseBy("lost its queue pair on " + describe() + " of this rank: " + text);
    }
    case IBV_EVENT_CQ_ERR: {
      auto* link = static_cast<QueuePairLink*>(event.element.cq->cq_context);
      return link->loseBy("lost its completion queue on " + describe() + " of this rank: " + text);
    }
    case IBV_EVENT_DEVICE_FATAL:
      return failAll("cannot be reached any more: the device " + device_ + " of this rank has failed or was removed (" +
                     text + ")");
    case IBV_EVENT_PORT_ERR:
      if (event.element.port_num != port_) return;
      FUSCO_WARN("{} is down ({}); links by it wait up to {} s for it to come back", describe(), text,
                 kPortPatienceMs / 1000);
      usable_ = false;
      if (portDownNs_ == 0) portDownNs_ = nowNs();
      if (portTimer_ == 0) portTimer_ = reactor_->every(500, [this] { lookAtPort(); });
      return;
    case IBV_EVENT_PORT_ACTIVE:
      if (event.element.port_num != port_ || usable_) return;
      FUSCO_WARN("{} is up again", describe());
      usable_ = true;
      portDownNs_ = 0;
      return;
    default:
      FUSCO_INFO(kLogNet, "{}: {}", describe(), text);
  }
}

void Nic::lookAtPort() {
  if (portDownNs_ != 0) {
    const std::int64_t down = nowNs() - portDownNs_;
    if (down < kPortMoveMs * 1'000'000) return;
    if (down < kPortPatienceMs * 1'000'000) {
      std::lock_guard lock(mutex_);
      for (QueuePairLink* link : links_)
        link->leaveBy("has no way over " + describe() + " of this rank, which is down");
      return;
    }
    failAll("cannot be reached any more: " + describe() + " of this rank has been down for " +
            std::to_string(kPortPatienceMs / 1000) + " s");
    portDownNs_ = 0;
  }
  reactor_->cancel(portTimer_);
  portTimer_ = 0;
}

void Nic::failAll(const std::string& why) {
  usable_ = false;
  FUSCO_WARN("links by {} go another way or end: the other rank {}", describe(), why);
  std::lock_guard lock(mutex_);
  for (QueuePairLink* link : links_) link->loseBy(why);
}

}  // namespace fusco::transport
