// What the engine knows of the ways to a peer. A mapped link yields an address, nothing else. A posted link takes
// slices and later completes. Transports know no plan and no operation: they carry bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fusco::transport {

// A piece of a rank's memory, told to peers by value. Plain data: it is written into control memory.
struct MemoryRef {
  enum Kind : std::uint32_t { none = 0, privateMemory = 1, window = 2 };
  std::uint32_t kind = none;
  std::uint32_t windowId = 0;  // of the owning process; window only
  std::uint64_t offset = 0;    // in the window
  std::uint64_t address = 0;   // in the owner's address space
  std::uint64_t bytes = 0;
};
static_assert(sizeof(MemoryRef) == 32);

// The head of every slice: on the wire, in a ring slot that a kernel fills, and in what a proxy reads. A slice
// describes itself: behind the header lie `rows` + 1 plan::Copy, `entries` plan::Entry, `entries` float weights, then
// the payload at payloadOffset (a multiple of 64), rows of rowBytes each, in the order of the copies.
struct SliceHeader {
  std::uint64_t signature;  // of the operation's parameters: ranks that disagree find out here
  std::uint64_t operation;  // counts the operations of the communicator's channel
  std::uint32_t kind;       // engine/slice.h
  std::uint32_t flags;      // engine/slice.h: last slice of the operation, ...
  std::uint32_t rows;
  std::uint32_t entries;
  std::uint64_t payloadOffset;
  std::uint64_t rowBytes;   // bytes of each row part in this slice
  std::uint64_t rowOffset;  // where in its row a part lies (rows longer than a slice travel in parts)
  std::uint32_t reserved;
  std::int32_t source;  // rank that posted it
};
static_assert(sizeof(SliceHeader) == 64);

// A piece of a list of memory: for process_vm_readv/writev, writev and readv.
struct Segment {
  void* address;
  std::size_t bytes;
};

// One direction pair of slices to one peer on one channel. Not thread-safe: the engine's progress lock covers it.
class PostedLink {
 public:
  virtual ~PostedLink() = default;
  virtual std::size_t slotBytes() const = 0;  // header included
  // Sending: memory for the next slice, or null without a credit. The same slot until post().
  virtual std::byte* acquire() = 0;
  virtual void post(std::size_t bytes) = 0;  // hands the acquired slot over and wakes the peer
  // Receiving: the oldest slice that has arrived and was not released, or null.
  virtual const std::byte* peek() = 0;
  virtual void release() = 0;  // gives the credit back
  // All that was posted has left this rank's memory.
  virtual bool drained() = 0;
  // What slots lie in, as far as there is any yet: for whoever copies to and from there by other means than the CPU.
  virtual std::vector<Segment> slotMemory() const { return {}; }

  // Links that copy anyway can take payload from where it lies, and bring it to where it belongs.
  virtual bool gathers() const { return false; }
  // As post(), where the acquired slot holds only the first `headBytes` of the slice; the rest follows from `rows`,
  // which must stay as they are until drained().
  virtual void postRows(std::size_t headBytes, std::span<const Segment> rows);
  // Links that write into the peer's memory can bring rows to where they belong, past the ring. The receiver opens
  // pieces of its memory to the sender under a tag (of the operation: no two in a row are the same), as many as the
  // sender expects, empty ones where it has none. What the sender wrote under a tag has been taken when the receiver
  // opens others, or abandons the link.
  virtual bool opensPlaces() const { return false; }
  virtual void openPlaces(std::uint64_t tag, std::span<const Segment> pieces);
  // Sending: the sizes of the pieces that the peer has opened under this tag; empty as long as it is not known to.
  virtual std::span<const std::uint64_t> placesOf(std::uint64_t) { return {}; }
  struct Target {
    std::uint32_t piece;
    std::uint64_t offset;
  };
  // As postRows(), but each of the rows is written to its target; the peer's slot gets the head only, and its
  // peekHead() says that the rows are placed. Right after placesOf() has named the pieces.
  virtual void postPlaced(std::size_t headBytes, std::span<const Segment> rows, std::span<const Target> targets);

  // What has left by this link and been acknowledged by the peer's end, and for how long something was on its way while
  // the peer had room for it. Zero where the medium does not tell.
  struct Sent {
    std::uint64_t bytes = 0;
    std::int64_t busyNs = 0;
  };
  virtual Sent sent() { return {}; }
  // How many bytes a slice should have at most that is cut from now on: slotBytes(), or less where the link is so slow
  // that full slots would hold much of what an operation sends, and of what the network can queue.
  virtual std::size_t sliceBytes() { return slotBytes(); }

  // Links whose slots have a second half in GPU memory, at the same offsets: there payload goes from and to the NIC,
  // while heads stay where the host reads them. Sending: where what belongs to this address of the acquired slot is put
  // instead, null: it has no such half. Then all behind the first `headBytes` is taken from there.
  virtual std::byte* mirrorOf(const std::byte* /*inSlot*/) { return nullptr; }
  virtual void postMirrored(std::size_t headBytes, std::size_t bytes);
  // Receiving, of the slice that peek() shows: where what belongs to this address has arrived in GPU memory, and can be
  // read by the GPU from now on; null: it is in the slot.
  virtual const std::byte* arrivedMirror(const std::byte* /*inSlot*/) { return nullptr; }

  // After a failure: rows that have not left are not looked at any more. The link is of no use then.
  virtual void abandon() {}
  // As peek(), but of a slice that was sent by postRows() the head is enough: then `whole` is false, and the payload is
  // fetched by receiveRows(), called with the same list (of as many bytes as were sent) until it returns true; or, if
  // peek() is asked instead from then on, into the slot.
  struct Arrival {
    const std::byte* slot = nullptr;
    bool whole = false;
    bool placed = false;  // there is no payload: its rows are where they belong
  };
  virtual Arrival peekHead() {
    const std::byte* slot = peek();
    return {slot, slot != nullptr};
  }
  virtual bool receiveRows(std::span<const Segment> rows);
};

}  // namespace fusco::transport
