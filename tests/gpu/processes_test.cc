// Processes shuffle, keep to their GPUs, and survive each other.
#include "gpu/processes.h"

#include <cuda.h>
#include <signal.h>
#include <unistd.h>

#include <map>
#include <type_traits>

namespace fusco::test {
namespace {

template <typename Function>
Function* driver(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  CUDA_OK(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found));
#else
  CUDA_OK(cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found));
#endif
  if (entry == nullptr) throw std::runtime_error(std::string("the driver lacks ") + name);
  return reinterpret_cast<Function*>(entry);
}
void okDriver(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) throw std::runtime_error(std::string(what) + ": " + std::to_string(result));
}

// Memory as torch's expandable segments have it: pieces of 2 MiB that were mapped one behind the other. Tensors begin
// somewhere in one piece and end in another.
class PieceSpace : public GpuSpace {
 public:
  void* allocate(std::size_t bytes, bool) override {
    const std::size_t size = (kBefore + bytes + kPiece - 1) / kPiece * kPiece;
    std::vector<CUdeviceptr>& kept = free_[size];
    if (kept.empty()) kept.push_back(make(size));
    const CUdeviceptr start = kept.back();
    kept.pop_back();
    sizes_[start + kBefore] = size;
    return reinterpret_cast<void*>(start + kBefore);
  }
  void release(void* pointer, bool) override {
    const auto at = reinterpret_cast<CUdeviceptr>(pointer);
    free_[sizes_.at(at)].push_back(at - kBefore);
  }
  // Other memory behind the same addresses.
  void remake() {
    settle();
    for (auto& [size, kept] : free_) {
      for (const CUdeviceptr start : kept) {
        okDriver(driver<decltype(cuMemUnmap)>("cuMemUnmap")(start, size), "cuMemUnmap");
        map(start, size);
      }
    }
  }

 private:
  static constexpr std::size_t kPiece = std::size_t{2} << 20, kBefore = kPiece - 4096;
  CUdeviceptr make(std::size_t size) {
    CUdeviceptr start = 0;
    okDriver(driver<decltype(cuMemAddressReserve)>("cuMemAddressReserve")(&start, size, 0, 0, 0),
             "cuMemAddressReserve");
    map(start, size);
    return start;
  }
  static void map(CUdeviceptr start, std::size_t size) {
    CUmemAllocationProp kind{};
    kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    kind.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    CUDA_OK(cudaGetDevice(&kind.location.id));
    for (std::size_t at = 0; at < size; at += kPiece) {
      CUmemGenericAllocationHandle piece = 0;
      okDriver(driver<decltype(cuMemCreate)>("cuMemCreate")(&piece, kPiece, &kind, 0), "cuMemCreate");
      okDriver(driver<decltype(cuMemMap)>("cuMemMap")(start + at, kPiece, 0, piece, 0), "cuMemMap");
      okDriver(driver<decltype(cuMemRelease)>("cuMemRelease")(piece), "cuMemRelease");
    }
    CUmemAccessDesc access{};
    access.location = kind.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    okDriver(driver<decltype(cuMemSetAccess)>("cuMemSetAccess")(start, size, &access, 1), "cuMemSetAccess");
  }

  std::map<std::size_t, std::vector<CUdeviceptr>> free_;
  std::map<CUdeviceptr, std::size_t> sizes_;
};

template <typename SomeSpace = GpuSpace>
void runWorld(const World& world, std::int64_t cases, bool apart = false, int maxSms = 0) {
  const Cases some(cases, 600 + world.ranks);
  const std::vector<std::string> wrong = runRanks(
      world,
      [&](Rank& self) {
        if (apart) apartFromNow();
        fuscoComm_t comm = self.connect(0, onGpu(self, maxSms));
        {
          SomeSpace space;
          if (!world.multiNode()) space.setRanks(world.ranks, world.threadsPerProcess);
          for (std::int64_t i = 0; i < some.count; ++i) {
            if constexpr (std::is_same_v<SomeSpace, PieceSpace>) {
              if (i % 5 == 4) space.remake();
            }
            const std::string text = runRank(gpuCase(some.seed(i), world.ranks), comm, self.rank(), space);
            if (text.empty()) continue;
            fuscoCommAbort(comm);
            throw std::runtime_error(text);
          }
          self.barrier();
        }
        FUSCO_OK(fuscoCommFinalize(comm));
        FUSCO_OK(fuscoCommDestroy(comm));
      },
      static_cast<int>(60 + some.count / 2));
  for (const std::string& text : wrong) EXPECT_EQ(text, "") << "repeat with FUSCO_TEST_SEED=<seed>";
}

TEST_F(GpuProcesses, TwoRanks) { runWorld({"two", 2, 1, {}, true, 16384}, 60); }
TEST_F(GpuProcesses, FourRanks) { runWorld({"four", 4, 1, {}, true, 16384}, 30); }
TEST_F(GpuProcesses, TwoProcessesOfTwoThreads) { runWorld({"two of two threads", 4, 2, {}, true, 16384}, 30); }
// Counted in launches of four ranks, laid in launches of one.
TEST_F(GpuProcesses, TwoProcessesOfFourThreads) { runWorld({"two of four threads", 8, 4, {}, true, 16384}, 16); }

TEST_F(GpuProcesses, TwoRanksWhoseMemoryIsMappedInPieces) { runWorld<PieceSpace>({"two", 2, 1, {}, true, 16384}, 20); }

TEST_F(GpuProcesses, TwoRanksAsOnGpusOfTheirOwn) { runWorld({"two, apart", 2, 1, {}, true, 16384}, 30, true); }
TEST_F(GpuProcesses, FourRanksAsOnGpusOfTheirOwn) { runWorld({"four, apart", 4, 1, {}, true, 16384}, 12, true); }
TEST_F(GpuProcesses, TwoRanksOfFewMultiprocessors) { runWorld({"two, few", 2, 1, {}, true, 16384}, 20, true, 9); }

TEST_F(GpuProcesses, TwoNodesOfTwoProcesses) { runWorld({"two nodes of two", 4, 1, {0, 0, 1, 1}, true, 16384}, 20); }

// Threads of the library's own, as an init that does not block and started operations have, begin with GPU 0.
TEST_F(GpuProcesses, NoThreadMakesAContextOnAnotherGpu) {
  constexpr int kTokens = 20, kTopk = 2, kRowBytes = 64;
  const std::string oneGpu = "all ranks are on one GPU";
  const std::vector<std::string> ends = runRanks({"two", 2, 1, {}, true, 16384}, [&](Rank& self) {
    if (gpuOfRank(1, 2) == 0) throw std::runtime_error(oneGpu);
    fuscoConfig_t config = onGpu(self);
    config.blocking = 0;
    fuscoComm_t comm = self.connect(0, config);
    fuscoResult_t state = fuscoInProgress;
    while (state == fuscoInProgress) FUSCO_OK(fuscoCommGetAsyncError(comm, &state));
    FUSCO_OK(state);
    {
      GpuSpace space;
      GpuBytes ids(space, kTokens * kTopk * 8), input(space, kTokens * kRowBytes), output(space, 4 * input.here.size());
      ids.send();
      space.settle();
      fuscoPlanConfig_t routing = FUSCO_PLAN_CONFIG_INIT;
      routing.expertIds = ids.there();
      routing.tokens = kTokens;
      routing.topk = kTopk;
      routing.experts = 4;
      fuscoPlan_t plan = nullptr;
      FUSCO_OK(fuscoPlanCreate(&plan, &routing, comm, space.stream()));
      fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
      args.input = input.there();
      args.output = output.there();
      args.rowBytes = kRowBytes;
      FUSCO_OK(fuscoDispatchStart(plan, &args, space.stream()));
      FUSCO_OK(fuscoFinish(plan));
      space.settle();
      FUSCO_OK(fuscoPlanDestroy(plan));
    }
    FUSCO_OK(fuscoCommDestroy(comm));
    unsigned flags = 0;
    int active = 0;
    okDriver(
        driver<decltype(cuDevicePrimaryCtxGetState)>("cuDevicePrimaryCtxGetState")(1 - self.rank(), &flags, &active),
        "cuDevicePrimaryCtxGetState");
    REQUIRE(active == 0);
  });
  if (ends[0].find(oneGpu) != std::string::npos) GTEST_SKIP() << oneGpu;
  for (const std::string& text : ends) EXPECT_EQ(text, "");
}

// A rank that dies is told of, and the others' contexts live: they go on shuffling without it.
TEST_F(GpuProcesses, AKilledRankLeavesTheOthersAlive) {
  const World world{"three, one is killed", 3, 1, {}, true, 16384};
  const std::vector<std::string> ends = runRanks(
      world,
      [&](Rank& self) {
        fuscoConfig_t config = onGpu(self);
        config.operationTimeoutMs = 10000;
        fuscoComm_t comm = self.connect(0, config);
        GpuSpace space;
        const std::string first = runRank(randomCase(4003, 3), comm, self.rank(), space);
        if (!first.empty()) throw std::runtime_error(first);
        self.barrier();
        if (self.rank() == 2) kill(getpid(), SIGKILL);
        std::string text;
        try {
          text = runRank(randomCase(5003, 3), comm, self.rank(), space);
        } catch (const std::exception& e) {
          text = e.what();
        }
        requireContains(text, "rank 2");
        FUSCO_OK(fuscoCommDestroy(comm));
        CUDA_OK(cudaDeviceSynchronize());
        fuscoUniqueId id;
        FUSCO_OK(fuscoGetUniqueId(&id));
        fuscoComm_t alone = nullptr;
        FUSCO_OK(fuscoCommInitRankConfig(&alone, 1, id, 0, &config));
        const std::string last = runRank(randomCase(6001, 1), alone, 0, space);
        if (!last.empty()) throw std::runtime_error(last);
        FUSCO_OK(fuscoCommDestroy(alone));
      },
      60);
  expectLastKilled(ends);
}

}  // namespace
}  // namespace fusco::test
