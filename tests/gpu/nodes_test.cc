// Shuffles of ranks on several nodes that share the GPU: what passes between the nodes goes through slices, by shared
// memory or, with FUSCO_NET=tcp, by loopback TCP.
#include <gtest/gtest.h>

#include "gpu/space.h"

namespace fusco::test {
namespace {

struct Shape {
  std::vector<int> nodes;  // by rank
  std::int64_t sliceBytes;
  int cases;
};

void PrintTo(const Shape& shape, std::ostream* out) {
  *out << shape.nodes.size() << "_ranks_on_" << shape.nodes.back() + 1 << "_nodes_slices_of_" << shape.sliceBytes;
}

class GpuNodes : public GpuTest, public ::testing::WithParamInterface<Shape> {};

TEST_P(GpuNodes, IsWhatTheOracleSays) {
  const Shape& shape = GetParam();
  const int ranks = static_cast<int>(shape.nodes.size());
  const Cases some(shape.cases, ranks);
  const std::vector<std::string> wrong = runGpuRanks(
      ranks,
      [&](fuscoComm_t comm, int rank) {
        GpuSpace space;
        std::string text;
        for (std::int64_t i = 0; i < some.count && text.empty(); ++i)
          text = runRank(gpuCase(some.seed(i), ranks), comm, rank, space);
        return text;
      },
      0, shape.nodes, shape.sliceBytes);
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

INSTANTIATE_TEST_SUITE_P(Nodes, GpuNodes,
                         ::testing::Values(Shape{{0, 1}, 16384, 150}, Shape{{0, 0, 0, 0, 1, 1, 1, 1}, 65536, 100},
                                           Shape{{0, 1, 1, 1, 2}, 16384, 100}, Shape{{0, 1, 1}, 4096, 100}));

// Whoever captures is told why that cannot be. Nothing is moved, and the communicator stays of use.
TEST_F(GpuTest, NodesCannotBeCaptured) {
  const std::vector<std::string> wrong =
      runGpuRanks(2,
                  [&](fuscoComm_t comm, int) -> std::string {
                    GpuSpace space;
                    GpuBytes ids(space, 64);
                    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
                    config.expertIds = ids.send();
                    config.tokens = 8;
                    config.topk = 1;
                    config.experts = 2;
                    space.settle();
                    CUDA_OK(cudaStreamBeginCapture(space.stream(), cudaStreamCaptureModeThreadLocal));
                    fuscoPlan_t plan = nullptr;
                    const fuscoResult_t result = fuscoPlanCreate(&plan, &config, comm, space.stream());
                    const std::string text = fuscoGetLastError(nullptr);
                    cudaGraph_t graph = nullptr;
                    cudaStreamEndCapture(space.stream(), &graph);
                    if (graph != nullptr) cudaGraphDestroy(graph);
                    cudaGetLastError();
                    if (result != fuscoInvalidUsage || text.find("cannot be captured") == std::string::npos)
                      return text;
                    // Nothing was moved: the communicator can be used.
                    FUSCO_OK(fuscoPlanCreate(&plan, &config, comm, space.stream()));
                    FUSCO_OK(fuscoPlanDestroy(plan));
                    return "";
                  },
                  0, {0, 1});
  for (const std::string& text : wrong) EXPECT_EQ(text, "");
}

}  // namespace
}  // namespace fusco::test
