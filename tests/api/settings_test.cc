// What libraries that stand on this one read and write through it: settings and the log.
#include <cstdio>
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

// Who gets no connection reads which setting to look at, and the log of who has it says once what there is.
TEST(Settings, interfacesThatAreNoneAreNamed) {
  for (const char* const host : {"", "another"}) {
    runWell({"two nodes", 2, 1, {0, 1}, true, 16384}, [host](Rank& self) {
      const std::string path = testing::TempDir() + "fusco-log-" + std::to_string(getpid());
      setenv("FUSCO_DEBUG_FILE", path.c_str(), 1);
      setenv("FUSCO_SOCKET_IFNAME", "nope", 1);
      setenv("FUSCO_NET", "tcp", 1);
      if (self.rank() == 1) setenv("FUSCO_HOSTID", host, 1);
      fuscoConfig_t config = self.config();
      config.initTimeoutMs = 1500;  // of rank 0, where the other one cannot reach it at all
      for (int k = 0; k < 2; ++k) {
        fuscoComm_t comm = nullptr;
        const fuscoResult_t result = fuscoCommInitRankConfig(&comm, 2, self.id(k), self.rank(), &config);
        const std::string text = fuscoGetLastError(nullptr);
        require(result == fuscoSystemError || result == fuscoRemoteError, text);
        if (self.rank() == 1 || *host == 0) requireContains(text, "FUSCO_SOCKET_IFNAME");
      }
      std::ifstream file(path);
      int told = 0;
      for (std::string line; std::getline(file, line);)
        told += line.find("WARN FUSCO_SOCKET_IFNAME=nope names no interface") != std::string::npos ? 1 : 0;
      std::remove(path.c_str());
      require(told == 1, "told " + std::to_string(told) + " times");
    });
  }
}

}  // namespace
}  // namespace fusco::test
