// One connected socket of a link: what is on its way out, and how far the frame that comes in has got.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "base/handle.h"
#include "transport/transport.h"

namespace fusco::transport {

// In front of every slice, and alone where only a credit goes. Both ends have the same byte order (the bootstrap sees
// to that).
struct TcpFrame {
  static constexpr std::uint32_t kSlice = 0x31534346;   // "FCS1"
  static constexpr std::uint32_t kCredit = 0x31434346;  // "FCC1"

  std::uint32_t kind = kCredit;
  std::uint32_t headBytes = 0;  // the payload behind them may be scattered; 0: a slice in one piece
  std::uint64_t sequence = 0;   // of the slice
  std::uint64_t bytes = 0;      // that follow
  std::uint64_t released = 0;   // slices of the other direction that the sender of this frame has released
};
static_assert(sizeof(TcpFrame) == 32);

// A frame and what follows it, in pieces.
class TcpOutgoing {
 public:
  // The pieces' memory must stay until finished().
  void begin(const TcpFrame& frame);
  void add(const void* address, std::size_t bytes);
  TcpFrame& frame() { return frame_; }
  bool started() const { return at_ > 0 || partly_; }
  bool finished() const { return at_ == pieces_.size(); }
  std::span<iovec> left() { return {pieces_.data() + at_, pieces_.size() - at_}; }
  void advance(std::size_t bytes);

 private:
  TcpFrame frame_;
  std::vector<iovec> pieces_;
  std::size_t at_ = 0;
  bool partly_ = false;
};

// What one call on a socket has moved; `error` is errno, or 0. End of file when nothing moved and nothing is wrong.
struct TcpMoved {
  std::size_t bytes = 0;
  int error = 0;
  bool again() const;
  bool end() const { return bytes == 0 && error == 0; }
};

// Neither waits nor raises a signal. Lists longer than the kernel takes are moved in part.
TcpMoved sendPieces(int socket, std::span<iovec> pieces);
TcpMoved receiveBytes(int socket, void* to, std::size_t bytes);
TcpMoved receivePieces(int socket, std::span<iovec> pieces);

// What the peer's kernel has acknowledged of a socket's bytes, and for how long some were on their way while it had
// room for them. Zero where the kernel does not tell.
struct TcpSent {
  std::uint64_t bytes = 0;
  std::int64_t busyNs = 0;
};
TcpSent sentBy(int socket);

struct TcpStream {
  UniqueFd socket;
  std::deque<TcpOutgoing*> queue;  // begins with the one that is under way
  TcpOutgoing credit;
  TcpFrame frame;  // that comes in
  std::size_t frameGot = 0;
  std::uint64_t nextIn = 0;  // number of the next slice that comes by this stream
  std::uint32_t armed = 0;   // what the reactor was asked for
  bool ended = false;        // nothing more can be read
  bool shut = false;         // all was written, and the end announced
};

}  // namespace fusco::transport
