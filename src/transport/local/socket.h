// Unix sockets that keep message borders (SOCK_SEQPACKET), with abstract names: nothing is left in the file system.
// Everything is non-blocking; who waits uses poll with a deadline.
#pragma once

#include <sys/types.h>

#include <algorithm>
#include <cstddef>
#include <string>

#include "base/clock.h"
#include "base/handle.h"

namespace fusco::transport {

// For poll: milliseconds until the deadline, at most `cap`.
inline int pollMs(Deadline deadline, int cap) {
  const int left = deadline.leftMs();
  return left < 0 ? cap : std::min(left, cap);
}

enum class Io { done, again, closed };

UniqueFd listenAbstract(const std::string& name, int backlog);

// Empty when somebody has that name already.
UniqueFd listenAbstractUnlessTaken(const std::string& name, int backlog);

// Empty when nobody listens there any more or the deadline has passed (errno tells which).
UniqueFd connectAbstract(const std::string& name, Deadline deadline);

// Who has had no descriptors for so long, though nobody could make room, gives up.
constexpr std::int64_t kStarvingNs = 1'000'000'000;
// Of those who wait, at a time: everybody on the machine may send a flood of strangers, which must not keep ranks
// waiting.
constexpr int kAcceptsAtOnce = 256;
// Takes one waiting connection; empty when there is none. `exhausted` tells that one waits, and the process has no
// descriptors left for it.
UniqueFd acceptOne(int listener, bool* exhausted);

struct Credentials {
  pid_t pid = 0;  // 0: not visible from this pid namespace
  uid_t uid = 0;
};
Credentials credentialsOf(int socket);

// Whether the other end runs under this process's user.
bool sameUser(int socket);

// One message, with one descriptor beside it if `descriptor` is not negative.
Io sendMessage(int socket, const void* data, std::size_t bytes, int descriptor = -1);

// One message of at most `room` bytes; a longer one arrives with *bytes > room and must be dropped.
Io receiveMessage(int socket, void* data, std::size_t room, std::size_t* bytes, UniqueFd* passed = nullptr);

// Bytes for keys and names, from getrandom.
void randomBytes(void* data, std::size_t bytes);
std::string randomName(const char* prefix);

// Takes the same time whatever differs.
bool sameSecret(const void* left, const void* right, std::size_t bytes);

}  // namespace fusco::transport
