// libfusco_core as others meet it: what it exports, what it needs, and that loading it does nothing.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <set>
#include <sstream>

#include "house/includes.h"
#include "house/pattern.h"

namespace fusco::house {
namespace {

using testing::IsSubsetOf;

std::string outputOf(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return "popen failed";
  std::string output;
  char buffer[4096];
  for (std::size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) output.append(buffer, n);
  EXPECT_EQ(pclose(pipe), 0) << command << "\n" << output;
  return output;
}

std::set<std::string> matches(const std::string& text, const Pattern& pattern) {
  const std::vector<std::string> found = pattern.firstGroups(text);
  return {found.begin(), found.end()};
}

std::set<std::string> exportedSymbols() {
  return matches(outputOf("nm -D --defined-only --without-symbol-versions " FUSCO_CORE_LIBRARY),
                 Pattern("[0-9a-f]+ [TWDBRViu] (\\S+)"));
}

TEST(Library, ExportsWhatTheHeaderDeclaresAndNothingElse) {
  const std::string header = readFile(std::filesystem::path(FUSCO_SOURCE_DIR) / "include/fusco/fusco.h");
  const auto declared = matches(header, Pattern("FUSCO_API [^;(]*[ *](fusco[A-Za-z0-9]+)\\("));
  EXPECT_GT(declared.size(), 40u);
  EXPECT_EQ(exportedSymbols(), declared);
}

TEST(Library, NeedsOnlyTheCAndCppRunTime) {
  const auto needed =
      matches(outputOf("readelf -d " FUSCO_CORE_LIBRARY), Pattern("\\(NEEDED\\)[^\\[]*\\[([^\\]]+)\\]"));
  EXPECT_FALSE(needed.empty());
  EXPECT_THAT(needed,
              IsSubsetOf({"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libc++.so.1", "libc++abi.so.1",
                          "libunwind.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}));
}

TEST(Library, HasItsSoname) {
  EXPECT_THAT(outputOf("readelf -d " FUSCO_CORE_LIBRARY), testing::HasSubstr("Library soname: [libfusco_core.so.1]"));
}

int threadsOfThisProcess() {
  int threads = 0;
  for ([[maybe_unused]] const auto& task : std::filesystem::directory_iterator("/proc/self/task")) ++threads;
  return threads;
}

// In a process of its own, whose output is kept: 0 if all is well, else which check failed.
int loadQuietly() {
  const int before = threadsOfThisProcess();
  void* library = dlopen(FUSCO_CORE_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return 1;
  if (dlsym(library, "fuscoGetVersion") == nullptr) return 2;
  if (threadsOfThisProcess() != before) return 3;
  const std::string maps = readFile("/proc/self/maps");
  for (const char* name : {"libcuda", "libibverbs", "libnccl", "libmpi"}) {
    if (maps.find(name) != std::string::npos) return 4;
  }
  return dlclose(library) == 0 ? 0 : 5;
}

TEST(Library, LoadingStartsNoThreadAndSaysNothing) {
  int fds[2];
  ASSERT_EQ(pipe(fds), 0);
  // Settings that would make the library talk if it read them.
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    setenv("FUSCO_DEBUG", "TRACE", 1);
    setenv("FUSCO_NO_SUCH_SETTING", "1", 1);
    dup2(fds[1], STDOUT_FILENO);
    dup2(fds[1], STDERR_FILENO);
    _exit(loadQuietly());
  }
  close(fds[1]);
  std::string output;
  char buffer[512];
  for (ssize_t n; (n = read(fds[0], buffer, sizeof buffer)) > 0;) output.append(buffer, static_cast<std::size_t>(n));
  close(fds[0]);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0) << "check " << WEXITSTATUS(status);
  EXPECT_EQ(output, "");
}

}  // namespace
}  // namespace fusco::house
