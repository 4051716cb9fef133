// Where the ranks of a communicator-to-be tell each other what they are and how they vote. A star: one thread, in the
// process that made the id, hears everybody and tells everybody the same, so that all conclude the same. Who does not
// come in time counts as absent; nobody waits longer than that.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fusco/nccl_api.h"

namespace fusco::nccl {

// Names a meeting place. It travels in the tail of an ncclUniqueId, which NCCL leaves zero and everybody copies.
struct Tag {
  static constexpr std::uint64_t kMagic = 0x4741545f4c43434e;  // "NCCL_TAG"
  static constexpr std::uint32_t kProtocol = 1;
  static constexpr std::size_t kOffset = 40;  // NCCL's own part ends here

  std::uint64_t magic = 0;
  std::uint32_t protocol = 0;
  std::uint32_t reserved = 0;
  std::uint64_t name[2] = {};  // of the abstract socket
  std::uint8_t key[32] = {};   // who does not know it is not heard
  std::uint64_t machine = 0;   // where the place is
  std::uint16_t port = 0;      // where ranks of other machines say so; 0: it is opened by rank 0, and they cannot
  std::uint8_t unused[14] = {};

  bool valid() const { return magic == kMagic && protocol == kProtocol; }
  // The place that ranks who hold this tag agree on without a word, one for each `salt`.
  Tag derived(std::uint64_t salt) const;
};
static_assert(sizeof(Tag) == NCCL_UNIQUE_ID_BYTES - Tag::kOffset);

// False when NCCL uses the tail itself: then the id stays as it is.
bool writeTag(ncclUniqueId& id, const Tag& tag);
Tag readTag(const ncclUniqueId& id);

// A tag that nobody else has, of a place that is not open yet.
Tag newTag();
// Opens a meeting place, with a new tag or the given one, and the thread that serves it until all have come and gone.
Tag openMeeting();
void openMeeting(const Tag& tag);
// Closes a place to which nobody will come, if it is this process's.
void closeMeeting(const Tag& tag);
// One that hears of ranks on other machines as well (elsewhere.h); where that cannot be, it is left to rank 0 to open.
Tag openWideMeeting();

// Owns a socket.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) noexcept : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();
  int get() const noexcept { return fd_; }

 private:
  int fd_ = -1;
};

// A rank's end.
class Meeting {
 public:
  // Throws when there is no such place. `patienceMs`: how long the place waits for the others, from the first one's
  // coming in each round. `retry`: the place may not be open yet. `cancelled` is looked at all the time.
  Meeting(const Tag& tag, int rank, int ranks, std::int64_t patienceMs, bool retry, const std::atomic<bool>* cancelled);

  // Everybody's words by rank, as many bytes as ours; nothing for who is absent. Ours may be missing too, when we came
  // too late.
  std::vector<std::optional<std::string>> exchange(const std::string& words);
  // The first rank that has said that it is on another machine, or -1.
  int elsewhere() const { return elsewhere_; }

 private:
  void send(const void* data, std::size_t bytes);
  void receive(void* data, std::size_t bytes);

  Socket socket_;
  int ranks_;
  int elsewhere_ = -1;
  std::int64_t patienceMs_;
  const std::atomic<bool>* cancelled_;
};

}  // namespace fusco::nccl
