#include "transport/verbs/nic.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/resource.h>

#include <cerrno>
#include <cstring>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
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
    : verbs_(verbs), device_(verbs.getDeviceName(device)), port_(port), attributes_(attributes), gid_(gid) {
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
    if (portTimer_ != 0) reactor_->cancel(portTimer_);
  }
  close();
}

void Nic::close() {
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

// ---- events, on the reactor's thread

void Nic::serve(Reactor& reactor) {
  reactor_ = &reactor;
  reactor.add(channel_->fd, [this](std::uint32_t) { onCompletions(); });
  reactor.add(context_->async_fd, [this](std::uint32_t) { onAsync(); });
  reactor.arm(channel_->fd, EPOLLIN);
  reactor.arm(context_->async_fd, EPOLLIN);
}

void Nic::enter(QueuePairLink* link) {
  std::lock_guard lock(mutex_);
  links_.insert(link);
  if (!broken_.empty()) link->fallBy(broken_);
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
      return link->fallBy("lost its queue pair on " + describe() + " of this rank: " + text);
    }
    case IBV_EVENT_CQ_ERR: {
      auto* link = static_cast<QueuePairLink*>(event.element.cq->cq_context);
      return link->fallBy("lost its completion queue on " + describe() + " of this rank: " + text);
    }
    case IBV_EVENT_DEVICE_FATAL:
      return failAll("cannot be reached any more: the device " + device_ + " of this rank has failed or was removed (" +
                     text + ")");
    case IBV_EVENT_PORT_ERR:
      if (event.element.port_num != port_) return;
      FUSCO_WARN("{} is down ({}); links by it wait up to {} s for it to come back", describe(), text,
                 kPortPatienceMs / 1000);
      if (portDownNs_ == 0) portDownNs_ = nowNs();
      if (portTimer_ == 0) portTimer_ = reactor_->every(500, [this] { lookAtPort(); });
      return;
    case IBV_EVENT_PORT_ACTIVE:
      if (event.element.port_num != port_ || portDownNs_ == 0) return;
      FUSCO_WARN("{} is up again", describe());
      portDownNs_ = 0;
      return;
    default:
      FUSCO_INFO(kLogNet, "{}: {}", describe(), text);
  }
}

void Nic::lookAtPort() {
  if (portDownNs_ != 0) {
    if (nowNs() - portDownNs_ < kPortPatienceMs * 1'000'000) return;
    failAll("cannot be reached any more: " + describe() + " of this rank has been down for " +
            std::to_string(kPortPatienceMs / 1000) + " s");
    portDownNs_ = 0;
  }
  reactor_->cancel(portTimer_);
  portTimer_ = 0;
}

void Nic::failAll(const std::string& why) {
  std::lock_guard lock(mutex_);
  broken_ = why;
  for (QueuePairLink* link : links_) link->fallBy(why);
}

}  // namespace fusco::transport
