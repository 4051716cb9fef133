#include "base/environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

namespace fusco {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

Environment read(std::initializer_list<std::pair<std::string, std::string>> variables) {
  return Environment(Environment::Variables(variables));
}

TEST(Environment, DefaultsWithoutVariables) {
  const Environment none = read({});
  EXPECT_THAT(none.warnings(), IsEmpty());
  EXPECT_EQ(none.number(Setting::sliceBytes), kNotSet);
  EXPECT_EQ(none.number(Setting::slices), 4);
  EXPECT_EQ(none.number(Setting::debug), 2);
  EXPECT_EQ(none.number(Setting::dedup), 3);
  EXPECT_EQ(none.number(Setting::node), kNotSet);
  EXPECT_TRUE(none.flag(Setting::processVm));
  for (const SettingInfo& info : settingTable()) EXPECT_FALSE(none.isSet(info.setting)) << info.name;
}

TEST(Environment, OwnNameComesBeforeNccl) {
  const Environment both = read({{"NCCL_DEBUG", "TRACE"}, {"FUSCO_DEBUG", "info"}});
  EXPECT_EQ(both.number(Setting::debug), 3);
  const Environment fallback =
      read({{"NCCL_DEBUG", "TRACE"}, {"NCCL_SOCKET_IFNAME", "eth7"}, {"NCCL_HOSTID", "rack-7"}});
  EXPECT_EQ(fallback.number(Setting::debug), 4);
  EXPECT_EQ(fallback.text(Setting::socketInterfaces), "eth7");
  EXPECT_TRUE(fallback.isSet(Setting::socketInterfaces));
  // It tells NCCL what it may do, not which ranks share memory.
  EXPECT_EQ(fallback.text(Setting::hostId), "");
}

TEST(Environment, OtherNcclVariablesAreNotOurBusiness) {
  EXPECT_THAT(read({{"NCCL_IB_HCA", "mlx5"}, {"NCCL_SLICE_BYTES", "7"}}).warnings(), IsEmpty());
  EXPECT_EQ(read({{"NCCL_SLICE_BYTES", "8192"}}).number(Setting::sliceBytes), kNotSet);
}

TEST(Environment, NcclFilesComeAfterVariables) {
  Environment::Variables variables = {{"NCCL_DEBUG", "TRACE"}};
  std::istringstream users("# a remark\nNCCL_DEBUG=INFO\nNCCL_SOCKET_IFNAME=eth7 \nnonsense\nFUSCO_NET=tcp\n");
  std::istringstream systems("NCCL_SOCKET_IFNAME=lo\nNCCL_P2P_DISABLE=1");
  addNcclFile(variables, users);
  addNcclFile(variables, systems);
  const Environment read(variables);
  EXPECT_EQ(read.number(Setting::debug), 4);
  EXPECT_EQ(read.text(Setting::socketInterfaces), "eth7");
  EXPECT_TRUE(read.flag(Setting::p2pDisable));
  EXPECT_FALSE(read.isSet(Setting::net));
}

TEST(Environment, BytesTakeSuffixes) {
  EXPECT_EQ(read({{"FUSCO_SLICE_BYTES", "1M"}}).number(Setting::sliceBytes), 1 << 20);
  EXPECT_EQ(read({{"FUSCO_MAX_STAGING_BYTES", "3g"}}).number(Setting::maxStagingBytes), 3ll << 30);
  EXPECT_EQ(read({{"FUSCO_SLICE_BYTES", "65536"}}).number(Setting::sliceBytes), 65536);
}

TEST(Environment, MalformedValuesWarnOnceAndKeepTheDefault) {
  for (const char* value : {"x", "12x", "-1", "1T", "99999999999999999999", "9223372036854775807G", " 8192", "1"}) {
    const Environment wrong = read({{"FUSCO_SLICE_BYTES", value}});
    EXPECT_EQ(wrong.number(Setting::sliceBytes), kNotSet) << value;
    EXPECT_FALSE(wrong.isSet(Setting::sliceBytes));
    EXPECT_THAT(wrong.warnings(), ElementsAre(AllOf(HasSubstr("FUSCO_SLICE_BYTES"), HasSubstr(value), HasSubstr("4096"),
                                                    HasSubstr("the default is used"))));
  }
  EXPECT_THAT(read({{"FUSCO_BALANCE", "best"}}).warnings(), ElementsAre(HasSubstr("none paper full")));
  EXPECT_THAT(read({{"FUSCO_PROCESS_VM", "yes"}}).warnings(),
              ElementsAre(AllOf(HasSubstr("0 or 1"), HasSubstr("1 is used"))));
  EXPECT_THAT(read({{"NCCL_DEBUG", "LOUD"}}).warnings(), ElementsAre(HasSubstr("NCCL_DEBUG=LOUD")));
}

TEST(Environment, EmptyMeansNotSet) {
  const Environment empty = read({{"FUSCO_SLICES", ""}, {"FUSCO_HOSTID", ""}});
  EXPECT_THAT(empty.warnings(), IsEmpty());
  EXPECT_EQ(empty.number(Setting::slices), 4);
}

TEST(Environment, UnknownNamesNameTheNearest) {
  EXPECT_THAT(read({{"FUSCO_SLICE_BYTE", "4096"}}).warnings(),
              ElementsAre(AllOf(HasSubstr("FUSCO_SLICE_BYTE:"), HasSubstr("is FUSCO_SLICE_BYTES meant?"))));
  EXPECT_THAT(read({{"FUSCO_ZZZZZZZZZZZZZZ", "1"}}).warnings(), ElementsAre("FUSCO_ZZZZZZZZZZZZZZ: no such setting"));
  EXPECT_EQ(nearestName("FUSCO_BALANSE"), "FUSCO_BALANCE");
  EXPECT_EQ(nearestName(""), "");
}

TEST(Environment, NamesOfTestsBenchmarksAndCommandsAreNotUnknown) {
  EXPECT_THAT(
      read({{"FUSCO_TEST_SEED", "1"}, {"FUSCO_BENCH_X", "1"}, {"FUSCO_INSTALL", "0"}, {"FUSCO_BUILD_DIR", "/b"}})
          .warnings(),
      IsEmpty());
}

TEST(Environment, EverySettingIsInPageAndHelp) {
  const std::string page = environmentMarkdown(), help = environmentHelp();
  for (const SettingInfo& info : settingTable()) {
    EXPECT_THAT(page, HasSubstr(std::string("| `") + info.name + "` |"));
    if (!info.ofCommands) {
      EXPECT_THAT(help, HasSubstr(info.name));
    }
  }
}

TEST(Environment, OfTheProcessIsReadOnce) {
  const Environment* first = &environment();
  ASSERT_EQ(setenv("FUSCO_SLICES", "9", 1), 0);
  EXPECT_EQ(&environment(), first);
  EXPECT_EQ(environment().number(Setting::slices), first->number(Setting::slices));
  unsetenv("FUSCO_SLICES");
}

}  // namespace
}  // namespace fusco
