// What must not stand in the repository. The words are put together here, so that this file does not hold them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string_view>

#include "house/includes.h"
#include "house/pattern.h"

namespace fusco::house {
namespace {

using testing::IsEmpty;
using testing::SizeIs;

const Pattern& forbidden() {
  static const Pattern words(
      "\\bTO"
      "DO\\b|\\bFIX"
      "ME\\b|\\bX"
      "XX\\b|\\b[Ss]tu"
      "bs?\\b|[Nn]ot (yet )?imple"
      "mented|\\bun"
      "implemented\\b|"
      "(^|[^A-Za-z0-9_.])/wo"
      "rk/|/tmp/br"
      "ief|/home/[a-z]");
  return words;
}

// Whether a line may hold one of them: the expression is far slower than this.
bool mayHold(const std::string& line) {
  static constexpr std::string_view kParts[] = {
      "TO"
      "DO",
      "FIX"
      "ME",
      "X"
      "XX",
      "tu"
      "b",
      "mented",
      "wo"
      "rk/",
      "/tmp/",
      "/home/"};
  return std::any_of(std::begin(kParts), std::end(kParts),
                     [&](std::string_view part) { return line.find(part) != std::string::npos; });
}

std::vector<std::string> findForbidden(const std::string& path, const std::string& text) {
  std::vector<std::string> found;
  std::istringstream lines(text);
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    // Long lines are data.
    if (line.size() < 1000 && mayHold(line) && forbidden().isIn(line)) {
      found.push_back(path + ":" + std::to_string(number) + ": " + line);
    }
  }
  return found;
}

TEST(Words, NothingUnfinishedAndNoForeignPaths) {
  int files = 0;
  for (const std::string& path : repositoryFiles(FUSCO_SOURCE_DIR)) {
    static const Pattern text(".*\\.(c|cc|h|hpp|cu|cuh|cmake|txt|in|md|py|sh|map)|.*/run|\\.ci/.*");
    if (!text.isAll(path)) continue;
    ++files;
    EXPECT_THAT(findForbidden(path, readFile(std::filesystem::path(FUSCO_SOURCE_DIR) / path)), IsEmpty());
  }
  EXPECT_GT(files, 30);
}

TEST(Words, PlantedOnesAreSeen) {
  EXPECT_THAT(findForbidden("x",
                            "int a;\n// TO"
                            "DO: b\n"),
              SizeIs(1));
  EXPECT_THAT(findForbidden("x",
                            "throw \"not imple"
                            "mented\";"),
              SizeIs(1));
  EXPECT_THAT(findForbidden("x",
                            "cd /wo"
                            "rk/main"),
              SizeIs(1));
  EXPECT_THAT(findForbidden("x", "stubborn wording, network/work, worktodo"), IsEmpty());
}

}  // namespace
}  // namespace fusco::house
