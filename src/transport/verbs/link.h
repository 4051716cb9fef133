// A posted link over one reliable queue pair. Set up in two steps over the socket: both ends tell what the other needs
// to know (Greeting), bring their queue pair up, and say so. Slices then travel without the peer's processor.
//
// Whoever is awake in a call polls the completion queue; before everybody sleeps the NIC is asked for an event, on
// which the reactor rings.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "base/handle.h"
#include "transport/verbs/nic.h"
#include "transport/verbs/verbs.h"

namespace fusco::transport {

// What an end tells the other. Plain data, one version of the library at both ends.
struct Greeting {
  static constexpr std::uint64_t kMagic = 0x3142564f43535546;  // "FUSCOVB1"
  std::uint64_t magic = kMagic;
  std::uint8_t gid[16] = {};
  std::uint32_t queuePair = 0;
  std::uint32_t packet = 0;  // number of the first one
  std::uint32_t localId = 0;
  std::uint32_t mtu = 0;
  std::uint32_t infiniband = 0;
  std::uint32_t key = 0;      // of the slots
  std::uint64_t address = 0;  // of the slots
  std::uint64_t slotBytes = 0;
  std::uint64_t slots = 0;
  char nic[64] = {};
  char failure[256] = {};  // not empty: this end cannot, and why
};
static_assert(sizeof(Greeting) == 392);

// What the 32 immediate bits say: whether a slice has arrived, and how many slices this end has released so far.
struct Announcement {
  bool slice;
  std::uint32_t sequence;  // 15 bits
  std::uint32_t released;  // 16 bits
  std::uint32_t pack() const { return (slice ? 1u << 31 : 0u) | (sequence & 0x7fff) << 16 | (released & 0xffff); }
  static Announcement unpack(std::uint32_t bits) { return {bits >> 31 != 0, bits >> 16 & 0x7fff, bits & 0xffff}; }
};

class QueuePairLink final : public VerbsLink, private Attended {
 public:
  QueuePairLink(Reactor& reactor, Nic& nic, NetworkLinkOptions options);
  // Gives what was posted at most a second to arrive.
  ~QueuePairLink() override;

  void attach(int stream, UniqueFd socket) override;
  std::string failure() const override;
  Counts counts() const override;
  void breakQueuePair() override;

  std::size_t slotBytes() const override { return options_.slotBytes; }
  std::byte* acquire() override;
  void post(std::size_t bytes) override;
  const std::byte* peek() override;
  void release() override;
  // The peer's NIC has taken all that was posted.
  bool drained() override;
  void abandon() override;

  // From the reactor's thread: the NIC's events.
  void onCompletionEvent();
  void fallBy(const std::string& why);

 private:
  // A part of memory that the NIC may use.
  struct Slots {
    Mapping memory;
    ibv_mr* region = nullptr;
  };
  enum class Stage { none, greeted, up, open };  // the socket; the peer's greeting and our queue pair; the peer's

  bool poke() override;
  void attend() override;

  void makeQueuePair();
  void greet(const std::string& failure);
  void onSocket(std::uint32_t events);
  bool readSocket();
  void connect();
  void toInit();
  void toReceive(const Greeting& peer);
  void toSend();
  void modify(ibv_qp_attr& attributes, int mask, const char* step);
  void say(const void* bytes, std::size_t count);

  Slots makeSlots(int access);
  void giveBack(Slots& slots);
  std::byte* slot(const Slots& slots, std::uint64_t sequence) const;
  void postReceives(int count);
  bool roomFor(int requests) const;
  bool postRequests(ibv_send_wr* first, int count);
  void offerCredit();
  int poll();
  void take(const ibv_wc& completion);
  void hear(Announcement said);
  void fall(State state, const std::string& why);
  std::string whereabouts() const;
  void report() const;
  void stop();

  Reactor& reactor_;
  Nic& nic_;
  const VerbsLibrary& verbs_;
  const NetworkLinkOptions options_;
  const int process_;
  const std::size_t stride_;
  mutable std::mutex mutex_;
  UniqueFd socket_;
  Stage stage_ = Stage::none;
  bool openAsked_ = false;
  bool socketEnded_ = false;
  std::string failure_;
  Greeting own_;
  Greeting peer_;
  std::size_t peerGot_ = 0;  // bytes of the peer's greeting, then of its word that it is up

  ibv_cq* queue_ = nullptr;
  ibv_qp* pair_ = nullptr;
  int mostSends_ = 0;
  int mostReceives_ = 0;
  bool notified_ = false;  // the NIC was asked for an event and has not raised it

  // Sending. Numbers only grow; slice s lies in slot s modulo slots, at both ends.
  Slots out_;
  std::uint64_t posted_ = 0;
  std::uint64_t credited_ = 0;  // slices that the peer has released
  bool acquired_ = false;
  std::uint64_t requests_ = 0;   // work requests posted
  std::uint64_t retired_ = 0;    // of them, known to be done
  std::uint64_t lastSlice_ = 0;  // number of the last request of a slice
  std::uint64_t lastSignalled_ = 0;

  // Receiving.
  Slots in_;
  std::uint64_t arrived_ = 0;
  std::uint64_t released_ = 0;
  std::uint64_t creditSaid_ = 0;  // of them, told to the peer
  Counts counts_;
};

}  // namespace fusco::transport
