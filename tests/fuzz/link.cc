// What comes by a link between nodes: frames, credits, slices. The peer holds the key, but may run another version or
// have damaged memory. An input is the link's shape, then pieces as they come from the socket.
#include "transport/tcp/link.h"

#include <sys/socket.h>

#include <memory>

#include "base/status.h"
#include "engine/slice.h"
#include "fuzz/fuzz.h"

using namespace fusco;

namespace {

constexpr std::size_t kSlotBytes = 1024;

transport::Reactor& reactor() {
  static auto* const instance = new transport::Reactor;
  return *instance;
}

// Reads all of a slice as the engine does, from memory of exactly its size.
engine::Slice readAll(const std::byte* slot, std::size_t bytes, std::unique_ptr<std::byte[]>& copy) {
  copy = std::make_unique<std::byte[]>(bytes);
  std::memcpy(copy.get(), slot, bytes);
  return engine::readSlice(copy.get(), bytes);
}

std::size_t sum(const engine::Slice& slice) {
  std::size_t total = 0;
  const transport::SliceHeader& head = *slice.header;
  for (std::uint32_t row = 0; row < head.rows; ++row) {
    for (std::uint32_t e = slice.copies[row].firstEntry; e < slice.copies[row + 1].firstEntry; ++e)
      total += slice.entries[e].row + static_cast<std::size_t>(slice.weights[e] != 0);
    const std::byte* bytes = slice.payload + row * engine::sliceRowStride(head.rowBytes);
    for (std::size_t i = 0; i < head.rowBytes; ++i) total += static_cast<std::size_t>(bytes[i]);
  }
  return total;
}

// Takes what is there; false when nothing more is.
bool takeOne(transport::TcpLink& link, bool heads) {
  std::unique_ptr<std::byte[]> copy;
  if (!heads) {
    const std::byte* slot = link.peek();
    if (slot == nullptr) return false;
    sum(readAll(slot, kSlotBytes, copy));
    link.release();
    return true;
  }
  const transport::PostedLink::Arrival arrival = link.peekHead();
  if (arrival.slot == nullptr) return false;
  const engine::Slice slice = readAll(arrival.slot, kSlotBytes, copy);
  if (arrival.whole) {
    sum(slice);
    link.release();
    return true;
  }
  std::vector<std::unique_ptr<std::byte[]>> rows;
  std::vector<transport::Segment> segments;
  const std::size_t rowBytes = slice.header->rowBytes;
  for (std::uint32_t row = 0; row < slice.header->rows; ++row) {
    rows.push_back(std::make_unique<std::byte[]>(rowBytes));
    segments.push_back({rows.back().get(), rowBytes});
  }
  if (!link.receiveRows(segments)) return false;
  link.release();
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0) return 0;
  UniqueFd peer(ends[1]);
  const std::uint8_t shape = input.byte();
  transport::TcpLink link(reactor(), {kSlotBytes, 1 + shape % 3, 1, {}, [] {}});
  link.attach(0, UniqueFd(ends[0]));
  const bool heads = (shape & 4) != 0;
  const bool sends = (shape & 8) != 0;
  std::uint64_t posted = 0;
  try {
    while (!input.empty()) {
      const std::string_view piece = input.piece();
      if (!piece.empty() && ::send(peer.get(), piece.data(), piece.size(), MSG_NOSIGNAL) < 0) break;
      while (takeOne(link, heads)) {
      }
      if (sends && link.acquire() != nullptr) {
        link.post(64);
        fuzz::require(++posted < 4096, "credit without end");
      }
    }
    ::shutdown(peer.get(), SHUT_WR);
    while (takeOne(link, heads)) {
    }
  } catch (const Error& error) {
    fuzz::require(error.what()[0] != 0, "an error without a text");
  }
  // With the peer gone, the link's end waits for nobody.
  peer.reset();
  return 0;
}

std::vector<std::string> fuzz::seeds() {
  std::vector<std::string> all;
  for (const bool gathered : {false, true}) {
    std::string wire;
    for (std::uint64_t sequence = 0; sequence < 2; ++sequence) {
      std::vector<std::byte> slot(kSlotBytes);
      engine::Slice slice = engine::layOutSlice(slot.data(), engine::SliceKind::rows, 2, 3, 64);
      slice.copies[0] = {0, 0};
      slice.copies[1] = {1, 2};
      slice.copies[2] = {0, 3};
      for (int e = 0; e < 3; ++e) slice.entries[e] = {0, 0, static_cast<std::uint32_t>(e)};
      const std::size_t bytes = engine::sliceBytes(2, 3, 64);
      transport::TcpFrame frame{transport::TcpFrame::kSlice,
                                gathered ? static_cast<std::uint32_t>(slice.header->payloadOffset) : 0, sequence, bytes,
                                0};
      wire.append(reinterpret_cast<const char*>(&frame), sizeof(frame));
      wire.append(reinterpret_cast<const char*>(slot.data()), bytes);
    }
    const transport::TcpFrame credit{transport::TcpFrame::kCredit, 0, 0, 0, 1};
    for (const char shape : {1, 2, 5, 6, 13}) {
      std::string seed(1, shape);
      for (std::size_t at = 0; at < wire.size(); at += 700) seed += fuzz::pieceOf(wire.substr(at, 700));
      if ((shape & 8) != 0) seed += fuzz::pieceOf({reinterpret_cast<const char*>(&credit), sizeof(credit)});
      all.push_back(seed);
    }
  }
  return all;
}
