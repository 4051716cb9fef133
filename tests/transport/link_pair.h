// The two ends of a posted link in one process, without a fabric: a ring in shared memory, a pair of Unix sockets, or
// TCP through the loopback interface.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/futex.h"
#include "transport/local/ring.h"
#include "transport/tcp/link.h"

namespace fusco::transport::testing {

inline std::pair<UniqueFd, UniqueFd> unixPair() {
  int both[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, both) != 0) throw std::runtime_error("socketpair");
  return {UniqueFd(both[0]), UniqueFd(both[1])};
}

inline std::pair<UniqueFd, UniqueFd> tcpPair() {
  UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  auto* plain = reinterpret_cast<sockaddr*>(&address);
  if (::bind(listener.get(), plain, length) != 0 || ::listen(listener.get(), 1) != 0 ||
      ::getsockname(listener.get(), plain, &length) != 0)
    throw std::runtime_error("cannot listen on 127.0.0.1");
  UniqueFd one(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (::connect(one.get(), plain, length) != 0) throw std::runtime_error("cannot connect to 127.0.0.1");
  UniqueFd other(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!other) throw std::runtime_error("cannot accept on 127.0.0.1");
  return {std::move(one), std::move(other)};
}

// A bell for one end, and what a fabric does to wait for it.
struct Bell {
  std::atomic<std::uint32_t> word{0};
  void ring() {
    word.fetch_add(1);
    wakeWord(&word);
  }
};

struct LinkPair {
  virtual ~LinkPair() = default;
  PostedLink* ends[2] = {};
  Bell bells[2];
  std::unique_ptr<Reactor> reactors[2];  // none: a ring

  PostedLink& a() { return *ends[0]; }
  PostedLink& b() { return *ends[1]; }

  // Until `done` of one end holds, as an engine waits: look, and sleep on the bell that was read before. False: it took
  // more than ten seconds.
  bool await(int end, const std::function<bool()>& done) {
    const Deadline deadline = Deadline::afterMs(10000);
    for (;;) {
      const std::uint32_t seen = bells[end].word.load();
      if (done()) return true;
      if (deadline.passed()) return false;
      if (reactors[end]) {
        if (reactors[end]->poke()) continue;
        reactors[end]->attend();
      }
      waitOnWord(&bells[end].word, seen, Deadline::afterMs(5000));
    }
  }
};

struct RingPair final : LinkPair {
  RingPair(int slots, std::size_t slotBytes) {
    for (int i = 0; i < 2; ++i) {
      links[i] = std::make_unique<RingLink>(
          slotBytes, RingLink::Ways{[=, this] { return opened(i, make(slots, slotBytes)); },
                                    [=, this] { return arrived(i); }, [=, this] { bells[1 - i].ring(); }});
      ends[i] = links[i].get();
    }
  }
  static std::shared_ptr<RingMemory> make(int slots, std::size_t slotBytes) {
    return std::make_shared<RingMemory>(SharedMemory::anonymous(RingMemory::bytesFor(slots, slotBytes)), slots,
                                        slotBytes);
  }
  // Each end runs on a thread of its own, and one may look for the other's ring while that is being made.
  std::shared_ptr<RingMemory> opened(int end, std::shared_ptr<RingMemory> ring) {
    const std::lock_guard lock(announcing);
    return rings[end] = std::move(ring);
  }
  std::shared_ptr<RingMemory> arrived(int end) {
    const std::lock_guard lock(announcing);
    return rings[1 - end];
  }
  std::mutex announcing;
  std::shared_ptr<RingMemory> rings[2];
  std::unique_ptr<RingLink> links[2];
};

struct TcpPair final : LinkPair {
  TcpPair(int slots, std::size_t slotBytes, int streams, bool overTcp) {
    for (int i = 0; i < 2; ++i) {
      reactors[i] = std::make_unique<Reactor>();
      links[i] = std::make_unique<TcpLink>(*reactors[i], TcpLinkOptions{slotBytes, slots, streams, [this] { ++opened; },
                                                                        [=, this] { bells[i].ring(); }});
      ends[i] = links[i].get();
    }
    for (int s = 0; s < streams; ++s) {
      auto [one, other] = overTcp ? tcpPair() : unixPair();
      links[0]->attach(s, std::move(one));
      links[1]->attach(s, std::move(other));
    }
  }
  ~TcpPair() override {
    // Both at once, as ranks do: each waits a moment for the other to take what it has sent.
    std::thread other([this] { links[1].reset(); });
    links[0].reset();
    other.join();
  }
  TcpLink& link(int end) { return *links[end]; }
  int opened = 0;
  std::unique_ptr<TcpLink> links[2];
};

}  // namespace fusco::transport::testing
