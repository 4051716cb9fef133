#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <vector>

#include "bench/program.h"

namespace {

using testing::HasSubstr;
using testing::Not;

// What a row holds, as JSON writes it.
using Row = std::map<std::string, std::string>;

class Report : public testing::Test {
 protected:
  void SetUp() override {
    if (say("python3 --version").code != 0) GTEST_SKIP() << "no python3";
    before_ = temporary("before.json");
    after_ = temporary("after.json");
    const Row limit = {{"impl", "\"limit\""},
                       {"op", "\"dispatch\""},
                       {"device", "\"host\""},
                       {"ranks", "2"},
                       {"nodes", "1"},
                       {"tokens", "64"},
                       {"bytes", "1000000"},
                       {"hidden", "7168"},
                       {"dtype", "\"bfloat16\""},
                       {"topk", "8"},
                       {"experts", "64"},
                       {"routing", "\"trace:/a/b.json#3\""},
                       {"memory", "\"window\""},
                       {"dedup", "\"auto\""},
                       {"balance", "\"none\""},
                       {"p50_us", "80.0"},
                       {"p99_us", "90.0"},
                       {"algbw_gbps", "12.5"},
                       {"busbw_gbps", "6.2"},
                       {"limit_gbps", "12.5"},
                       {"of_limit", "1.0"},
                       {"wrong", "0"},
                       {"plan_us", "0.0"},
                       {"command", "\"x\""}};
    const Row fusco =
        with(limit, {{"impl", "\"fusco\""}, {"p50_us", "100.0"}, {"algbw_gbps", "10.0"}, {"of_limit", "0.8"}});
    rows_ = {limit, fusco};
    write(before_, rows_);
  }
  void TearDown() override {
    std::remove(before_.c_str());
    std::remove(after_.c_str());
  }
  static Row with(Row row, const Row& other) {
    for (const auto& [key, value] : other) row[key] = value;
    return row;
  }
  static void write(const std::string& file, const std::vector<Row>& rows) {
    std::ofstream stream(file);
    stream << "[";
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const char* before = i == 0 ? "{" : ",{";
      for (const auto& [key, value] : rows[i]) {
        stream << before << '"' << key << "\":" << value;
        before = ",";
      }
      stream << "}";
    }
    stream << "]";
  }
  Said compare() { return say(std::string(REPORT) + " --compare " + before_ + " " + after_); }

  std::string before_, after_;
  std::vector<Row> rows_;
};

TEST_F(Report, ShowsATable) {
  Said said = say(std::string(REPORT) + " " + before_);
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_THAT(said.text, HasSubstr("fusco is at 80 % of the limit"));
  EXPECT_THAT(said.text, HasSubstr("trace:b.json#3"));
  EXPECT_THAT(say(std::string(REPORT) + " --markdown " + before_).text, HasSubstr("| op | routing |"));
}

TEST_F(Report, EqualRunsAreNoRegression) {
  write(after_, rows_);
  Said said = compare();
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_THAT(said.text, HasSubstr("0 worse"));
}

TEST_F(Report, FindsARegression) {
  rows_[1]["of_limit"] = "0.6";
  write(after_, rows_);
  Said said = compare();
  EXPECT_EQ(said.code, 1);
  EXPECT_THAT(said.text, HasSubstr("WORSE by 25 %"));
}

TEST_F(Report, FindsWrongElementsAndMissingRows) {
  rows_[1]["wrong"] = "3";
  write(after_, rows_);
  EXPECT_EQ(compare().code, 1);
  write(after_, {rows_[0]});
  Said said = compare();
  EXPECT_EQ(said.code, 1);
  EXPECT_THAT(said.text, HasSubstr("GONE"));
}

TEST_F(Report, RefusesWhatIsNoResult) {
  std::ofstream(after_) << "{\"no\":\"rows\"}";
  EXPECT_EQ(say(std::string(REPORT) + " " + after_).code, 2);
  EXPECT_EQ(say(std::string(REPORT) + " /nowhere.json").code, 2);
}

TEST_F(Report, ShowsPartsAndNumbersOfMultiprocessors) {
  const Row few = with(rows_[1], {{"part", "\"few\""}, {"sms", "24"}, {"write_gbps", "100.0"}});
  const Row all = with(rows_[1], {{"part", "\"few\""}, {"sms", "0"}, {"write_gbps", "300.0"}, {"algbw_gbps", "30.0"}});
  const Row other = with(rows_[1], {{"part", "\"other\""}, {"algbw_gbps", "77.77"}});
  write(after_, {few, all, other});
  const std::string picture = temporary("sweep.png");
  const bool canPlot = say("python3 -c 'import matplotlib'").code == 0;
  Said said =
      say(std::string(REPORT) + " " + after_ + " --part few" + (canPlot ? " --plot " + picture : std::string()));
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_THAT(said.text, HasSubstr("sms"));
  EXPECT_THAT(said.text, HasSubstr("24"));
  EXPECT_THAT(said.text, Not(HasSubstr("77.77")));
  std::remove(picture.c_str());
  EXPECT_EQ(say(std::string(REPORT) + " " + after_ + " --part none").code, 2);
}

// 1 means that something got worse.
TEST_F(Report, WhatCannotBeReadOrWrittenEndsWithTwo) {
  Said said = say(std::string(REPORT) + " /bin/sh");
  EXPECT_EQ(said.code, 2) << said.text;
  EXPECT_THAT(said.text, HasSubstr("/bin/sh is not JSON"));
  said = say("(" + std::string(REPORT) + " --compare " + before_ + " " + before_ + " >/dev/full)");
  EXPECT_EQ(said.code, 2) << said.text;
  EXPECT_THAT(said.text, HasSubstr("report: cannot write: "));
  EXPECT_THAT(said.text, Not(HasSubstr("Traceback")));
}

TEST_F(Report, PlotsOrSaysWhatToInstall) {
  std::string picture = temporary("plot.png");
  Said said = say(std::string(REPORT) + " " + before_ + " --plot " + picture);
  if (say("python3 -c 'import matplotlib'").code == 0) {
    EXPECT_EQ(said.code, 0) << said.text;
    std::ifstream stream(picture, std::ios::binary);
    char head[4] = {};
    stream.read(head, 4);
    EXPECT_EQ(std::string(head + 1, 3), "PNG");
    std::remove(picture.c_str());
  } else {
    EXPECT_EQ(said.code, 2);
    EXPECT_THAT(said.text, HasSubstr("python3-matplotlib"));
  }
}

}  // namespace
