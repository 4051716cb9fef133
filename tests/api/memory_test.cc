// Memory: what the library holds is what it says that it holds, from where the caller wants it, and all of it comes
// back.
#include <cstdlib>
#include <map>
#include <mutex>

#include "api/worlds.h"

namespace fusco::test {
namespace {

TEST(Memory, windowsAreZeroedAndChecked) {
  runWell({"one rank", 1, 1, {}, true, 16384}, [](Rank&) {
    void* memory = nullptr;
    FUSCO_OK(fuscoMemAlloc(&memory, 100000));
    for (std::size_t i = 0; i < 100000; ++i) REQUIRE(static_cast<unsigned char*>(memory)[i] == 0);
    EXPECT_CODE(fuscoMemFree(static_cast<char*>(memory) + 64), fuscoInvalidArgument);
    FUSCO_OK(fuscoMemFree(memory));
    EXPECT_CODE(fuscoMemFree(memory), fuscoInvalidArgument);
    FUSCO_OK(fuscoMemFree(nullptr));
    EXPECT_CODE(fuscoMemAlloc(nullptr, 8), fuscoInvalidArgument);
    EXPECT_CODE(fuscoMemAlloc(&memory, 0), fuscoInvalidArgument);
    EXPECT_CODE(fuscoMemAlloc(&memory, static_cast<std::size_t>(-1)), fuscoInvalidArgument);
    REQUIRE(memory == nullptr);
  });
}

// The caller's allocator.
struct Book {
  std::mutex mutex;
  std::map<void*, std::size_t> held;
  std::size_t calls = 0;
  bool wrong = false;
  static void* allocate(std::size_t bytes, std::size_t alignment, void* context) {
    auto& book = *static_cast<Book*>(context);
    void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    std::lock_guard lock(book.mutex);
    ++book.calls;
    book.held[p] = bytes;
    return p;
  }
  static void release(void* pointer, std::size_t bytes, void* context) {
    auto& book = *static_cast<Book*>(context);
    std::lock_guard lock(book.mutex);
    const auto found = book.held.find(pointer);
    book.wrong |= found == book.held.end() || found->second != bytes;
    if (found != book.held.end()) book.held.erase(found);
    std::free(pointer);
  }
};

TEST(Memory, theCallersAllocatorIsUsedAndGetsAllBack) {
  runEverywhere([](Rank& self) {
    Book book;
    fuscoConfig_t config = self.config();
    config.allocate = Book::allocate;
    config.release = Book::release;
    config.allocatorContext = &book;
    fuscoComm_t comm = self.connect(0, config);
    for (std::uint64_t seed = 1; seed < 20; ++seed) shuffleWorks(self, comm, seed);
    REQUIRE(book.calls >= 19 * 2);
    leave(comm);
    require(book.held.empty(), std::to_string(book.held.size()) + " pieces were not released");
    REQUIRE(!book.wrong);
  });
}

TEST(Memory, anAllocatorThatHasNothingIsASystemError) {
  runWell({"one rank", 1, 1, {}, true, 16384}, [](Rank& self) {
    fuscoConfig_t config = self.config();
    config.allocate = [](std::size_t bytes, std::size_t alignment, void*) -> void* {
      return bytes > 100000 ? nullptr : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    };
    config.release = [](void* pointer, std::size_t, void*) { std::free(pointer); };
    fuscoComm_t comm = self.connect(0, config);
    const Routing big(100000, 2, 8);
    fuscoPlan_t plan = nullptr;
    requireContains(EXPECT_CODE(fuscoPlanCreate(&plan, &big.config, comm, nullptr), fuscoSystemError), "short");
    const Routing small(100, 2, 8);
    plan = small.make(comm);
    FUSCO_OK(fuscoPlanDestroy(plan));
    leave(comm);
  });
}

TEST(Memory, stagingKeepsToItsBound) {
  runWell(kStaged, [](Rank& self) {
    fuscoConfig_t config = self.config();
    config.maxStagingBytes = 10000;
    fuscoComm_t comm = self.connect(0, config);
    const Routing routing(64, 2, 8);
    fuscoPlan_t plan = routing.make(comm);
    const auto rows = static_cast<std::size_t>(receiveRows(plan));
    std::vector<float> in(64 * 64), out(rows * 64);
    // Whose dispatch has failed ends whatever the others are in, the plan before included.
    self.barrier();
    fuscoResult_t result = fuscoDispatch(plan, in.data(), out.data(), 256, nullptr);
    REQUIRE(result == fuscoInvalidUsage || result == fuscoRemoteError);
    requireContains(fuscoGetLastError(nullptr), "maxStagingBytes");
    FUSCO_OK(fuscoPlanDestroy(plan));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
}

// fuscoWorkspaceSize bounds what is held from above, by at most a tenth.
struct Shape {
  World world;
  std::int64_t tokens;
  int topk;
  int experts;
  std::size_t rowBytes;
  int layout;
  bool isPrivate;
};

TEST(Memory, workspaceIsWhatTheFormulaSays) {
  const World threads{"threads", 4, 4, {}, true, 262144};
  const World processes{"processes", 2, 1, {}, true, 262144};
  World staged = processes;
  staged.processVm = false;
  const World nodes{"two nodes of two", 4, 4, {0, 0, 1, 1}, true, 65536};
  const World four{"four nodes of one", 4, 4, {0, 1, 2, 3}, true, 65536};
  const std::vector<Shape> shapes = {
      {threads, 4096, 8, 64, 2048, fuscoLayoutExpertOrder, false},
      {threads, 512, 2, 8, 512, fuscoLayoutExpertOrder, false},
      {threads, 4096, 8, 64, 512, fuscoLayoutRankOrder, false},
      {threads, 128, 8, 64, 512, fuscoLayoutSlotted, false},
      {processes, 4096, 4, 16, 1024, fuscoLayoutExpertOrder, false},
      {staged, 2048, 4, 16, 1024, fuscoLayoutExpertOrder, true},
      {nodes, 2048, 4, 16, 1024, fuscoLayoutExpertOrder, false},
      {four, 2048, 4, 16, 1024, fuscoLayoutExpertOrder, false},
  };
  for (const Shape& shape : shapes) {
    runWell(shape.world, [&shape](Rank& self) {
      fuscoComm_t comm = self.connect();
      Routing routing(shape.tokens, shape.topk, shape.experts);
      routing.config.layout = shape.layout;
      if (shape.layout == fuscoLayoutSlotted) routing.config.maxTokens = shape.tokens;
      // Rank order holds numbers beside each row: known beforehand only with a capacity.
      if (shape.layout == fuscoLayoutRankOrder) routing.config.capacityRows = shape.tokens * self.ranks();
      if (shape.layout == fuscoLayoutRankOrder) routing.config.capacityPolicy = fuscoCapacityDrop;
      fuscoPlan_t plan = routing.make(comm);
      const std::int64_t rows = receiveRows(plan);
      const std::size_t inBytes = static_cast<std::size_t>(shape.tokens) * shape.rowBytes;
      std::vector<std::uint8_t> in(inBytes), out(inBytes),
          privateMid(shape.isPrivate ? static_cast<std::size_t>(rows) * shape.rowBytes : 1);
      void* window = nullptr;
      FUSCO_OK(fuscoMemAlloc(&window, static_cast<std::size_t>(rows) * shape.rowBytes));
      void* mid = shape.isPrivate ? privateMid.data() : window;
      // Twice in a row each, and two plans: both operation slots take what they need.
      for (int run = 0; run < 2; ++run) FUSCO_OK(fuscoDispatch(plan, in.data(), mid, shape.rowBytes, nullptr));
      for (int run = 0; run < 2; ++run)
        FUSCO_OK(fuscoCombine(plan, mid, out.data(), shape.rowBytes / 2, fuscoBfloat16, nullptr));
      for (int run = 0; run < 2; ++run) FUSCO_OK(fuscoPlanDestroy(routing.make(comm)));
      fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
      FUSCO_OK(fuscoCommGetStatistics(comm, &statistics));
      const fuscoConfig_t config = self.config();
      int nodeCount = 1;
      for (int r = 0; r < self.ranks(); ++r) nodeCount = std::max(nodeCount, self.world().nodeOf(r) + 1);
      std::size_t bytes = 0;
      FUSCO_OK(fuscoWorkspaceSize(&config, &routing.config, self.ranks(), nodeCount, shape.rowBytes,
                                  shape.isPrivate ? rows : 0, &bytes));
      const std::string text = "measured " + std::to_string(statistics.workspaceBytes) + ", formula " +
                               std::to_string(bytes) + " (layout " + std::to_string(shape.layout) + ", " +
                               std::to_string(shape.tokens) + " tokens, " + std::to_string(rows) + " rows)";
      if (std::getenv("FUSCO_TEST_PRINT") != nullptr) std::fprintf(stderr, "%s: %s\n", self.world().name, text.c_str());
      require(bytes >= statistics.workspaceBytes &&
                  static_cast<double>(bytes) <= 1.1 * static_cast<double>(statistics.workspaceBytes),
              text);
      FUSCO_OK(fuscoMemFree(window));
      FUSCO_OK(fuscoPlanDestroy(plan));
      leave(comm);
    });
  }
}

// Sizes that cannot be are refused and not cut.
TEST(Memory, aWorkspaceThatOverflowsIsRefused) {
  runWell({"one process", 1, 1, {}, true, 16384}, [](Rank& self) {
    const fuscoConfig_t config = self.config();
    const std::size_t untouched = 4711;
    std::size_t bytes = untouched;
    Routing routing(16, 2, 8);
    const auto size = [&](int ranks, int nodes, std::size_t rowBytes, std::int64_t rows) {
      return fuscoWorkspaceSize(&config, &routing.config, ranks, nodes, rowBytes, rows, &bytes);
    };
    EXPECT_CODE(size(2, 1, SIZE_MAX, INT64_MAX), fuscoInvalidArgument);
    EXPECT_CODE(size(2, 1, SIZE_MAX, 1), fuscoInvalidArgument);
    EXPECT_CODE(size(2, 1, 2, INT64_MAX), fuscoInvalidArgument);
    routing.config.layout = fuscoLayoutSlotted;
    for (const std::int64_t tokens : {INT64_MAX, INT64_MAX / 8, std::int64_t{1} << 28}) {
      routing.config.maxTokens = tokens;
      for (const std::int64_t capacity : {0, 1000}) {
        routing.config.capacityRows = capacity;
        requireContains(EXPECT_CODE(size(8, 2, 1024, 0), fuscoInvalidArgument), std::to_string(tokens));
      }
    }
    REQUIRE(bytes == untouched);
    routing.config.capacityRows = 0;
    routing.config.maxTokens = (std::int64_t{1} << 28) - 1;
    FUSCO_OK(size(8, 2, 1024, 0));
    REQUIRE(bytes > (std::size_t{1} << 31));
    routing.config.layout = fuscoLayoutExpertOrder;
    routing.config.experts = INT32_MAX;
    FUSCO_OK(size(INT32_MAX, 1, 1024, INT32_MAX));
    REQUIRE(bytes > (std::size_t{1024} << 31));
  });
}

}  // namespace
}  // namespace fusco::test
