#include "base/futex.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <new>
#include <thread>

#include "base/handle.h"

namespace fusco {
namespace {

using Word = std::atomic<std::uint32_t>;

TEST(Futex, ReturnsAtOnceWhenTheWordDiffers) {
  const Word word{1};
  EXPECT_TRUE(waitOnWord(&word, 0, Deadline::never()));
}

TEST(Futex, TimesOut) {
  const Word word{0};
  const std::int64_t start = nowNs();
  while (waitOnWord(&word, 0, Deadline::afterNs(start + 20'000'000 - nowNs()))) {
  }
  EXPECT_GE(nowNs() - start, 20'000'000);
  EXPECT_FALSE(waitOnWord(&word, 0, Deadline::afterNs(0)));
}

TEST(Futex, WakesAnotherThread) {
  Word word{0};
  std::thread waker([&] {
    usleep(5000);
    word.store(7, std::memory_order_release);
    wakeWord(&word);
  });
  const Deadline limit = Deadline::afterMs(10'000);
  while (word.load(std::memory_order_acquire) == 0 && !limit.passed()) waitOnWord(&word, 0, limit);
  EXPECT_EQ(word.load(), 7u);
  waker.join();
}

TEST(Futex, NobodyToWake) {
  const Word word{0};
  EXPECT_EQ(wakeWord(&word), 0);
}

TEST(Futex, WakesAnotherProcess) {
  UniqueFd fd(memfd_create("futex", MFD_CLOEXEC));
  ASSERT_TRUE(fd);
  ASSERT_EQ(ftruncate(fd.get(), 4096), 0);
  const Mapping mapping = Mapping::shared(fd.get(), 4096);
  Word* word = new (mapping.data()) Word(0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // Through an address of its own: the sleepers must meet on the page, not on the address.
    const Mapping other = Mapping::shared(fd.get(), 4096);
    auto* mine = static_cast<Word*>(other.data());
    usleep(5000);
    mine->store(3, std::memory_order_release);
    wakeWord(mine);
    _exit(0);
  }
  const Deadline limit = Deadline::afterMs(10'000);
  while (word->load(std::memory_order_acquire) == 0 && !limit.passed()) waitOnWord(word, 0, limit);
  EXPECT_EQ(word->load(), 3u);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace fusco
