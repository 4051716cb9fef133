#include "transport/local/process_vm.h"

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/status.h"

namespace fusco::transport {

namespace {

constexpr std::size_t kMostSegments = 1024;  // IOV_MAX of the kernel, for each side
constexpr std::size_t kMostBytes = std::size_t{1} << 30;

// A place in a list of segments.
class Cursor {
 public:
  explicit Cursor(std::span<const Segment> list) : list_(list) { skipEmpty(); }

  bool atEnd() const { return index_ == list_.size(); }
  std::byte* address() const { return static_cast<std::byte*>(list_[index_].address) + offset_; }
  std::size_t left() const { return list_[index_].bytes - offset_; }
  void advance(std::size_t bytes) {
    while (bytes > 0) {
      const std::size_t step = std::min(bytes, left());
      offset_ += step;
      bytes -= step;
      skipEmpty();
    }
  }

 private:
  void skipEmpty() {
    while (index_ < list_.size() && offset_ == list_[index_].bytes) {
      ++index_;
      offset_ = 0;
    }
  }

  std::span<const Segment> list_;
  std::size_t index_ = 0;
  std::size_t offset_ = 0;
};

// Iovecs of one call; a step that goes on where the last one ended lengthens it.
struct Side {
  std::array<iovec, kMostSegments> parts;
  std::size_t count = 0;

  bool takes(std::byte* address, std::size_t bytes) {
    if (count > 0) {
      iovec& last = parts[count - 1];
      if (static_cast<std::byte*>(last.iov_base) + last.iov_len == address) {
        last.iov_len += bytes;
        return true;
      }
    }
    if (count == kMostSegments) return false;
    parts[count++] = {address, bytes};
    return true;
  }
};

void checkTotals(std::span<const Segment> local, std::span<const Segment> remote) {
  std::size_t here = 0, there = 0;
  for (const Segment& segment : local) here += segment.bytes;
  for (const Segment& segment : remote) there += segment.bytes;
  if (here != there) {
    fail(Code::internalError, "row lists of one transfer differ in size: " + std::to_string(here) + " bytes here, " +
                                  std::to_string(there) + " at the peer");
  }
}

[[noreturn]] void failVm(int error, const std::string& peer) {
  const std::string what = "moving rows to or from private memory of " + peer + ": ";
  switch (error) {
    case EFAULT:
      fail(Code::invalidArgument, what +
                                      "a buffer given to this call is not (or no longer) mapped, here or there; keep "
                                      "buffers until the call has completed on all ranks");
    case ESRCH:
      fail(Code::remoteError, what + "its process has ended; look at its log");
    default:
      fail(Code::systemError,
           what + std::strerror(error) +
               " (process_vm_readv/writev); use memory from fuscoMemAlloc, or switch process_vm off");
  }
}

}  // namespace

void moveVm(VmDirection direction, pid_t pid, const std::string& peer, std::span<const Segment> local,
            std::span<const Segment> remote) {
  checkTotals(local, remote);
  Cursor here(local), there(remote);
  Side mine, theirs;
  while (!here.atEnd()) {
    // Both sides of a call are cut to the same total; borders inside need not match.
    mine.count = theirs.count = 0;
    std::size_t total = 0;
    Cursor a = here, b = there;
    while (!a.atEnd() && total < kMostBytes) {
      const std::size_t step = std::min({a.left(), b.left(), kMostBytes - total});
      if (!mine.takes(a.address(), step)) break;
      if (!theirs.takes(b.address(), step)) {
        // Take the step back on this side.
        iovec& last = mine.parts[mine.count - 1];
        last.iov_len -= step;
        if (last.iov_len == 0) --mine.count;
        break;
      }
      a.advance(step);
      b.advance(step);
      total += step;
    }
    const ssize_t moved =
        direction == VmDirection::write
            ? ::process_vm_writev(pid, mine.parts.data(), mine.count, theirs.parts.data(), theirs.count, 0)
            : ::process_vm_readv(pid, mine.parts.data(), mine.count, theirs.parts.data(), theirs.count, 0);
    if (moved < 0) {
      if (errno == EINTR) continue;
      failVm(errno, peer);
    }
    if (moved == 0) failVm(EFAULT, peer);
    // Fewer bytes than asked for: go on from there; a bad address then answers with its error.
    here.advance(static_cast<std::size_t>(moved));
    there.advance(static_cast<std::size_t>(moved));
  }
}

void moveLocal(VmDirection direction, std::span<const Segment> local, std::span<const Segment> remote) {
  checkTotals(local, remote);
  Cursor here(local), there(remote);
  while (!here.atEnd()) {
    const std::size_t step = std::min(here.left(), there.left());
    if (direction == VmDirection::write) {
      std::memmove(there.address(), here.address(), step);
    } else {
      std::memmove(here.address(), there.address(), step);
    }
    here.advance(step);
    there.advance(step);
  }
}

bool probeVm(pid_t pid, std::uint64_t address, std::uint64_t value) {
  if (pid <= 0) return false;
  std::uint64_t word = 0;
  iovec here{&word, sizeof(word)};
  iovec there{reinterpret_cast<void*>(address), sizeof(word)};
  if (::process_vm_readv(pid, &here, 1, &there, 1, 0) != static_cast<ssize_t>(sizeof(word)) || word != value)
    return false;
  // Writing is allowed exactly where reading is; writing the same value shows that the call exists.
  return ::process_vm_writev(pid, &here, 1, &there, 1, 0) == static_cast<ssize_t>(sizeof(word));
}

}  // namespace fusco::transport
