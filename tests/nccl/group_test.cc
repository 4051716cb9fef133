// Jobs of a group that run side by side, also where threads are short: this program can refuse them.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <thread>

#include "plugin/nccl/host.h"

namespace {
// How many more threads there may be; negative: as many as one likes.
std::atomic<int> threadsLeft{-1};
}  // namespace

// In front of the C library's, which the threads of C++ are made by.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*),
                              void* argument) noexcept {
  if (threadsLeft == 0) return EAGAIN;
  if (threadsLeft > 0) --threadsLeft;
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return real(thread, attributes, body, argument);
}

namespace fusco::nccl {
namespace {

using testing::HasSubstr;

struct Shortage {
  explicit Shortage(int left) { threadsLeft = left; }
  ~Shortage() { threadsLeft = -1; }
};

TEST(SideBySide, runsAllAtOnceAndThrowsTheFirstError) {
  std::atomic<int> here{0};
  std::vector<std::function<void()>> jobs;
  for (int i = 0; i < 5; ++i) {
    jobs.emplace_back([&here, i] {
      ++here;
      while (here < 5) std::this_thread::yield();
      if (i % 2 == 1) fail(Code::invalidUsage, "job " + std::to_string(i));
    });
  }
  try {
    runSideBySide(jobs);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "job 1");
  }
  EXPECT_EQ(here, 5);
}

// Each of them would wait for the others: none runs.
TEST(SideBySide, runsNothingWhereThreadsAreShort) {
  for (int left = 0; left < 4; ++left) {
    std::atomic<int> ran{0};
    const std::vector<std::function<void()>> jobs(4, [&ran] { ++ran; });
    try {
      const Shortage shortage(left);
      runSideBySide(jobs);
      FAIL() << "no error with " << left << " threads";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::systemError);
      EXPECT_THAT(error.what(), HasSubstr("no thread can be started"));
    }
    EXPECT_EQ(ran, 0);
  }
}

// And is then not waited for when the process ends.
TEST(Meeting, opensNoPlaceWithoutAThread) {
  {
    const Shortage shortage(0);
    try {
      openMeeting();
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::systemError);
    }
  }
  EXPECT_TRUE(openMeeting().valid());
}

// It is told at once that nobody makes it.
TEST(Init, failsWhereNoThreadIsLeftForIt) {
  const Tag tag = openMeeting();
  Wishes wishes;
  wishes.blocking = false;
  ncclComm_t comm = nullptr;
  const auto init = [&] { return hostCall("init", [&] { addInit(&comm, 1, 0, tag, wishes); }); };
  {
    const Shortage shortage(0);
    EXPECT_EQ(init(), ncclSystemError);
  }
  EXPECT_EQ(comm, nullptr);
  EXPECT_THAT(lastError(), HasSubstr("no thread can be started"));
  EXPECT_EQ(init(), ncclInProgress);
  const CommunicatorRef communicator = findCommunicator(comm);
  ASSERT_TRUE(communicator);
  while (communicator->state == State::starting) std::this_thread::yield();
  EXPECT_EQ(communicator->state, State::ready);
  EXPECT_EQ(fuscoCommDestroy(communicator->engine), fuscoSuccess);
  takeOut(comm);
}

}  // namespace
}  // namespace fusco::nccl
