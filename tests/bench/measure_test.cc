// bench/gpu/measure with programs that only pretend: what it runs, how it ends what hangs, and what it says in the end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <filesystem>
#include <fstream>

#include "bench/json.h"
#include "bench/program.h"

namespace {

using testing::HasSubstr;
using testing::Not;

const std::string kMeasure = MEASURE;

class Measure : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = temporary("measure");
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ + "/" + name) << "#!/bin/bash\n" << text;
    chmod((folder_ + "/" + name).c_str(), 0755);
  }
  // Writes rows as shuffle_perf does, dispatch and combine, at `share` of the limit.
  void writePerf(const std::string& share, const std::string& more = "") {
    write("shuffle_perf", more + R"SH(
while [ $# -gt 0 ]; do
  case $1 in -J) out=$2; shift ;; --tokens) tokens=${2%%:*}; shift ;; --ranks) ranks=$2; shift ;; esac
  shift
done
row() {
  echo "{\"impl\":\"$1\",\"op\":\"$2\",\"gpus\":1,\"sms\":0,\"ranks\":$ranks,\"tokens\":$tokens,\"p50_us\":$3,\"of_limit\":$4"
  echo ",\"plan_us\":18,\"wrong\":0,\"write_gbps\":2300}"
}
share=)SH" + share + R"SH(
echo "[$(row limit dispatch 1570 1),$(row fusco dispatch 1600 $share),$(row fusco combine 1500 1)" >"$out"
echo ",$(row staged dispatch 8000 0.2)]" >>"$out"
)SH");
  }
  std::string folder_;
};

TEST_F(Measure, SaysWhatWasReachedAndWhatWasMissed) {
  writePerf("0.98");
  Said said = say(kMeasure + " " + folder_ + " --gpus 1 --only 'x 4096' --out " + folder_ + "/out");
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_THAT(said.text, HasSubstr("8 ranks x 4096: ok"));
  EXPECT_THAT(said.text, testing::ContainsRegex("8 x 4096: dispatch with planning[^\n]*98  yes"));
  EXPECT_THAT(said.text, testing::ContainsRegex("4 x 4096: dispatch, times faster than staged[^\n]* 5  yes"));
  EXPECT_THAT(said.text, testing::ContainsRegex("8 x 1: dispatch with planning[^\n]*not seen"));
  writePerf("0.90");
  EXPECT_THAT(say(kMeasure + " " + folder_ + " --gpus 1 --only 'x 4096' --out " + folder_ + "/out").text,
              testing::ContainsRegex("8 x 4096: dispatch with planning[^\n]*90  NO"));
  const Json rows = Json::ofFile(folder_ + "/out/rows.json");
  EXPECT_GE(rows.size(), 8u);
  EXPECT_EQ(rows[0]["part"], "8 ranks x 4096");
}

TEST_F(Measure, EndsWhatHangsAndGoesOn) {
  writePerf("0.98", "case \"$*\" in *'--ranks 8 '*) trap '' TERM; sleep 100 & wait; sleep 100 ;; esac\n");
  const auto begin = std::chrono::steady_clock::now();
  Said said = say(kMeasure + " " + folder_ +
                  " --gpus 1 --seconds 2 --grace 0.3 --only '8 ranks x 4096,4 ranks x 4096' --out " + folder_ + "/out");
  EXPECT_EQ(said.code, 1);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
  EXPECT_THAT(said.text, HasSubstr("8 ranks x 4096: ENDED after"));
  EXPECT_THAT(said.text, HasSubstr("4 ranks x 4096: not begun"));
}

TEST_F(Measure, NamesFailuresAndWhatIsMissing) {
  write("shuffle_perf", "echo something is wrong; exit 3\n");
  Said said = say(kMeasure + " " + folder_ + " --gpus 1 --only '4 ranks,smoke' --out " + folder_ + "/out");
  EXPECT_EQ(said.code, 1);
  EXPECT_THAT(said.text, HasSubstr("4 ranks x 4096: FAILED (exit 3)"));
  EXPECT_THAT(said.text, HasSubstr("| something is wrong"));
  EXPECT_THAT(said.text, HasSubstr("missing: test_gpu_shuffle"));
}

TEST_F(Measure, SeveralGpusHavePartsOfTheirOwn) {
  EXPECT_THAT(say(kMeasure + " . --gpus 8 --list").text,
              HasSubstr("8 GPUs x 4096: shuffle_perf --device cuda --ranks 8 --gpus 8"));
  EXPECT_THAT(say(kMeasure + " . --gpus 2 --list").text, Not(HasSubstr("4 GPUs")));
  EXPECT_THAT(say(kMeasure + " . --gpus 1 --nccl lib.so --list").text, HasSubstr("fusco,nccl"));
}

}  // namespace
