#include "base/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <thread>

namespace fusco {
namespace {

using testing::HasSubstr;
using testing::MatchesRegex;

// Sends the log into a file for one test and gives it back to standard error afterwards.
class LogFile {
 public:
  LogFile(LogLevel level, const std::string& subsystems)
      : path_(testing::TempDir() + "fusco-log-" + std::to_string(getpid())) {
    unlink(path_.c_str());
    EXPECT_EQ(startLog({level, subsystems, path_}), "");
  }
  ~LogFile() {
    startLog({});
    unlink(path_.c_str());
  }
  std::string text() const {
    std::ostringstream all;
    all << std::ifstream(path_).rdbuf();
    return all.str();
  }

 private:
  std::string path_;
};

TEST(Log, LineNamesHostProcessThreadAndRank) {
  const LogFile log(LogLevel::warn, "");
  FUSCO_WARN("peer {} is gone", 5);
  {
    const LogRank rank(3);
    FUSCO_WARN("with a rank");
  }
  const std::string pid = std::to_string(getpid());
  EXPECT_THAT(log.text(), MatchesRegex("fusco: [^:]+:" + pid +
                                       ":[0-9]+ WARN peer 5 is gone\n"
                                       "fusco: [^:]+:" +
                                       pid + ":[0-9]+ \\[3\\] WARN with a rank\n"));
}

TEST(Log, LevelsAndSubsystemsFilter) {
  const LogFile log(LogLevel::info, "NET");
  FUSCO_INFO(kLogNet, "net");
  FUSCO_INFO(kLogInit, "init");
  FUSCO_TRACE(kLogNet, "trace");
  FUSCO_WARN("warn");
  EXPECT_THAT(log.text(), MatchesRegex("[^\n]* INFO net\n[^\n]* WARN warn\n"));
}

TEST(Log, ArgumentsOfMessagesThatAreOffAreNotEvaluated) {
  const LogFile log(LogLevel::none, "");
  int evaluated = 0;
  FUSCO_WARN("{}", ++evaluated);
  FUSCO_TRACE(kLogNet, "{}", ++evaluated);
  EXPECT_EQ(evaluated, 0);
  EXPECT_EQ(log.text(), "");
}

TEST(Log, SubsystemLists) {
  std::string unknown;
  EXPECT_EQ(parseSubsystems("", unknown), kLogInit | kLogBootstrap | kLogEnv);
  EXPECT_EQ(parseSubsystems("net,Plan", unknown), kLogNet | kLogPlan);
  EXPECT_EQ(parseSubsystems("ALL", unknown), kLogAll);
  EXPECT_EQ(parseSubsystems("^CALL,NET", unknown), static_cast<std::uint32_t>(~(kLogCall | kLogNet)));
  EXPECT_EQ(parseSubsystems("GRAPH,NVLS", unknown), 0u);
  EXPECT_EQ(unknown, "");
  EXPECT_EQ(parseSubsystems("NET,WIRE,TUBE", unknown), kLogNet + 0u);
  EXPECT_EQ(unknown, "WIRE,TUBE");
}

TEST(Log, FileNamesTakeHostAndProcess) {
  EXPECT_EQ(expandLogFile("/tmp/%h.%p.%%.log%"),
            "/tmp/" + shortHostName() + "." + std::to_string(getpid()) + ".%.log%");
}

TEST(Log, FileThatCannotBeOpenedIsToldAndStandardErrorUsed) {
  EXPECT_THAT(startLog({LogLevel::warn, "", "/nowhere/at/all"}), HasSubstr("/nowhere/at/all: No such file"));
  testing::internal::CaptureStderr();
  FUSCO_WARN("still heard");
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("still heard"));
  startLog({});
}

TEST(Log, LinesOfThreadsDoNotMix) {
  const LogFile log(LogLevel::info, "ALL");
  constexpr int kThreads = 4, kLines = 200;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([t] {
      const LogRank rank(t);
      for (int i = 0; i < kLines; ++i) FUSCO_INFO(kLogColl, "line {} of {} end", i, t);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::istringstream lines(log.text());
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    ASSERT_THAT(line, MatchesRegex("fusco: [^:]+:[0-9]+:[0-9]+ \\[[0-9]\\] INFO line [0-9]+ of [0-9] end"));
  }
  EXPECT_EQ(count, kThreads * kLines);
}

}  // namespace
}  // namespace fusco
