// The side table: what libfusco knows about each ncclComm_t. The user holds the real handle (in host mode a number), so
// that nothing is wrapped; a handle that is not in the table is passed on.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "plugin/nccl/decision.h"

namespace fusco::nccl {

enum class State : int { starting, ready, failed, revoked, finalized };

// What an ncclConfig_t says, as far as it concerns libfusco.
struct Wishes {
  bool blocking = true;
  bool carry = false;   // by its name, whatever FUSCO_CARRY says
  std::string refused;  // why FUSCO must not carry, "" if it may
};

struct Communicator {
  ncclComm_t handle = nullptr;
  std::uint64_t generation = 0;
  int rank = 0, ranks = 0, device = 0;
  Wishes wishes;

  std::atomic<State> state{State::starting};
  std::atomic<bool> cancelled{false};  // by an abort, also while it starts
  bool carried = false;                // these five: before state is ready
  bool captures = false;               // captured calls too
  fuscoComm_t engine = nullptr;
  std::string reason;  // why it is not carried
  Tag tag;             // invalid: made without one

  std::mutex calls;  // one thread at a time drives the engine

  // Children are made at places that the parent's tag and this count lead to.
  std::mutex childMutex;
  std::map<std::uint64_t, std::uint64_t> children;
  // Device mode: children that were not there yet when the real library's call returned. Each says whether it is done.
  std::vector<std::function<bool()>> unfinished;

  // Device mode: held to become ready and to end, and while another thread asks the real library about the handle.
  std::mutex endMutex;

  std::mutex errorMutex;
  ncclResult_t error = ncclSuccess;  // that it failed with
  std::string errorText;

  std::atomic<std::uint64_t> carriedCalls{0}, carriedBytes{0}, passedCalls{0}, collectives{0};

  void fail(ncclResult_t code, const std::string& text);
  ~Communicator();
};

// Keeps what it refers to alive.
class CommunicatorRef {
 public:
  struct Entry;
  CommunicatorRef() = default;
  explicit CommunicatorRef(Entry* entry) : entry_(entry) {}  // takes over a count
  CommunicatorRef(const CommunicatorRef& other);
  CommunicatorRef(CommunicatorRef&& other) noexcept : entry_(std::exchange(other.entry_, nullptr)) {}
  CommunicatorRef& operator=(CommunicatorRef other) noexcept {
    std::swap(entry_, other.entry_);
    return *this;
  }
  ~CommunicatorRef();
  explicit operator bool() const { return entry_ != nullptr; }
  Communicator* operator->() const { return get(); }
  Communicator& operator*() const { return *get(); }
  Communicator* get() const;
  bool operator==(const CommunicatorRef& other) const { return entry_ == other.entry_; }

 private:
  Entry* entry_ = nullptr;
};

// Enters a communicator under its handle. With a null handle it gets a number of its own (host mode).
CommunicatorRef enter(ncclComm_t handle, std::unique_ptr<Communicator> communicator);
// Takes no lock. Empty when the handle is not known.
CommunicatorRef findCommunicator(ncclComm_t handle);
// Takes it out; who holds it may go on.
CommunicatorRef takeOut(ncclComm_t handle);

// For FUSCO_STATS=1: what a communicator did is printed at exit, by its counters at its end or at that moment.
void beginStatistics(const Communicator& communicator);
void endStatistics(const Communicator& communicator);

}  // namespace fusco::nccl
