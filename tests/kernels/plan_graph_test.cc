// Planning captured in a CUDA graph: replayed with new routing maps and new numbers of tokens each time.
#include <gtest/gtest.h>

#include "kernels/gpu_plans.h"

namespace fusco::kernels::testing {
namespace {

using plan::testing::Arena;
using plan::testing::World;

TEST(PlanGraph, aReplayPlansWhatIsThere) {
  if (!hasGpu()) GTEST_SKIP() << "no GPU here: cudaGetDeviceCount finds none";
  for (int seed = 0; seed < 40; ++seed) {
    std::mt19937 random(30000 + seed);
    World world = makeWorld(random, seed % 2 == 0 ? 300 : 8000);
    std::int64_t capacity = 0;
    for (const std::int64_t tokens : world.tokens) capacity = std::max(capacity, tokens);
    GpuPlans plans(world, capacity, 0);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    plans.plan(Way::whole, stream);
    cudaGraph_t captured = nullptr;
    check(cudaStreamEndCapture(stream, &captured), "cudaStreamEndCapture");
    cudaGraphExec_t graph = nullptr;
    check(cudaGraphInstantiate(&graph, captured, 0), "cudaGraphInstantiate");
    for (int step = 0; step < 5; ++step) {
      if (step > 0) world = makeWorld(random, 300, &world);
      plans.bring(world);
      check(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
      check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      const std::vector<Arena> expected = hostPlans(world);
      for (int rank = 0; rank < world.topology.ranks(); ++rank) {
        ASSERT_EQ(plans.difference(rank, expected[rank].get(), expected[rank].bytes), "")
            << "rank " << rank << ", seed " << seed << ", step " << step << ": " << describe(world);
      }
    }
    // Twice without a look in between: launches take turns with the counts.
    check(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
    check(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    const std::vector<Arena> expected = hostPlans(world);
    for (int rank = 0; rank < world.topology.ranks(); ++rank) {
      ASSERT_EQ(plans.difference(rank, expected[rank].get(), expected[rank].bytes), "") << "rank " << rank << ", twice";
    }
    cudaGraphExecDestroy(graph);
    cudaGraphDestroy(captured);
    cudaStreamDestroy(stream);
  }
}

}  // namespace
}  // namespace fusco::kernels::testing
