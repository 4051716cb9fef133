// Which RDMA ports and addresses are chosen, for hosts that are made up.
#include "transport/verbs/choice.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/status.h"

namespace fusco::transport {
namespace {

using ::testing::HasSubstr;

TEST(HcaFilter, TakesByPrefixNamePortAndExclusion) {
  EXPECT_TRUE(HcaFilter("").takes("mlx5_0", 1));
  const HcaFilter prefix("mlx5");
  EXPECT_TRUE(prefix.takes("mlx5_7", 2));
  EXPECT_FALSE(prefix.takes("rxe0", 1));
  const HcaFilter exact("=mlx5_1,mlx5_2:2");
  EXPECT_TRUE(exact.takes("mlx5_1", 1));
  EXPECT_FALSE(exact.takes("mlx5_10", 1));
  EXPECT_TRUE(exact.takes("mlx5_2", 2));
  EXPECT_FALSE(exact.takes("mlx5_2", 1));
  const HcaFilter others("^=mlx5_1");
  EXPECT_FALSE(others.takes("mlx5_1", 1));
  EXPECT_TRUE(others.takes("mlx5_10", 1));
}

TEST(HcaFilter, ItsOrderIsThatOfTheLanes) {
  const HcaFilter list("=b,a:2,a");
  EXPECT_EQ(list.rankOf("b", 1), 0);
  EXPECT_EQ(list.rankOf("a", 2), 1);
  EXPECT_EQ(list.rankOf("a", 1), 2);
  EXPECT_EQ(HcaFilter("").rankOf("a", 1), HcaFilter("").rankOf("b", 1));
}

GidEntry entry(int index, const char* address, int version) {
  GidEntry made;
  made.index = index;
  made.roceVersion = version;
  if (::inet_pton(AF_INET, address, made.gid.data() + 12) == 1) {
    made.gid[10] = made.gid[11] = 0xff;
  } else {
    EXPECT_EQ(::inet_pton(AF_INET6, address, made.gid.data()), 1) << address;
  }
  return made;
}

const std::vector<GidEntry> kUsual = {
    entry(0, "fe80::1", 1),  entry(1, "fe80::1", 2),     entry(2, "10.1.0.7", 1),
    entry(3, "10.1.0.7", 2), entry(4, "192.168.3.7", 2), entry(5, "fd00:1::7", 2),
};

TEST(Gid, TheSecondVersionIpv4AndRoutableIsPreferred) {
  EXPECT_EQ(chooseGid(kUsual, {}, true).index, 3);
  EXPECT_EQ(chooseGid(kUsual, {-1, 1, 4, ""}, true).index, 2);
  EXPECT_EQ(chooseGid(kUsual, {-1, 2, 6, ""}, true).index, 5);
  EXPECT_THAT(chooseGid(kUsual, {}, true).why, HasSubstr("3: 10.1.0.7 RoCE v2, of: 0: fe80::1 RoCE v1, "));
}

TEST(Gid, WhatIsLackingIsGivenUp) {
  const std::vector<GidEntry> first = {entry(0, "fe80::1", 1), entry(2, "10.1.0.7", 1)};
  EXPECT_EQ(chooseGid(first, {}, true).index, 2);
  const std::vector<GidEntry> local = {entry(0, "fe80::1", 1), entry(1, "fe80::1", 2)};
  EXPECT_EQ(chooseGid(local, {}, true).index, 1);
}

TEST(Gid, ARangeIsKept) {
  EXPECT_EQ(chooseGid(kUsual, {-1, 2, 4, "192.168.0.0/16"}, true).index, 4);
  EXPECT_EQ(chooseGid(kUsual, {-1, 2, 4, "fd00::/8"}, true).index, 5);
  const GidChoice none = chooseGid(kUsual, {-1, 2, 4, "10.2.0.0/16"}, true);
  EXPECT_EQ(none.index, -1);
  EXPECT_THAT(none.why, HasSubstr("FUSCO_IB_ADDR_RANGE=10.2.0.0/16; there are: 0: fe80::1"));
  for (const char* wrong : {"10.1", "10.1.0.0/33", "10.1.0.0/x", "/8"}) {
    EXPECT_THROW(chooseGid(kUsual, {-1, 2, 4, wrong}, true), Error) << wrong;
  }
}

TEST(Gid, AnIndexThatIsAskedForMustBeSet) {
  EXPECT_EQ(chooseGid(kUsual, {0, 2, 4, ""}, true).index, 0);
  const GidChoice none = chooseGid(kUsual, {9, 2, 4, ""}, true);
  EXPECT_EQ(none.index, -1);
  EXPECT_THAT(none.why, HasSubstr("FUSCO_IB_GID_INDEX=9 names no GID that is set"));
  EXPECT_EQ(chooseGid({}, {}, true).index, -1);
}

TEST(Gid, InfinibandTakesItsFirst) {
  const std::vector<GidEntry> table = {entry(0, "fe80::2:c903:1", 0), entry(1, "fd00::2:c903:1", 0)};
  EXPECT_EQ(chooseGid(table, {-1, 2, 4, "10.0.0.0/8"}, false).index, 0);
}

}  // namespace
}  // namespace fusco::transport
