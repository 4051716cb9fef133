// Pages that are made from code, or hold a copy of it, agree with it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/environment.h"
#include "house/includes.h"

namespace fusco::house {
namespace {

const std::filesystem::path kRoot = FUSCO_SOURCE_DIR;

TEST(Documents, EnvironmentPageIsTheTable) {
  EXPECT_EQ(readFile(kRoot / "docs/environment.md"), environmentMarkdown())
      << "cmake --build <folder> --target environment_page writes it anew";
}

TEST(Documents, ReadmeHoldsTheExampleThatIsCompiled) {
  const std::string source = readFile(kRoot / "tests/house/readme_example.cc");
  const std::string from = "// [readme]\n", to = "// [/readme]\n";
  const std::size_t begin = source.find(from), end = source.find(to);
  ASSERT_NE(begin, std::string::npos);
  ASSERT_NE(end, std::string::npos);
  EXPECT_THAT(readFile(kRoot / "README.md"),
              testing::HasSubstr(source.substr(begin + from.size(), end - begin - from.size())));
}

}  // namespace
}  // namespace fusco::house
