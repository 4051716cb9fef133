#include "house/includes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace fusco::house {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(Includes, FollowTheTable) {
  int files = 0;
  EXPECT_THAT(checkTree(FUSCO_SOURCE_DIR, files), IsEmpty());
  EXPECT_GT(files, 20);
}

TEST(Includes, RoomsAreFoundByPath) {
  EXPECT_EQ(roomOf("src/plan/layout.h"), "plan");
  EXPECT_EQ(roomOf("src/transport/tcp/link.cc"), "transport");
  EXPECT_EQ(roomOf("src/api.cc"), "api");
  EXPECT_EQ(roomOf("bench/shuffle/main.cc"), "bench");
  EXPECT_EQ(roomOf("README.md"), "");
}

// Planted breaches: the check must see each of them.
TEST(Includes, BreachesAreSeen) {
  const auto check = [](const char* path, const char* line) { return checkIncludes(path, line); };
  EXPECT_THAT(check("src/plan/plan.cc", "\n#include \"exec/executor.h\"\n"),
              ElementsAre("src/plan/plan.cc:2: plan may not include exec/executor.h"));
  EXPECT_THAT(check("src/base/log.cc", "#include \"plan/layout.h\""), ElementsAre(HasSubstr("base may not")));
  EXPECT_THAT(check("src/exec/host.cc", "#include \"plan/plan.h\""), ElementsAre(HasSubstr("plan/plan.h")));
  EXPECT_THAT(check("src/transport/transport.h", "#include \"exec/executor.h\""), ElementsAre(HasSubstr("transport")));
  EXPECT_THAT(check("src/comm/fabric.cc", "  #  include \"plan/plan.h\""), ElementsAre(HasSubstr("plan/plan.h")));
  EXPECT_THAT(check("src/engine/engine.cc", "#include \"fusco/fusco.h\""), ElementsAre(HasSubstr("fusco/fusco.h")));
  EXPECT_THAT(check("src/engine/engine.cc", "#include <fusco/fusco.h>"), ElementsAre(HasSubstr("fusco/fusco.h")));
  EXPECT_THAT(check("bench/shuffle/main.cc", "#include \"exec/executor.h\""), ElementsAre(HasSubstr("bench may not")));
  EXPECT_THAT(check("bench/plan/plan_perf.cc", "#include \"engine/engine.h\""),
              ElementsAre(HasSubstr("bench may not")));
  EXPECT_THAT(check("plugin/nccl/face.cc", "#include \"base/environment.h\""), ElementsAre(HasSubstr("plugin may not")));
  EXPECT_THAT(check("kernels/place.cu", "#include \"plan/plan.h\""), ElementsAre(HasSubstr("kernels may not")));
  EXPECT_THAT(check("src/engine/engine.cc", "#include \"../plan/plan.h\""), ElementsAre(HasSubstr("begin at src/")));
  EXPECT_THAT(check("src/engine/stream.cc", "#include <cuda_runtime.h>"), ElementsAre(HasSubstr("at run time")));
  EXPECT_THAT(check("bench/shuffle/main.cc", "#include <mpi.h>"), ElementsAre(HasSubstr("at run time")));
  EXPECT_THAT(check("src/attic/old.cc", ""), ElementsAre(HasSubstr("no room")));
}

TEST(Includes, WhatTheTableAllowsPasses) {
  EXPECT_THAT(checkIncludes("src/engine/engine.cc",
                            "#include \"plan/plan.h\"\n#include \"exec/executor.h\"\n#include <vector>"),
              IsEmpty());
  EXPECT_THAT(checkIncludes("src/exec/host.cc", "#include \"exec/host.h\"\n#include \"plan/layout.h\""), IsEmpty());
  EXPECT_THAT(checkIncludes("src/api/api.cc", "#include \"fusco/fusco.h\"\n#include \"engine/engine.h\""), IsEmpty());
  EXPECT_THAT(checkIncludes("src/exec/cuda.h", "#include \"kernels/launch.h\""), IsEmpty());
  EXPECT_THAT(checkIncludes("bench/plan/plan_perf.cc", "#include \"plan/plan.h\"\n#include \"base/clock.h\""),
              IsEmpty());
  EXPECT_THAT(checkIncludes("src/exec/cuda.cc", "#include <cuda_runtime_api.h>"), IsEmpty());
  EXPECT_THAT(checkIncludes("bench/peers/mpi.cc", "#include <mpi.h>"), IsEmpty());
}

}  // namespace
}  // namespace fusco::house
