// A posted link over TCP: slices to and from one peer on one channel and lane, over one or more connected sockets
// (streams). Slices take the streams in turn and are put in order by their number. The receiver grants as many slots as
// there are; what it releases comes back as a credit, with a frame of its own or on the back of one that goes anyway.
//
// Whoever is awake in a call does the reading and writing (acquire, post, peek, release, drained); the reactor sends
// what the sockets did not take, and rings when something arrives while everybody sleeps.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "base/handle.h"
#include "transport/network_link.h"
#include "transport/tcp/reactor.h"
#include "transport/tcp/stream.h"

namespace fusco::transport {

using TcpLinkOptions = NetworkLinkOptions;

class TcpLink final : public NetworkLink, private Attended {
 public:
  TcpLink(Reactor& reactor, TcpLinkOptions options);
  // Without a farewell before it, gives what was posted at most a second to leave.
  ~TcpLink() override;

  // Options that belong to the link (non-blocking, no delay) are set here.
  void attach(int stream, UniqueFd socket) override;

  std::size_t slotBytes() const override { return options_.slotBytes; }
  std::byte* acquire() override;
  void post(std::size_t bytes) override;
  bool gathers() const override { return true; }
  void postRows(std::size_t headBytes, std::span<const Segment> rows) override;
  void abandon() override;
  const std::byte* peek() override;
  Arrival peekHead() override;
  bool receiveRows(std::span<const Segment> rows) override;
  void release() override;
  // The sockets have taken all that was posted.
  bool drained() override;
  // As the kernel counts it: the lane's time, not the time that slots and buffers took.
  Sent sent() override;
  // What leaves in some milliseconds at the speed that was last seen, if that is less than a slot.
  std::size_t sliceBytes() override;
  std::vector<Segment> slotMemory() const override;

  bool farewell(Deadline deadline) override;

  std::string failure() const override;

  // Bytes given to and taken from sockets, frames included.
  std::uint64_t bytesSent() const { return bytesSent_.load(std::memory_order_relaxed); }
  std::uint64_t bytesReceived() const { return bytesReceived_.load(std::memory_order_relaxed); }

 private:
  bool poke() override;
  void attend() override;
  void onReady(int number, std::uint32_t events);
  void arm(TcpStream& stream, std::uint32_t events);

  Sent sentSoFar() const;
  void queueSlice(std::size_t inSlot, std::size_t headBytes, std::span<const Segment> rows);
  void writeAll();
  bool write(TcpStream& stream);

  const std::byte* peekWhole();
  bool readAll(std::uint64_t until);
  bool step(TcpStream& stream);
  void beginFrame(TcpStream& stream);
  void nextFrame(TcpStream& stream);
  bool complete(std::uint64_t sequence) const;
  bool headHere(std::uint64_t sequence) const;
  bool available(std::uint64_t sequence) const;

  void lose(TcpStream& stream, const TcpMoved& moved);
  void fall(State state, const std::string& why);
  std::byte* slot(Mapping& memory, std::uint64_t sequence);

  Reactor& reactor_;
  const TcpLinkOptions options_;
  const int process_;
  mutable std::mutex mutex_;
  std::vector<TcpStream> streams_;
  int attachedStreams_ = 0;
  bool farewellSaid_ = false;
  bool openAsked_ = false;
  std::string failure_;

  // Sending. Numbers only grow; slice s lies in slot s modulo slots and travels by stream s modulo streams.
  Mapping outSlots_;
  std::vector<TcpOutgoing> outgoing_;  // by slot
  std::uint64_t posted_ = 0;
  std::uint64_t credited_ = 0;  // slices that the peer has released
  bool acquired_ = false;
  Sent paced_;  // up to here the speed is known
  std::size_t sliceBytes_;

  // Receiving.
  struct Incoming {
    std::uint64_t bytes = 0, headBytes = 0, got = 0;
    bool known = false;  // its frame has been read
  };
  Mapping inSlots_;
  std::vector<Incoming> incoming_;  // by slot
  std::vector<iovec> pieces_;
  std::uint64_t released_ = 0;
  std::uint64_t creditSaid_ = 0;   // of them, told to the peer
  std::uint64_t wholeWanted_ = 0;  // slices below this number are read into their slots
  bool heads_ = false;             // the engine asks for heads: payloads wait in the sockets
  bool scattered_ = false;         // the oldest slice's payload is on its way to its rows

  std::atomic<std::uint64_t> bytesSent_{0}, bytesReceived_{0};
};

}  // namespace fusco::transport
