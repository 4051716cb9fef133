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
