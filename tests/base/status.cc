#include "base/status.h"

#include <gtest/gtest.h>

#include <cerrno>

namespace fusco {
namespace {

TEST(Status, FailKeepsCodeAndText) {
  try {
    fail(Code::invalidUsage, "rank 3: two plans");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::invalidUsage);
    EXPECT_STREQ(error.what(), "rank 3: two plans");
  }
}

// A remoteError names another rank; anything else is put down to the rank itself, once.
TEST(Status, OwnTextSaysWhoseFailureItIs) {
  const std::string name = "rank 2 (host:77)";
  EXPECT_EQ(ownText(Code::systemError, "no room; raise it", name), "rank 2 (host:77): no room; raise it");
  EXPECT_EQ(ownText(Code::systemError, "the socket of rank 3 (host:78) is gone", name),
            "rank 2 (host:77): the socket of rank 3 (host:78) is gone");
  EXPECT_EQ(ownText(Code::systemError, "rank 21: no room", name), "rank 2 (host:77): rank 21: no room");
  for (const char* there : {"rank 2: no room", "rank 2 (host:77) has no room"}) {
    EXPECT_EQ(ownText(Code::internalError, there, name), there);
  }
  EXPECT_EQ(ownText(Code::remoteError, "rank 3 (host:78) died", name), "rank 3 (host:78) died");
}

TEST(Status, FailErrnoAppendsTheReason) {
  try {
    errno = ENOENT;
    failErrno("opening the ring");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::systemError);
    EXPECT_STREQ(error.what(), "opening the ring: No such file or directory");
  }
}

}  // namespace
}  // namespace fusco
