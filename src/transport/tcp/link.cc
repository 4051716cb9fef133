#include "transport/tcp/link.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "base/clock.h"
#include "base/status.h"

namespace fusco::transport {

namespace {

constexpr std::int64_t kFarewellMs = 1000;

// Slices of a slow link leave in about this time. With four in flight for each of a few peers, a lane then has less
// under way than its queue holds, and the last slice of an operation is little of it (docs/results.md has the sweep).
constexpr std::int64_t kSliceTimeNs = 8'000'000;
constexpr std::size_t kLeastSliceBytes = 16 * 1024;
// A speed is taken from no less: kernels tell the time in steps of up to 10 ms.
constexpr std::int64_t kLeastPacedNs = 40'000'000;

std::string reasonOf(int error) { return std::generic_category().message(error); }

}  // namespace

TcpLink::TcpLink(Reactor& reactor, TcpLinkOptions options)
    : reactor_(reactor), options_(std::move(options)), process_(::getpid()), sliceBytes_(options_.slotBytes) {
  if (options_.slots < 1 || options_.streams < 1 || options_.slotBytes == 0)
    fail(Code::internalError, "a TCP link needs slots and streams");
  streams_ = std::vector<TcpStream>(static_cast<std::size_t>(options_.streams));
  for (std::size_t i = 0; i < streams_.size(); ++i) streams_[i].nextIn = i;
  outgoing_.resize(static_cast<std::size_t>(options_.slots));
  incoming_.resize(static_cast<std::size_t>(options_.slots));
  reactor_.join(this);
}

TcpLink::~TcpLink() {
  // In a child that was forked off only its own copies of the descriptors go.
  if (::getpid() != process_) return;
  reactor_.leave(this);
  for (TcpStream& stream : streams_) {
    if (stream.socket) reactor_.remove(stream.socket.get());
  }
  if (!farewellSaid_) farewell(Deadline::afterMs(kFarewellMs));
}

// A socket that is closed with something unread resets the connection, and takes along what the peer has not got yet.
// So the end is announced, and what still comes (credits) is read until the peer's kernel has everything.
bool TcpLink::farewell(Deadline deadline) {
  std::lock_guard lock(mutex_);
  farewellSaid_ = true;
  if (!attached() || state() == State::failed) return true;
  bool done = true;
  std::byte dropped[4096];
  for (TcpStream& stream : streams_) {
    const int socket = stream.socket.get();
    for (;;) {
      if (!stream.queue.empty() && !write(stream)) break;
      if (stream.queue.empty() && !stream.shut) {
        ::shutdown(socket, SHUT_WR);
        stream.shut = true;
      }
      TcpMoved moved;
      do moved = receiveBytes(socket, dropped, sizeof(dropped));
      while (moved.bytes > 0);
      int unsent = 0;
      const bool taken = stream.shut && (::ioctl(socket, SIOCOUTQ, &unsent) != 0 || unsent == 0);
      if (taken || !moved.again()) break;
      if (deadline.passed()) {
        done = false;
        break;
      }
      pollfd wanted{socket, static_cast<short>(stream.shut ? POLLIN : POLLIN | POLLOUT), 0};
      ::poll(&wanted, 1, std::min(deadline.leftMs(), 1));
    }
  }
  return done;
}

void TcpLink::attach(int number, UniqueFd socket) {
  {
    std::lock_guard lock(mutex_);
    TcpStream& stream = streams_.at(static_cast<std::size_t>(number));
    if (stream.socket) fail(Code::internalError, "stream " + std::to_string(number) + " of a TCP link came twice");
    const int flags = ::fcntl(socket.get(), F_GETFL);
    if (flags < 0 || ::fcntl(socket.get(), F_SETFL, flags | O_NONBLOCK) != 0) failErrno("cannot set up a socket");
    const int on = 1;
    // Not of TCP: a socket pair in tests.
    ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    reactor_.add(socket.get(), [this, number](std::uint32_t events) { onReady(number, events); });
    stream.socket = std::move(socket);
    if (++attachedStreams_ < options_.streams) return;
    attached_.store(true, std::memory_order_release);
  }
  options_.ringBell();
}

std::string TcpLink::failure() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

// Under the lock. What comes later on a broken connection follows from the first.
void TcpLink::fall(State state, const std::string& why) {
  if (state_.load(std::memory_order_relaxed) != State::open) return;
  failure_ = why;
  state_.store(state, std::memory_order_release);
  for (TcpStream& stream : streams_) stream.queue.clear();
  options_.ringBell();
}

std::byte* TcpLink::slot(Mapping& memory, std::uint64_t sequence) {
  const auto slots = static_cast<std::size_t>(options_.slots);
  const std::size_t stride = (options_.slotBytes + 63) / 64 * 64;
  if (!memory) {
    memory = Mapping::anonymous(slots * stride);
    madeBytes_.fetch_add(memory.size(), std::memory_order_relaxed);
  }
  return memory.bytes() + sequence % slots * stride;
}

// ---- sending

std::byte* TcpLink::acquire() {
  std::unique_lock lock(mutex_);
  if (!attached()) {
    const bool ask = !openAsked_ && options_.open;
    openAsked_ = true;
    lock.unlock();
    if (ask) options_.open();
    return nullptr;
  }
  writeAll();
  if (!acquired_) {
    const auto slots = static_cast<std::uint64_t>(options_.slots);
    if (posted_ - credited_ >= slots) readAll(released_);
    if (state() != State::open || posted_ - credited_ >= slots) return nullptr;
    acquired_ = true;
  }
  return slot(outSlots_, posted_);
}

void TcpLink::post(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  queueSlice(bytes, 0, {});
  // Nobody may come by again for long: the reactor sends the rest.
  for (TcpStream& stream : streams_) {
    if (!stream.queue.empty()) arm(stream, stream.armed | EPOLLOUT);
  }
}

void TcpLink::postRows(std::size_t headBytes, std::span<const Segment> rows) {
  std::lock_guard lock(mutex_);
  if (headBytes == 0) fail(Code::internalError, "a slice whose rows are gathered needs a head");
  queueSlice(headBytes, headBytes, rows);
}

void TcpLink::queueSlice(std::size_t inSlot, std::size_t headBytes, std::span<const Segment> rows) {
  if (!acquired_) fail(Code::internalError, "a slice was posted without a slot");
  std::size_t bytes = inSlot;
  for (const Segment& row : rows) bytes += row.bytes;
  if (bytes > options_.slotBytes) {
    fail(Code::internalError, "a slice of " + std::to_string(bytes) + " bytes was written to a slot of " +
                                  std::to_string(options_.slotBytes));
  }
  acquired_ = false;
  TcpOutgoing& out = outgoing_[posted_ % outgoing_.size()];
  out.begin({TcpFrame::kSlice, static_cast<std::uint32_t>(headBytes), posted_, bytes, 0});
  out.add(slot(outSlots_, posted_), inSlot);
  for (const Segment& row : rows) out.add(row.address, row.bytes);
  TcpStream& stream = streams_[posted_ % streams_.size()];
  ++posted_;
  if (state() != State::open) return;
  stream.queue.push_back(&out);
  write(stream);
}

void TcpLink::writeAll() {
  for (TcpStream& stream : streams_) {
    if (!stream.queue.empty()) write(stream);
  }
}

// As much as the socket takes. False: the connection has broken.
bool TcpLink::write(TcpStream& stream) {
  while (!stream.queue.empty()) {
    TcpOutgoing& out = *stream.queue.front();
    if (!out.started() && out.frame().released != released_) {
      out.frame().released = released_;
      creditSaid_ = released_;
    }
    const TcpMoved moved = sendPieces(stream.socket.get(), out.left());
    if (moved.again()) return true;
    if (moved.error != 0) {
      // The other end has gone: what it had sent before is still read, and tells more.
      readAll(UINT64_MAX);
      fall(State::failed, "broke the connection: " + reasonOf(moved.error));
      return false;
    }
    bytesSent_.fetch_add(moved.bytes, std::memory_order_relaxed);
    out.advance(moved.bytes);
    if (out.finished()) stream.queue.pop_front();
  }
  return true;
}

bool TcpLink::drained() {
  std::lock_guard lock(mutex_);
  writeAll();
  return std::all_of(streams_.begin(), streams_.end(), [](const TcpStream& stream) { return stream.queue.empty(); });
}

PostedLink::Sent TcpLink::sent() {
  std::lock_guard lock(mutex_);
  return sentSoFar();
}

std::size_t TcpLink::sliceBytes() {
  std::lock_guard lock(mutex_);
  const Sent now = sentSoFar();
  const std::int64_t ns = now.busyNs - paced_.busyNs;
  if (ns < kLeastPacedNs) return sliceBytes_;
  const double bytes = static_cast<double>(now.bytes - paced_.bytes) * kSliceTimeNs / static_cast<double>(ns);
  sliceBytes_ =
      std::clamp(static_cast<std::size_t>(bytes), std::min(kLeastSliceBytes, options_.slotBytes), options_.slotBytes);
  paced_ = now;
  return sliceBytes_;
}

PostedLink::Sent TcpLink::sentSoFar() const {
  Sent sent;
  for (const TcpStream& stream : streams_) {
    if (stream.socket) {
      const TcpSent of = sentBy(stream.socket.get());
      sent.bytes += of.bytes;
      sent.busyNs += of.busyNs;
    }
  }
  return sent;
}

std::vector<Segment> TcpLink::slotMemory() const {
  std::lock_guard lock(mutex_);
  std::vector<Segment> memory;
  for (const Mapping* slots : {&outSlots_, &inSlots_})
    if (*slots) memory.push_back({slots->data(), slots->size()});
  return memory;
}

void TcpLink::abandon() {
  std::lock_guard lock(mutex_);
  fall(State::failed, "was given up by this rank");
}

// ---- receiving

bool TcpLink::complete(std::uint64_t sequence) const {
  const Incoming& in = incoming_[sequence % incoming_.size()];
  return in.known && in.got == in.bytes;
}

bool TcpLink::headHere(std::uint64_t sequence) const {
  const Incoming& in = incoming_[sequence % incoming_.size()];
  return in.known && in.headBytes > 0 && in.got >= in.headBytes;
}

const std::byte* TcpLink::peek() {
  std::lock_guard lock(mutex_);
  return peekWhole();
}

const std::byte* TcpLink::peekWhole() {
  if (!attached()) return nullptr;
  writeAll();
  if (!complete(released_)) {
    wholeWanted_ = released_ + 1;
    readAll(released_);
    if (!complete(released_)) return nullptr;
  }
  return slot(inSlots_, released_);
}

PostedLink::Arrival TcpLink::peekHead() {
  std::lock_guard lock(mutex_);
  if (!attached()) return {};
  heads_ = true;
  writeAll();
  if (!complete(released_) && !headHere(released_)) readAll(released_);
  if (complete(released_)) return {slot(inSlots_, released_), true};
  if (!headHere(released_)) return {};
  const Incoming& in = incoming_[released_ % incoming_.size()];
  // Somebody has read on into the slot.
  if (!scattered_ && (in.got > in.headBytes || wholeWanted_ > released_)) {
    const std::byte* whole = peekWhole();
    return {whole, whole != nullptr};
  }
  return {slot(inSlots_, released_), false};
}

bool TcpLink::receiveRows(std::span<const Segment> rows) {
  std::lock_guard lock(mutex_);
  if (!headHere(released_)) fail(Code::internalError, "rows were received before their slice's head");
  Incoming& in = incoming_[released_ % incoming_.size()];
  TcpStream& stream = streams_[released_ % streams_.size()];
  std::uint64_t total = in.headBytes;
  for (const Segment& row : rows) total += row.bytes;
  if (total != in.bytes) fail(Code::internalError, "a slice's rows were to be received to memory of another size");
  writeAll();
  scattered_ = true;
  std::uint64_t before = in.got - in.headBytes;  // bytes that are already in their rows
  std::size_t at = 0;
  for (; at < rows.size() && before >= rows[at].bytes; ++at) before -= rows[at].bytes;
  while (at < rows.size()) {
    pieces_.clear();
    std::size_t wanted = 0;
    for (std::size_t i = at; i < rows.size() && pieces_.size() < 1024; ++i) {
      const std::size_t skip = i == at ? before : 0;
      pieces_.push_back({static_cast<std::byte*>(rows[i].address) + skip, rows[i].bytes - skip});
      wanted += rows[i].bytes - skip;
    }
    const TcpMoved moved = receivePieces(stream.socket.get(), pieces_);
    if (moved.again()) return false;
    if (moved.error != 0 || moved.end()) {
      lose(stream, moved);
      return false;
    }
    bytesReceived_.fetch_add(moved.bytes, std::memory_order_relaxed);
    in.got += moved.bytes;
    if (moved.bytes < wanted) break;
    at += pieces_.size();
    before = 0;
  }
  if (in.got < in.bytes) return false;
  nextFrame(stream);
  return true;
}

void TcpLink::release() {
  std::lock_guard lock(mutex_);
  if (!attached() || !complete(released_)) fail(Code::internalError, "a slice was released that has not arrived");
  incoming_[released_ % incoming_.size()] = {};
  ++released_;
  scattered_ = false;
  // Half of the slots at once: the peer goes on with the others meanwhile, or has a frame of ours to carry the news.
  const std::uint64_t step = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(options_.slots) / 2);
  if (released_ - creditSaid_ < step || state() != State::open) return;
  TcpStream& stream = streams_[0];
  if (std::find(stream.queue.begin(), stream.queue.end(), &stream.credit) != stream.queue.end()) return;
  stream.credit.begin({TcpFrame::kCredit, 0, 0, 0, 0});
  stream.queue.push_back(&stream.credit);
  if (write(stream) && !stream.queue.empty()) arm(stream, stream.armed | EPOLLOUT);
}

// The end of the connection, seen while reading. Slices that are complete can still be taken.
void TcpLink::lose(TcpStream& stream, const TcpMoved& moved) {
  const bool between = stream.frameGot == 0;
  if (moved.error != 0) {
    fall(State::failed, "broke the connection: " + reasonOf(moved.error));
  } else {
    fall(between ? State::closed : State::failed,
         between ? "closed its connection" : "closed its connection in the middle of a slice");
  }
}

// Reads what has come, at most until slice `until` is there (its head, where that is enough). True if anything was
// read.
bool TcpLink::readAll(std::uint64_t until) {
  bool moved = false;
  const std::size_t first = released_ % streams_.size();
  for (std::size_t i = 0; i < streams_.size(); ++i) {
    TcpStream& stream = streams_[(first + i) % streams_.size()];
    while (state() != State::failed && step(stream)) {
      moved = true;
      if (until != UINT64_MAX && available(until)) return true;
    }
  }
  return moved;
}

bool TcpLink::available(std::uint64_t sequence) const {
  return complete(sequence) || (heads_ && wholeWanted_ <= sequence && headHere(sequence));
}

void TcpLink::nextFrame(TcpStream& stream) {
  stream.frameGot = 0;
  stream.nextIn += streams_.size();
}

// One read. False: there is nothing more to read for now.
bool TcpLink::step(TcpStream& stream) {
  if (stream.ended) return false;
  const int socket = stream.socket.get();
  if (stream.frameGot < sizeof(TcpFrame)) {
    const TcpMoved moved = receiveBytes(socket, reinterpret_cast<std::byte*>(&stream.frame) + stream.frameGot,
                                        sizeof(TcpFrame) - stream.frameGot);
    if (moved.again()) return false;
    if (moved.error != 0 || moved.end()) {
      stream.ended = true;
      lose(stream, moved);
      return false;
    }
    bytesReceived_.fetch_add(moved.bytes, std::memory_order_relaxed);
    stream.frameGot += moved.bytes;
    if (stream.frameGot == sizeof(TcpFrame)) beginFrame(stream);
    return true;
  }
  Incoming& in = incoming_[stream.nextIn % incoming_.size()];
  const std::uint64_t end =
      heads_ && in.headBytes >= in.got && in.headBytes > 0 && wholeWanted_ <= stream.nextIn ? in.headBytes : in.bytes;
  if (in.got == end) return false;
  if (scattered_ && stream.nextIn == released_) return false;
  const TcpMoved moved = receiveBytes(socket, slot(inSlots_, stream.nextIn) + in.got, end - in.got);
  if (moved.again()) return false;
  if (moved.error != 0 || moved.end()) {
    stream.ended = true;
    lose(stream, moved);
    return false;
  }
  bytesReceived_.fetch_add(moved.bytes, std::memory_order_relaxed);
  in.got += moved.bytes;
  if (in.got == in.bytes) nextFrame(stream);
  return true;
}

void TcpLink::beginFrame(TcpStream& stream) {
  const TcpFrame& frame = stream.frame;
  const bool credit = frame.kind == TcpFrame::kCredit && frame.bytes == 0;
  const bool slice = frame.kind == TcpFrame::kSlice && frame.sequence == stream.nextIn &&
                     frame.bytes <= options_.slotBytes && frame.headBytes <= frame.bytes &&
                     frame.sequence < released_ + static_cast<std::uint64_t>(options_.slots);
  if ((!credit && !slice) || frame.released > posted_) {
    stream.ended = true;
    fall(State::failed, "sent what is no frame of this link; it runs another version or other settings, or is no rank");
    return;
  }
  // Streams overtake each other: the highest number is the newest.
  credited_ = std::max(credited_, frame.released);
  if (credit) {
    stream.frameGot = 0;
    return;
  }
  incoming_[frame.sequence % incoming_.size()] = {frame.bytes, frame.headBytes, 0, true};
  if (frame.bytes == 0) nextFrame(stream);
}

// ---- with the reactor

void TcpLink::arm(TcpStream& stream, std::uint32_t events) {
  if (stream.armed == events || !stream.socket) return;
  stream.armed = events;
  reactor_.arm(stream.socket.get(), events);
}

bool TcpLink::poke() {
  std::lock_guard lock(mutex_);
  if (!attached()) return false;
  const bool waiting = std::any_of(streams_.begin(), streams_.end(), [](const auto& s) { return !s.queue.empty(); });
  writeAll();
  const bool written =
      waiting && std::all_of(streams_.begin(), streams_.end(), [](const auto& s) { return s.queue.empty(); });
  // What is there already is for the engine to take: reading on would only fill slots that it may not need.
  if (available(released_) && !scattered_) return written;
  const State before = state();
  if (scattered_) {
    pollfd wanted{streams_[released_ % streams_.size()].socket.get(), POLLIN, 0};
    if (::poll(&wanted, 1, 0) > 0) return true;
  }
  return readAll(released_) || written || state() != before;
}

void TcpLink::attend() {
  std::lock_guard lock(mutex_);
  if (!attached() || state() == State::failed) return;
  // A slice that is here and not wanted yet needs no telling: what lies unread behind it would only ring without end.
  const bool unwanted = available(released_) && !scattered_;
  for (TcpStream& stream : streams_) {
    const Incoming& in = incoming_[stream.nextIn % incoming_.size()];
    const bool headOnly = stream.frameGot == sizeof(TcpFrame) && heads_ && in.known && in.headBytes > 0 &&
                          in.got == in.headBytes && wholeWanted_ <= stream.nextIn;
    const bool reads = !stream.ended && !unwanted && (!headOnly || (scattered_ && stream.nextIn == released_));
    std::uint32_t events = 0;
    if (reads) events |= EPOLLIN;
    if (!stream.queue.empty()) events |= EPOLLOUT;
    if (events != 0) arm(stream, events);
  }
}

void TcpLink::onReady(int number, std::uint32_t events) {
  std::lock_guard lock(mutex_);
  TcpStream& stream = streams_[static_cast<std::size_t>(number)];
  stream.armed = 0;
  try {
    if ((events & EPOLLOUT) != 0 && !stream.queue.empty()) {
      write(stream);
      // Somebody may wait until all has left.
      if (stream.queue.empty()) options_.ringBell();
    }
    if ((events & (EPOLLERR | EPOLLHUP)) != 0 && state() == State::open) readAll(UINT64_MAX);
    if (!stream.queue.empty() && state() == State::open) arm(stream, EPOLLOUT);
  } catch (const std::exception& error) {
    fall(State::failed, std::string("cannot be served any more: ") + error.what());
  }
  if ((events & ~static_cast<std::uint32_t>(EPOLLOUT)) != 0) options_.ringBell();
}

}  // namespace fusco::transport
