// What libraries that stand on this one read and write through it: settings and the log.
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "api/worlds.h"

namespace fusco::test {
namespace {

const World kAlone{"one rank", 1, 1, {}, true, 16384};

TEST(Settings, areReadByName) {
  runWell(kAlone, [](Rank&) {
    setenv("FUSCO_STATS", "1", 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 1);
    unsetenv("FUSCO_CARRY");
    const char* value = nullptr;
    FUSCO_OK(fuscoGetSetting("FUSCO_STATS", &value));
    REQUIRE(std::string(value) == "1");
    FUSCO_OK(fuscoGetSetting("FUSCO_SOCKET_IFNAME", &value));
    REQUIRE(std::string(value) == "lo");
    FUSCO_OK(fuscoGetSetting("FUSCO_CARRY", &value));
    REQUIRE(std::string(value) == "mapped");
    requireContains(EXPECT_CODE(fuscoGetSetting("FUSCO_CARY", &value), fuscoInvalidArgument), "FUSCO_CARRY");
    EXPECT_CODE(fuscoGetSetting(nullptr, &value), fuscoInvalidArgument);
    EXPECT_CODE(fuscoGetSetting("FUSCO_CARRY", nullptr), fuscoInvalidArgument);
  });
}

TEST(Settings, logGovernsWhatIsWritten) {
  runWell(kAlone, [](Rank&) {
    const std::string path = testing::TempDir() + "fusco-log-" + std::to_string(getpid());
    setenv("FUSCO_DEBUG", "WARN", 1);
    setenv("FUSCO_DEBUG_FILE", path.c_str(), 1);
    FUSCO_OK(fuscoLog(fuscoLogWarn, "a line to be seen"));
    FUSCO_OK(fuscoLog(fuscoLogInfo, "a line too many"));
    EXPECT_CODE(fuscoLog(17, "no such level"), fuscoInvalidArgument);
    EXPECT_CODE(fuscoLog(fuscoLogWarn, nullptr), fuscoInvalidArgument);
    std::ifstream file(path);
    std::ostringstream text;
    text << file.rdbuf();
    std::remove(path.c_str());
    requireContains(text.str(), "WARN a line to be seen");
    REQUIRE(text.str().find("too many") == std::string::npos);
  });
}

}  // namespace
}  // namespace fusco::test
