// libfusco reaches every child of a shell: it must not be noticed there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "house/pattern.h"
#include "nccl/run.h"
#include "plugin/nccl/functions.h"

namespace fusco::test {
namespace {

using testing::HasSubstr;
using testing::Not;

// Settings that would make it talk if it read them.
const std::string kLoud =
    "FUSCO_DEBUG=TRACE FUSCO_STATS=1 FUSCO_NO_SUCH_SETTING=1 FUSCO_DEVICE=host LD_PRELOAD=" FUSCO_NCCL_LIBRARY " ";

void expectTheSame(const std::string& command) {
  const Result without = run("", command), with = run(kLoud, command);
  EXPECT_EQ(with.status, without.status) << command;
  EXPECT_EQ(with.output, without.output) << command;
}

bool isThere(const std::string& program) { return run("", "sh -c 'command -v " + program + "'").status == 0; }

TEST(Preload, isNotNoticedByCommands) {
  expectTheSame("/bin/true");
  expectTheSame("sh -c 'echo hello; exit 3'");
  expectTheSame("bash -c 'for i in 1 2 3; do (echo $i | cat); done'");
}

TEST(Preload, isNotNoticedByPython) {
  if (!isThere("python3")) GTEST_SKIP() << "no python3";
  expectTheSame("python3 -c 'import json, threading; print(json.dumps([1]), threading.active_count())'");
}

TEST(Preload, isNotNoticedByMpirun) {
  if (!isThere("mpirun")) GTEST_SKIP() << "no mpirun";
  const std::string two = "mpirun --allow-run-as-root --oversubscribe -np 2 sh -c 'echo hello'";
  ASSERT_EQ(run("", two).output, "hello\nhello\n") << "mpirun does not work here";
  expectTheSame(two);
}

TEST(Preload, bringsNoThreadAndNoOtherLibrary) {
  const Result result = run(kLoud, "bash -c 'ls /proc/$$/task | wc -l; cat /proc/$$/maps'");
  EXPECT_EQ(result.output.substr(0, 2), "1\n");
  EXPECT_THAT(result.output, HasSubstr("libfusco"));
  for (const char* name : {"libcuda", "libnccl", "libibverbs", "libmpi"})
    EXPECT_THAT(result.output, Not(HasSubstr(name)));
}

TEST(Library, NeedsOnlyTheCoreAndTheRunTime) {
  const Result result = run("", "readelf -d " FUSCO_NCCL_LIBRARY);
  const std::vector<std::string> needed =
      house::Pattern("\\(NEEDED\\)[^\\[]*\\[([^\\]]+)\\]").firstGroups(result.output);
  for (const std::string& name : needed) {
    EXPECT_THAT(name, testing::AnyOf("libfusco_core.so.1", "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1",
                                     "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"));
  }
  EXPECT_GT(needed.size(), 1u);
  EXPECT_THAT(result.output, HasSubstr("Library soname: [libfusco.so.1]"));
}

// A torch with NCCL inside: where its symbols are seen the calls are passed to it, and where they are not nobody asks
// us.
TEST(LinkedIn, IsFoundAndSaid) {
  if (!isThere("python3")) GTEST_SKIP() << "no python3";
  const std::string torch = FUSCO_NCCL_LINKED_IN "/libtorch_cuda.so";
  const auto python = [&](const std::string& more) {
    return run("FUSCO_STATS=1 LD_LIBRARY_PATH=" FUSCO_NCCL_LINKED_IN " LD_PRELOAD=" FUSCO_NCCL_LIBRARY,
               "python3 -c 'import ctypes; t = ctypes.CDLL(\"libtorch_cuda.so\"); v = ctypes.c_int(); " + more + "'")
        .output;
  };
  EXPECT_THAT(python("pass"), HasSubstr("libtorch_cuda.so is loaded and has made no communicator"));
  const std::string asked = python("ctypes.CDLL(None).ncclGetVersion(ctypes.byref(v)); print(v.value)");
  EXPECT_THAT(asked, HasSubstr("NCCL is linked into " + torch));
  EXPECT_THAT(asked, HasSubstr("23003\n"));
}

// A profiler has NCCL's names without NCCL: its calls come back to libfusco by their other names, and go on from there.
TEST(LinkedIn, AWrapperIsNotTakenForNccl) {
  if (!isThere("python3")) GTEST_SKIP() << "no python3";
  const Result asked =
      run("LD_LIBRARY_PATH=$(dirname " FUSCO_NCCL_DOUBLE ") LD_PRELOAD='" FUSCO_NCCL_WRAPPER " " FUSCO_NCCL_LIBRARY "'",
          "python3 -c 'import ctypes; v = ctypes.c_int(); ctypes.CDLL(None).ncclGetVersion(ctypes.byref(v)); "
          "print(v.value)'",
          20);
  EXPECT_EQ(asked.output, "23003\n");
  EXPECT_EQ(asked.status, 0);
}

// What a loader does that opens NCCL by name and looks into the handle.
TEST(Shim, leadsToLibfusco) {
  if (!isThere("python3")) GTEST_SKIP() << "no python3";
  const std::string look =
      "python3 -c 'import ctypes; l = ctypes.CDLL(\"libnccl.so.2\"); v = ctypes.c_int(); print(l.ncclGetVersion("
      "ctypes.byref(v)), v.value)'";
  EXPECT_EQ(run("FUSCO_DEVICE=host LD_LIBRARY_PATH=" FUSCO_NCCL_SHIM_FOLDER, look).output, "0 22809\n");
  // In device mode the shim is not taken for the real library, which is the one that is named.
  EXPECT_EQ(run("FUSCO_NCCL_LIB=" FUSCO_NCCL_DOUBLE " LD_LIBRARY_PATH=" FUSCO_NCCL_SHIM_FOLDER, look).output,
            std::to_string(1000 + static_cast<int>(nccl::Function::GetVersion)) + " 23003\n");
}

}  // namespace
}  // namespace fusco::test
