#include "base/handle.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <type_traits>

#include "base/status.h"

namespace fusco {
namespace {

static_assert(!std::is_copy_constructible_v<UniqueFd> && std::is_nothrow_move_constructible_v<UniqueFd>);
static_assert(!std::is_copy_constructible_v<Mapping> && std::is_nothrow_move_constructible_v<Mapping>);

bool isOpen(int fd) { return fcntl(fd, F_GETFD) >= 0; }

TEST(UniqueFd, ClosesWhatItOwns) {
  const int fd = memfd_create("handle", MFD_CLOEXEC);
  ASSERT_TRUE(isOpen(fd));
  { UniqueFd owner(fd); }
  EXPECT_FALSE(isOpen(fd));
}

TEST(UniqueFd, MovesAndReleases) {
  UniqueFd first(memfd_create("handle", MFD_CLOEXEC));
  const int fd = first.get();
  UniqueFd second(std::move(first));
  EXPECT_EQ(second.get(), fd);
  UniqueFd third;
  third = std::move(second);
  EXPECT_FALSE(second);
  EXPECT_EQ(third.release(), fd);
  EXPECT_FALSE(third);
  ASSERT_TRUE(isOpen(fd));
  close(fd);
}

TEST(UniqueFd, ResetClosesTheOldOne) {
  UniqueFd owner(memfd_create("handle", MFD_CLOEXEC));
  const int old = owner.get();
  const int next = memfd_create("handle", MFD_CLOEXEC);
  owner.reset(next);
  EXPECT_FALSE(isOpen(old));
  EXPECT_TRUE(isOpen(next));
}

TEST(UniqueFd, ClosingTwiceIsLoggedNotThrown) {
  const int fd = memfd_create("handle", MFD_CLOEXEC);
  testing::internal::CaptureStderr();
  {
    const UniqueFd owner(fd);
    close(fd);
  }
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_NE(log.find("closing descriptor " + std::to_string(fd)), std::string::npos) << log;
}

TEST(Mapping, SharedMemorySeenFromTwoPlaces) {
  UniqueFd fd(memfd_create("handle", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(fd.get(), 8192), 0);
  const Mapping all = Mapping::shared(fd.get(), 8192);
  const Mapping second = Mapping::shared(fd.get(), 4096, 4096, false);
  all.bytes()[4096 + 17] = std::byte{42};
  EXPECT_EQ(second.bytes()[17], std::byte{42});
  EXPECT_TRUE(all.contains(all.bytes() + 8191));
  EXPECT_FALSE(all.contains(all.bytes() + 8192));
}

TEST(Mapping, AnonymousIsZeroedAndMoves) {
  Mapping first = Mapping::anonymous(10'000);
  EXPECT_EQ(first.size(), 10'000u);
  EXPECT_EQ(first.bytes()[9'999], std::byte{0});
  void* address = first.data();
  Mapping second;
  second = std::move(first);
  EXPECT_FALSE(first);
  EXPECT_EQ(second.data(), address);
  second.reset();
  EXPECT_EQ(second.size(), 0u);
}

TEST(Mapping, FailureSaysHowMuch) {
  try {
    Mapping::shared(-1, 4096);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::systemError);
    EXPECT_NE(std::string(error.what()).find("4096"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace fusco
