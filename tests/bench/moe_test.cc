// moe_nccl as its users see it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <sstream>

#include "bench/program.h"

namespace {

using testing::HasSubstr;

const std::string kProgram = MOE_NCCL;
const std::string kQuick = kProgram + " -w 1 -n 2 --rounds 2 --timeout 60 ";

// The last column of each state's row.
std::map<std::string, long> wrongOf(const std::string& text) {
  std::map<std::string, long> wrong;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::string state = line.substr(0, line.find(' '));
    if (state == "unchanged" || state == "indexed" || state == "shuffle")
      wrong[state] = std::strtol(line.c_str() + line.rfind(' '), nullptr, 10);
  }
  return wrong;
}

TEST(MoeNccl, allStatesGiveTheSameAndTheRightOutput) {
  for (const char* shape :
       {"--ranks 2 --tokens 64 --hidden 256 --inner 4", "--ranks 1 --tokens 9 --hidden 40 --experts 5 --topk 2",
        "--ranks 4 --tokens 33 --hidden 100 --experts 10 --topk 3 --inner 0",
        "--ranks 3 --tokens 50 --hidden 24 --experts 8 --routing zipf:1.2 --inner 3",
        "--ranks 2 --tokens 40 --hidden 64 --routing imbalanced --inner 2 --experts 9"}) {
    const Said said = say(kQuick + shape);
    EXPECT_EQ(said.code, 0) << shape << "\n" << said.text;
    const auto wrong = wrongOf(said.text);
    EXPECT_EQ(wrong.size(), 3u) << said.text;
    for (const auto& [state, count] : wrong) EXPECT_EQ(count, 0) << shape << ", " << state << "\n" << said.text;
  }
}

TEST(MoeNccl, aSpoiledByteIsFound) {
  for (const char* state : {"unchanged", "indexed", "shuffle"}) {
    const Said said = say(kQuick + "--ranks 2 --tokens 16 --hidden 64 --inner 2 --corrupt " + state);
    EXPECT_EQ(said.code, 1) << said.text;
    auto wrong = wrongOf(said.text);
    EXPECT_GT(wrong["unchanged"] + wrong["indexed"] + wrong["shuffle"], 0) << said.text;
  }
}

TEST(MoeNccl, whatCannotBeDoneIsSaid) {
  EXPECT_THAT(say(kProgram + " --help").text, HasSubstr("--inner"));
  EXPECT_EQ(say(kProgram + " --device abacus").code, 2);
  EXPECT_EQ(say(kProgram + " --routing nonsense").code, 2);
}

}  // namespace
