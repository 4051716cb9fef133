// What a profiler is told: calls, and the steps of operations. In builds with the toolkit's nvtx3.
#include "exec/ranges.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include "fusco/fusco.h"

namespace fusco::exec {
namespace {

TEST(Ranges, areSeenByAProfiler) {
  ASSERT_TRUE(rangesBuilt());
  // Looked at when the first range begins.
  ASSERT_EQ(setenv("NVTX_INJECTION64_PATH", FUSCO_TEST_INJECTION, 1), 0);
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess);
  fuscoComm_t comm = nullptr;
  ASSERT_EQ(fuscoCommInitRank(&comm, 1, id, 0), fuscoSuccess) << fuscoGetLastError(nullptr);
  const char out[64] = {};
  char in[64];
  ASSERT_EQ(fuscoGroupStart(), fuscoSuccess);
  ASSERT_EQ(fuscoSend(out, 64, fuscoUint8, 0, comm, nullptr), fuscoSuccess);
  ASSERT_EQ(fuscoRecv(in, 64, fuscoUint8, 0, comm, nullptr), fuscoSuccess);
  ASSERT_EQ(fuscoGroupEnd(), fuscoSuccess) << fuscoGetLastError(nullptr);
  ASSERT_EQ(fuscoCommDestroy(comm), fuscoSuccess);

  void* const injected = dlopen(FUSCO_TEST_INJECTION, RTLD_NOW | RTLD_NOLOAD);
  ASSERT_NE(injected, nullptr) << "nobody has loaded the profiler";
  const auto seen = reinterpret_cast<int (*)(const char*)>(dlsym(injected, "rangesSeen"));
  const auto open = reinterpret_cast<int (*)()>(dlsym(injected, "rangesOpen"));
  ASSERT_NE(seen, nullptr);
  ASSERT_NE(open, nullptr);
  EXPECT_EQ(seen("fuscoSend"), 1);
  EXPECT_EQ(seen("fuscoGroupEnd"), 1);
  EXPECT_GE(seen("transfers: place"), 1);
  EXPECT_EQ(open(), 0);
}

}  // namespace
}  // namespace fusco::exec
