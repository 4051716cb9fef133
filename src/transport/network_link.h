// A posted link to a rank on another node, set up over connected sockets that the fabric makes on first use.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <string>

#include "base/clock.h"
#include "base/handle.h"
#include "transport/transport.h"

namespace fusco::transport {

struct NetworkLinkOptions {
  std::size_t slotBytes = 0;  // the same at both ends
  int slots = 1;              // the same at both ends
  int streams = 1;            // sockets; the same at both ends
  // Called once, by the first acquire() of a link that has no sockets yet: brings about attach(), soon or later. Must
  // not wait.
  std::function<void()> open;
  // Something has arrived, a credit has come back, or the link has broken. From any thread.
  std::function<void()> ringBell;
};

class NetworkLink : public PostedLink {
 public:
  // A connected stream socket, authenticated by both sides, as number `stream` of the link at both ends. Slices move
  // once all streams are there. From any thread.
  virtual void attach(int stream, UniqueFd socket) = 0;
  // Slices can be acquired, credits permitting.
  bool attached() const { return attached_.load(std::memory_order_acquire); }

  // What has become of the connection; after `open` it never changes back. Nothing can be acquired then, and what had
  // arrived can still be taken.
  enum class State { open, closed, failed };
  State state() const { return state_.load(std::memory_order_acquire); }
  // "closed its connection", "connection reset by peer", ...: to be put behind the peer's name.
  virtual std::string failure() const = 0;

  // Before the end: sees to it that the peer's kernel has all that was posted. True when it has, or cannot get it any
  // more; false at the deadline, then call again. So that many links together take as long as one.
  virtual bool farewell(Deadline) { return true; }

  // Memory held for slots.
  std::size_t bytesMade() const { return madeBytes_.load(std::memory_order_relaxed); }

 protected:
  std::atomic<bool> attached_{false};
  std::atomic<State> state_{State::open};
  std::atomic<std::size_t> madeBytes_{0};
};

}  // namespace fusco::transport
