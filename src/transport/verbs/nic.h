// An open port: its device, a protection domain, a completion channel, and the links that use it.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "transport/verbs/choice.h"
#include "transport/verbs/gpu_region.h"
#include "transport/verbs/library.h"
#include "transport/verbs/verbs.h"

namespace fusco::transport {

class QueuePairLink;

class Nic {
 public:
  Nic(const VerbsLibrary& verbs, ibv_device* device, int port, const ibv_port_attr& attributes, const GidEntry& gid);
  ~Nic();
  Nic(const Nic&) = delete;
  Nic& operator=(const Nic&) = delete;

  const VerbsLibrary& verbs() const { return verbs_; }
  std::string describe() const { return device_ + " port " + std::to_string(port_); }
  const std::string& device() const { return device_; }
  std::string address() const;  // its GID
  int port() const { return port_; }
  bool infiniband() const { return attributes_.link_layer == IBV_LINK_LAYER_INFINIBAND; }
  const ibv_port_attr& attributes() const { return attributes_; }
  const GidEntry& gid() const { return gid_; }
  ibv_context* context() const { return context_; }
  ibv_pd* domain() const { return domain_; }
  ibv_comp_channel* channel() const { return channel_; }
  const ibv_device_attr& limits() const { return limits_; }

  // The device is there and the port is up, as far as is known.
  bool usable() const { return usable_.load(std::memory_order_relaxed); }

  // Registers memory for this NIC, for `access` by IBV_ACCESS_*. Throws Error(systemError) that names the limit.
  ibv_mr* registerMemory(void* address, std::size_t bytes, int access);

  // The same of GPU memory. Throws Error(systemError) that tells of both ways.
  ibv_mr* registerGpu(GpuMemory& gpu, std::byte* address, std::size_t bytes, int access);

  // The registration of the window in which all of [address, address + bytes) lies, for reading by this NIC, and for
  // writing by peers' if rows are to be placed: made when it is first asked for, kept until the window is forgotten.
  // Null for other memory, whose pages may become others' behind the same addresses, and where not as much can be
  // locked.
  const ibv_mr* regionOf(const void* address, std::size_t bytes);
  void forgetWindow(std::uint32_t id);
  // The same of a window of another rank of the node, which lies at these addresses here as long as it is known.
  void knowShared(const void* address, std::size_t bytes);
  void forgetShared(const void* address);

  void serve(Reactor& reactor);
  void enter(QueuePairLink* link);
  void leave(QueuePairLink* link);

 private:
  // A port may come back as long as the queue pairs try; what can go another way waits less.
  static constexpr std::int64_t kPortPatienceMs = 8000;
  static constexpr std::int64_t kPortMoveMs = 1000;
  static constexpr std::int64_t kLookMs = 500;

  void close();
  ibv_mr* registerWindow(void* address, std::size_t bytes);
  void onCompletions();
  void onAsync();
  void onEvent(const ibv_async_event& event);
  void look();
  void lookAtPort();
  void failAll(const std::string& why);

  const VerbsLibrary& verbs_;
  const std::string device_;
  const std::string node_;  // its file in sysfs, which is gone as soon as the device is
  const int port_;
  ibv_port_attr attributes_;
  const GidEntry gid_;
  ibv_device_attr limits_{};
  ibv_context* context_ = nullptr;
  ibv_pd* domain_ = nullptr;
  ibv_comp_channel* channel_ = nullptr;
  Reactor* reactor_ = nullptr;
  std::mutex regionsMutex_;
  std::map<std::uint32_t, ibv_mr*> regions_;  // by window; null: could not be registered
  struct Shared {
    std::size_t bytes = 0;
    bool tried = false;
    ibv_mr* region = nullptr;
  };
  std::map<std::uintptr_t, Shared> shared_;  // by where it begins
  std::mutex mutex_;
  std::set<QueuePairLink*> links_;
  std::atomic<bool> usable_{true};
  std::uint64_t lookTimer_ = 0;
  const bool seen_ = ::access(node_.c_str(), F_OK) == 0;  // containers may hide it
  bool removed_ = false;                                  // reactor's thread only
  std::int64_t portDownNs_ = 0;                           // reactor's thread only
  std::atomic<std::uint64_t> portTimer_{0};
};

}  // namespace fusco::transport
