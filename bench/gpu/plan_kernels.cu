// How long planning on the GPU takes, ranks of one GPU in the same launches: as plain launches and from graphs. A graph
// holds many plannings, one after the other; a row is the minimum and median of its replays, per planning.
//
//   nvcc -O3 -std=c++20 -arch=sm_90 --expt-relaxed-constexpr -I. -Isrc -o plan_kernels bench/gpu/plan_kernels.cu
//     kernels/plan.cu src/plan/{analyse,frame,plan,planner,topology}.cc src/base/status.cc
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/plan.h"
#include "plan/frame.h"

using namespace fusco;
using namespace fusco::kernels;

namespace {

constexpr int kPlannings = 40;  // of a graph
constexpr int kReplays = 15;

void check(int error, int line) {
  if (error == 0) return;
  std::printf("line %d: %s\n", line, cudaGetErrorString(static_cast<cudaError_t>(error)));
  std::exit(1);
}
#define CHECK(call) check(call, __LINE__)

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, bytes + 256));
  CHECK(cudaMemset(memory, 0, bytes + 256));
  return memory;
}
template <typename T>
T* upload(const std::vector<T>& values) {
  void* memory = allocate(values.size() * sizeof(T));
  CHECK(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(memory);
}

struct Shape {
  const char* name;
  int ranks, local, tokens, topk, experts;
  plan::Options options;
  bool counted = false;  // the number of tokens is read from device memory
  int blocks = 0;
};

PlanArgs prepare(const Shape& shape) {
  const plan::Topology topology(std::vector<int>(shape.ranks, 0));
  plan::RoutingMap map;
  map.idBytes = 8;
  map.tokens = shape.tokens;
  map.topk = shape.topk;
  map.experts = shape.experts;
  PlanArgs args{};
  args.idBytes = map.idBytes;
  args.topk = map.topk;
  args.experts = map.experts;
  args.ranks = shape.ranks;
  args.nodes = 1;
  args.layout = shape.options.layout;
  args.dedup = shape.options.dedup;
  args.alignment = shape.options.alignment;
  args.maxTokens = shape.options.maxTokens;
  args.capacityRows = shape.options.capacityRows;
  args.countsRoom = std::max(shape.experts, shape.ranks);
  args.rankCount = shape.local;
  args.blocks = shape.blocks;
  std::mt19937 random(1);
  std::vector<int> all(shape.experts);
  for (int expert = 0; expert < shape.experts; ++expert) all[expert] = expert;
  std::vector<const PlanCounts*> counts;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    counts.push_back(static_cast<const PlanCounts*>(allocate(planCountsBytes(args.countsRoom))));
    if (rank >= shape.local) continue;
    const plan::Frame frame = plan::makeFrame(map, topology, rank, shape.options);
    std::vector<std::int64_t> ids;
    for (int token = 0; token < shape.tokens; ++token) {
      for (int slot = 0; slot < shape.topk; ++slot) {
        std::swap(all[slot], all[std::uniform_int_distribution<int>(slot, shape.experts - 1)(random)]);
        ids.push_back(all[slot]);
      }
    }
    PlanArgs::Rank& of = args.rank[rank];
    of.ids = upload(ids);
    of.weights = upload(std::vector<float>(ids.size(), 0.5f));
    of.tokens = shape.tokens;
    if (shape.counted) of.tokensUsed = upload(std::vector<std::int64_t>{shape.tokens});
    of.arena = allocate(frame.header.bytes);
    of.frame = upload(std::vector<plan::ArenaHeader>{frame.header});
    of.homes = upload(frame.homes);
    of.flows = upload(frame.flows);
    of.rank = rank;
    of.localExperts = frame.header.localExperts;
    of.flowCount = frame.header.flows;
    of.counts = const_cast<PlanCounts*>(counts.back());
    of.scratch = allocate(planScratchBytes(shape.experts, shape.ranks, 1));
    of.status = static_cast<PlanStatus*>(allocate(sizeof(PlanStatus)));
  }
  args.allCounts = upload(counts);
  return args;
}

struct Times {
  float least, median;
};
Times summary(std::vector<float> times) {
  std::sort(times.begin(), times.end());
  return {times.front(), times[times.size() / 2]};
}

// Microseconds for one call of `work`, of many in a graph or launched one by one.
Times measure(const std::function<void(cudaStream_t)>& work, bool fromGraph) {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  cudaGraphExec_t graph = nullptr;
  if (fromGraph) {
    cudaGraph_t captured = nullptr;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kPlannings; ++i) work(stream);
    CHECK(cudaStreamEndCapture(stream, &captured));
    CHECK(cudaGraphInstantiate(&graph, captured, 0));
    CHECK(cudaGraphDestroy(captured));
  }
  std::vector<float> times;
  for (int replay = -3; replay < kReplays; ++replay) {
    CHECK(cudaEventRecord(begin, stream));
    if (fromGraph) {
      CHECK(cudaGraphLaunch(graph, stream));
    } else {
      for (int i = 0; i < kPlannings; ++i) work(stream);
    }
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (replay >= 0) times.push_back(milliseconds * 1000 / kPlannings);
  }
  if (graph != nullptr) CHECK(cudaGraphExecDestroy(graph));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaStreamDestroy(stream));
  return summary(times);
}

void report(const Shape& shape) {
  const PlanArgs args = prepare(shape);
  const Times whole = measure([&](cudaStream_t stream) { CHECK(launchPlan(args, stream)); }, true);
  const Times plain = measure([&](cudaStream_t stream) { CHECK(launchPlan(args, stream)); }, false);
  const auto both = [&](cudaStream_t stream) {
    CHECK(launchPlanCount(args, stream));
    CHECK(launchPlanLay(args, stream));
  };
  const Times split = measure(both, true);
  const Times count = measure([&](cudaStream_t stream) { CHECK(launchPlanCount(args, stream)); }, true);
  std::printf("%-34s %6.2f %6.2f   %6.2f %6.2f   %6.2f %6.2f   %6.2f %6.2f\n", shape.name, whole.least, whole.median,
              plain.least, plain.median, split.least, split.median, count.least, count.median);
}

}  // namespace

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("no GPU here\n");
    return 1;
  }
  cudaDeviceProp properties{};
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, %d multiprocessors; microseconds, least and median\n", properties.name,
              properties.multiProcessorCount);
  std::printf("%-34s %-15s %-15s %-15s %s\n", "ranks x tokens, top-k of experts", "graph", "launched", "two kernels",
              "counting");
  plan::Options exact, aligned, dropping, tight, byRank, slotted, none;
  aligned.alignment = 128;
  dropping.capacityRows = 1 << 20;
  tight.capacityRows = 30000;
  byRank.layout = plan::Layout::rankOrder;
  slotted.layout = plan::Layout::slotted;
  slotted.maxTokens = 256;
  none.dedup = plan::Dedup::none;
  for (const Shape& shape : {
           Shape{"8 x 4096, 8 of 256", 8, 8, 4096, 8, 256, exact},
           Shape{"the same, 64 blocks", 8, 8, 4096, 8, 256, exact, false, 64},
           Shape{"the same, 132 blocks", 8, 8, 4096, 8, 256, exact, false, 132},
           Shape{"the same, aligned to 128", 8, 8, 4096, 8, 256, aligned},
           Shape{"the same, without dedup", 8, 8, 4096, 8, 256, none},
           Shape{"the same, in rank order", 8, 8, 4096, 8, 256, byRank},
           Shape{"the same, capacity that suffices", 8, 8, 4096, 8, 256, dropping, true},
           Shape{"the same, suffices, 132 blocks", 8, 8, 4096, 8, 256, dropping, true, 132},
           Shape{"the same, capacity that drops", 8, 8, 4096, 8, 256, tight, true},
           Shape{"8 x 1024, 8 of 256", 8, 8, 1024, 8, 256, exact},
           Shape{"8 x 512, 8 of 256", 8, 8, 512, 8, 256, exact},
           Shape{"8 x 256, slotted", 8, 8, 256, 8, 256, slotted},
           Shape{"8 x 128, 8 of 256", 8, 8, 128, 8, 256, exact},
           Shape{"8 x 128, slotted", 8, 8, 128, 8, 256, slotted},
           Shape{"8 x 64, 8 of 256", 8, 8, 64, 8, 256, exact},
           Shape{"8 x 32, 8 of 256", 8, 8, 32, 8, 256, exact},
           Shape{"8 x 16, 8 of 256", 8, 8, 16, 8, 256, exact},
           Shape{"8 x 1, 8 of 256", 8, 8, 1, 8, 256, exact},
           Shape{"8 x 1, slotted", 8, 8, 1, 8, 256, slotted},
           Shape{"1 x 4096, 8 of 256", 1, 1, 4096, 8, 256, exact},
           Shape{"1 x 32768, 8 of 256", 1, 1, 32768, 8, 256, exact},
           Shape{"1 of 8 x 4096, 8 of 256", 8, 1, 4096, 8, 256, exact},
           Shape{"1 of 64 x 4096, 8 of 256", 64, 1, 4096, 8, 256, exact},
           Shape{"16 of 64 x 4096, 8 of 256", 64, 16, 4096, 8, 256, exact},
           Shape{"8 x 4096, 32 of 4096", 8, 8, 4096, 32, 4096, exact},
       }) {
    report(shape);
  }
  return 0;
}
