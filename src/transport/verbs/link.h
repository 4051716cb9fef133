// A posted link over one reliable queue pair. Set up in two steps over the socket: both ends tell what the other needs
// to know (Greeting), bring their queue pair up, and say so. Slices then travel without the peer's processor.
//
// Whoever is awake in a call polls the completion queue; before everybody sleeps the NIC is asked for an event, on
// which the reactor rings.
//
// A queue pair that is lost is replaced by another one over other ports, where an end has any: the socket is still
// there, a slice stays in its slot until the peer has released it, and the peer tells which have arrived. The old queue
// pair of an end is gone before it tells that, so that nothing of it can come later. Only what the engine sees as time
// is lost.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/handle.h"
#include "transport/verbs/nic.h"
#include "transport/verbs/verbs.h"

namespace fusco::transport {

// What an end tells the other. Plain data, one version of the library at both ends.
struct Greeting {
  static constexpr std::uint64_t kMagic = 0x3442564f43535546;  // "FUSCOVB4"
  std::uint64_t magic = kMagic;
  std::uint64_t round = 0;     // counts the link's queue pairs
  std::uint64_t arrived = 0;   // slices, over all earlier ones
  std::uint64_t released = 0;  // of them
  std::uint32_t nic = 0;       // the sender's
  std::uint32_t nics = 0;      // that the sender has
  std::uint32_t wish = 0;      // the other's NIC, if it has no reason to take another one
  std::uint32_t boards = 0;    // behind its slots
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
  std::uint64_t mirror = 0;  // address of the payloads' slots in GPU memory; 0: they are in the slots
  std::uint32_t mirrorKey = 0;
  std::uint32_t unused = 0;
  char nicName[64] = {};
  char failure[256] = {};  // not empty: this end cannot, and why
};
static_assert(sizeof(Greeting) == 448);

// That its queue pair is up.
struct Ready {
  static constexpr std::uint64_t kMagic = 0x5055'4f43'5355'4656;
  std::uint64_t magic = kMagic;
  std::uint64_t round = 0;
};

// What the 32 immediate bits say: whether a slice has arrived, and how many slices this end has released so far.
struct Announcement {
  static constexpr std::uint32_t kSequence = 0x1fff;
  bool slice;
  bool places;             // with a slice: its rows are where they belong; else: a board has been written
  bool mirrored;           // its payload is in GPU memory
  std::uint32_t sequence;  // 13 bits, of the slice or the board
  std::uint32_t released;  // 16 bits
  std::uint32_t pack() const {
    return (slice ? 1u << 31 : 0u) | (places ? 1u << 30 : 0u) | (mirrored ? 1u << 29 : 0u) |
           (sequence & kSequence) << 16 | (released & 0xffff);
  }
  static Announcement unpack(std::uint32_t bits) {
    return {bits >> 31 != 0, (bits >> 30 & 1) != 0, (bits >> 29 & 1) != 0, bits >> 16 & kSequence, bits & 0xffff};
  }
};

// The memory that an end opens to the other, as it writes it behind the other's slots. There are some more boards than
// slots: an operation opens places once and brings a slice at least, so that one which is read is not written.
struct Board {
  static constexpr std::size_t kMostPieces = 128;
  struct Piece {
    std::uint64_t address;
    std::uint64_t bytes;
    std::uint32_t key;
    std::uint32_t unused;
  };
  std::uint64_t number;  // counts the boards of this end
  std::uint64_t tag;
  std::uint64_t count;
  Piece pieces[kMostPieces];
};
static_assert(sizeof(Board) == 3096);

class QueuePairLink final : public VerbsLink, private Attended {
 public:
  // `nics` are this rank's, and outlive the link; it begins with number `nic`, or the next one that works.
  // `gpu`: where payloads of slots lie; null: in the slots.
  QueuePairLink(Reactor& reactor, std::vector<Nic*> nics, int nic, NetworkLinkOptions options,
                std::shared_ptr<GpuMemory> gpu = nullptr);
  // Gives what was posted at most a second to arrive.
  ~QueuePairLink() override;

  void attach(int stream, UniqueFd socket) override;
  std::string failure() const override;
  Counts counts() const override;
  int moves() const override;
  void breakQueuePair() override;
  void spoilKey() override;

  std::size_t slotBytes() const override { return options_.slotBytes; }
  std::byte* acquire() override;
  void post(std::size_t bytes) override;
  bool gathers() const override { return sges_ > 1; }
  void postRows(std::size_t headBytes, std::span<const Segment> rows) override;
  bool opensPlaces() const override { return boards_ > 0; }
  void openPlaces(std::uint64_t tag, std::span<const Segment> pieces) override;
  std::span<const std::uint64_t> placesOf(std::uint64_t tag) override;
  void postPlaced(std::size_t headBytes, std::span<const Segment> rows, std::span<const Target> targets) override;
  std::vector<Segment> slotMemory() const override;
  std::byte* mirrorOf(const std::byte* inSlot) override;
  void postMirrored(std::size_t headBytes, std::size_t bytes) override;
  const std::byte* arrivedMirror(const std::byte* inSlot) override;
  const std::byte* peek() override;
  Arrival peekHead() override;
  void release() override;
  // Of what was gathered: the slots are the link's own.
  bool drained() override;
  // By the completions of slices: that the peer's NIC has them. Stretches in which nobody looked count for nothing,
  // with what was completed in them.
  Sent sent() override;
  void abandon() override;

  // From the reactor's thread: the NIC's events.
  void onCompletionEvent();
  void loseBy(const std::string& why);
  // The port is down and may come back: only if there is another way.
  void leaveBy(const std::string& why);
  // Twice a second.
  void look();

 private:
  // Memory of slots, and its registration with the NIC.
  struct Slots {
    Mapping memory;
    ibv_mr* region = nullptr;
    std::byte* mirror = nullptr;  // GPU memory with the same slots, for payloads
    ibv_mr* mirrorRegion = nullptr;
  };
  // Of the queue pair of this round: we have greeted; the peer has, and ours is up; the peer's is.
  enum class Stage { none, greeted, up, open };

  bool poke() override;
  void attend() override;

  void makeQueuePair();
  void greet(const std::string& failure);
  void onSocket(std::uint32_t events);
  bool readSocket();
  void onMessage();
  void onGreeting(const Greeting& peer);
  void connect();
  void begin();
  void toInit();
  void toReceive(const Greeting& peer);
  void toSend();
  void modify(ibv_qp_attr& attributes, int mask, const char* step);
  void say(const void* bytes, std::size_t count);

  void enterNic(int nic);
  int livingNic(int first) const;
  bool mayMove() const;
  void lose(const std::string& why);
  void move();
  void change(int nic);
  void dropQueuePair();

  void prepare(Slots& slots, int access);
  bool prepared(const Slots& slots) const;
  void forget(Slots& slots);
  void free(Slots& slots);
  std::byte* mirrorOf(const Slots& slots, const std::byte* inSlot) const;
  std::byte* slot(const Slots& slots, std::uint64_t sequence) const;
  void postReceives(int count);
  void hand(std::size_t bytes);
  void send(std::uint64_t sequence);
  int layOut(std::uint64_t sequence);
  int layOutApart(std::uint64_t sequence, std::uint64_t toSlot);
  int layOutPlaced(std::uint64_t sequence);
  void fill(std::size_t headBytes, std::span<const Segment> rows, std::span<const Target> targets);
  Board* board(const Slots& slots, std::uint64_t number) const;
  void tellPlaces();
  void hearBoard(std::uint32_t number);
  const ibv_mr* regionOf(std::span<const Segment> rows);
  bool allSent();
  void awaitAnswer();
  bool roomFor(int requests) const;
  bool postRequests(ibv_send_wr* first, int count);
  void offerCredit();
  int poll();
  void meter(bool watched);
  void take(const ibv_wc& completion);
  void hear(Announcement said);
  void fall(State state, const std::string& why);
  std::string whereabouts() const;
  void report() const;
  void stop();

  Reactor& reactor_;
  const std::vector<Nic*> nics_;
  int nicNumber_ = 0;
  Nic* nic_ = nullptr;  // changes on the reactor's thread only
  const VerbsLibrary& verbs_;
  const NetworkLinkOptions options_;
  const std::shared_ptr<GpuMemory> gpu_;
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
  std::byte message_[sizeof(Greeting)];  // that comes in
  std::size_t messageGot_ = 0;

  // What the queue pair of this round was lost by, until the next one is made.
  std::string lost_;
  std::string lostFirst_;    // the same, for the error if none comes up
  std::int64_t lostNs_ = 0;  // since when; 0: one is up
  std::uint32_t wish_ = 0;   // the NIC that the other end is to take
  std::uint64_t moveTimer_ = 0;
  bool closing_ = false;

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
  // The slice in a slot: its bytes, and which of them lie where.
  struct Filled {
    std::size_t bytes = 0;
    std::size_t head = 0;      // in the slot
    std::size_t mirrored = 0;  // behind it, in the slot's half in GPU memory
    std::vector<Segment> rows;
    // Of rows that are written to their places: where in the peer's memory, by whose key. Of the round in which they
    // were posted: another one sends them by the ring.
    struct Place {
      std::uint64_t address;
      std::uint32_t key;
    };
    std::vector<Place> places;
    bool inSlot = false;  // the rows lie in the slot, behind the head
  };
  std::vector<Filled> filled_;       // by slot
  std::vector<ibv_sge> pieces_;      // of the slice that is sent
  std::vector<ibv_send_wr> writes_;  // the same
  int sges_ = 1;                     // pieces of a request; 1: nothing is gathered
  int mostOfSlice_ = 2;              // requests
  std::uint64_t lastGathered_ = 0;   // number of the last request of a slice with rows elsewhere
  std::uint64_t requests_ = 0;       // work requests posted
  std::uint64_t retired_ = 0;        // of them, known to be done
  std::uint64_t lastSlice_ = 0;      // number of the last request of a slice
  std::uint64_t lastSignalled_ = 0;
  std::uint64_t seenRetired_ = 0;
  std::int64_t silentNs_ = 0;  // since when nothing was acknowledged that should be, or later than that
  // Slices that are on their way: the number of the last request, and bytes.
  std::deque<std::pair<std::uint64_t, std::size_t>> flying_;
  std::int64_t seenNs_ = 0;  // until when it is known what has become of them
  std::int64_t busyNs_ = 0;  // since the last completion, if all of it was watched
  Sent sent_;

  // Receiving.
  Slots in_;
  std::uint64_t arrived_ = 0;
  std::uint64_t released_ = 0;
  std::uint64_t creditSaid_ = 0;  // of them, told to the peer
  enum class Payload : char { slot, placed, mirror };
  std::vector<Payload> payloads_;  // by slot: where the slice's is
  ArrivalFlush flush_;

  // Places. Boards are numbered from 1.
  int boards_ = 0;  // 0: rows are not placed
  std::uint64_t openTag_ = 0;
  std::vector<Segment> open_;
  bool untold_ = false;
  // Completions were taken since the last poke, by a call that wanted others, say: who waits for these must not sleep.
  bool taken_ = false;
  std::uint64_t boardsTold_ = 0;
  std::uint64_t boardsHeard_ = 0;
  std::uint64_t heardRound_ = 0;   // in which the latest was heard
  std::uint64_t sizesNumber_ = 0;  // the board that sizes_ is of
  std::vector<std::uint64_t> sizes_;
  Counts counts_;
};

}  // namespace fusco::transport
