#include "base/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace fusco {
namespace {

// Without FUTEX_PRIVATE_FLAG: the word is found by the page behind it, so that processes meet on it.
long futex(const std::atomic<std::uint32_t>* word, int operation, std::uint32_t value,
           const timespec* timeout) noexcept {
  return syscall(SYS_futex, word, operation, value, timeout, nullptr, 0);
}

}  // namespace

bool waitOnWord(const std::atomic<std::uint32_t>* word, std::uint32_t expected, Deadline deadline) noexcept {
  if (word->load(std::memory_order_acquire) != expected) return true;
  const std::int64_t left = deadline.leftNs();
  if (left == 0) return false;
  const timespec timeout{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
  const long result = futex(word, FUTEX_WAIT, expected, deadline.isNever() ? nullptr : &timeout);
  return result == 0 || errno != ETIMEDOUT || word->load(std::memory_order_acquire) != expected;
}

int wakeWord(const std::atomic<std::uint32_t>* word, int count) noexcept {
  const long woken = futex(word, FUTEX_WAKE, static_cast<std::uint32_t>(count), nullptr);
  return woken < 0 ? 0 : static_cast<int>(woken);
}

}  // namespace fusco
