// The planning kernels and their launches. A block plans a chunk of one rank's routing map; blockIdx.y is the rank.
#include <algorithm>
#include <bit>

#include "kernels/grid.h"
#include "kernels/meet.h"
#include "kernels/plan_alone.cuh"

namespace fusco::kernels {

namespace {

// Up to here one kernel, in which each rank's block counts for itself: two take less by themselves from about 1500 ids
// on, but a whole dispatch of 8192 was the faster one with it (docs/results.md, "Several GPUs").
constexpr int kWholeInBlock = 8192;    // ids of all ranks
constexpr int kWholeApart = 16384;     // the same where ranks on several GPUs would have to meet between two kernels
constexpr int kOwnInBlock = 1024;      // and of its own rank
constexpr int kSlottedInBlock = 2048;  // of its own rank, where it need not count those of others
constexpr int kMostDirect = 4096;      // counts of all ranks that every block adds up
static_assert(kOwnInBlock <= kMapIds);

__global__ void __launch_bounds__(32 * kMaxWarps) countKernel(const __grid_constant__ PlanLaunch launch) {
  const PlanRank& rank = launch.rank[blockIdx.y];
  const PlanShared s = shareOut(launch, false);
  const Lane me = whoAmI(launch);
  clear(s.total, launch.keys);
  clear(s.copiesOfNode, launch.nodes);
  clear(s.entriesOfNode, launch.nodes);
  clear(s.words, kPlanWords);
  ptx::waitForPreviousLaunch();
  ptx::letNextLaunchBegin();
  const std::uint64_t number = loadFresh(&rank.counts->ended);
  if (blockIdx.x == 0 && threadIdx.x == 0) rank.counts->begun = number;
  bool tooMany = false;
  const std::uint32_t tokens = tokensOf(rank, tooMany);
  const std::uint32_t each = tokensOfChunk(launch, tokens);
  const std::uint32_t begin = blockIdx.x * each;
  if (begin >= tokens) return;
  const std::uint32_t end = begin + each < tokens ? begin + each : tokens;
  __syncthreads();

  uint2 only{0, 0};
  const std::uint32_t step = launch.tokensOfBatch, ofAll = step * launch.warps;
  for (std::uint32_t first = begin + me.warp * step; first < end; first += kBatches * ofAll) {
    int expert[kBatches];
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      expert[b] = loadExpert(launch, rank.ids, me, first + b * ofAll, end,
                             [&](std::uint32_t index) { atomicMax(s.words + kBad, ~index); });
    }
#pragma unroll
    for (int b = 0; b < kBatches; ++b) {
      if (first + b * ofAll >= end) break;
      countBatch(launch, rank, me, expert[b], true, s, only, [&](std::uint32_t key) { atomicAdd(s.total + key, 1u); });
    }
  }
  addOnly(launch, s, me, only);
  __syncthreads();

  for (int key = threadIdx.x; key < launch.keys; key += blockDim.x) {
    const std::uint32_t rows = s.total[key];
    rank.chunkRows[blockIdx.x * launch.keys + key] = rows;
    if (rows != 0) atomicAdd(countOf(rank.counts, number, key), static_cast<int>(rows));
  }
  for (int node = threadIdx.x; node < launch.nodes; node += blockDim.x) {
    rank.chunkOfNode[node * kMaxChunks + blockIdx.x] = uint2{s.copiesOfNode[node], s.entriesOfNode[node]};
  }
  if (threadIdx.x == 0 && s.words[kBad] != 0) atomicMax(&rank.counts->bad[number & 1], s.words[kBad]);
}

__global__ void __launch_bounds__(32 * kMaxWarps) sumKernel(const __grid_constant__ PlanLaunch launch) {
  const PlanRank& rank = launch.rank[blockIdx.y];
  ptx::letNextLaunchBegin();
  ptx::waitForPreviousLaunch();
  sumCounts(launch, rank, (loadFresh(&rank.counts->begun) & 1) != 0);
}

// In the head's block: which ranks have met ids out of range.
__device__ void lookForBadIds(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, bool isOdd) {
  const auto badOf = [&](const PlanCounts* counts) {
    const uint2 both = loadFresh(reinterpret_cast<const uint2*>(counts->bad));
    return isOdd ? both.y : both.x;
  };
  if (threadIdx.x == 0) s.words[kBad] = badOf(rank.counts);
  if (launch.allCounts == nullptr) return;
  for (int other = threadIdx.x; other < launch.ranks; other += blockDim.x) {
    if (badOf(launch.allCounts[other]) != 0) atomicMax(s.words + kBadRank, ~static_cast<std::uint32_t>(other));
  }
}

// Whether, and where, a block of this launch works. Block 0 of a rank writes the head, the others a chunk of the lists.
struct Part {
  std::uint32_t tokens, each;  // of the rank, of a chunk
  int chunks, chunk;
  bool tooMany, isHead;
  __device__ explicit Part(const PlanLaunch& launch, const PlanRank& rank) {
    tooMany = false;
    tokens = tokensOf(rank, tooMany);
    each = tokensOfChunk(launch, tokens);
    chunks = static_cast<int>((tokens + each - 1) / each);
    isHead = blockIdx.x == 0;
    chunk = isHead ? 0 : static_cast<int>(blockIdx.x) - 1;
  }
  __device__ bool idle() const { return !isHead && chunk >= chunks; }
  __device__ std::uint32_t begin() const { return chunk * each; }
  __device__ std::uint32_t end() const { return begin() + each < tokens ? begin() + each : tokens; }
};

__device__ void clearForLay(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s) {
  if (rank.before == nullptr && launch.allCounts != nullptr) {
    for (int i = threadIdx.x; i < launch.ranks; i += blockDim.x) s.counts[i] = launch.allCounts[i];
  }
  clear(s.next, launch.keys);
  clear(s.total, launch.keys);
  if (launch.mayDrop) clear(s.lower, launch.keys);
  clear(s.words, kPlanWords);
}

// First rows of all keys; the head writes what belongs to it. Ends with a barrier.
__device__ void findBases(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Lane& me,
                          const Part& part, bool isOdd) {
  const auto own = [&](int key) {
    if (!part.isHead && !launch.mayDrop) return 0u;
    const int2 both = loadFresh(bothCounts(rank.counts) + key);
    return static_cast<std::uint32_t>(isOdd ? both.y : both.x);
  };
  const HeadRows head{launch, rank, s};
  findRowBases(launch, rank, s, me, own,
               [&](int key, std::uint32_t base, std::uint32_t start, std::uint32_t total, std::uint32_t ownRows) {
                 if (part.isHead) head.visit(key, base, start, total, ownRows);
               });
}

// The head's block: what is left when bases and the cursors of the first chunk are known.
__device__ void endHead(const PlanLaunch& launch, const PlanRank& rank, const PlanShared& s, const Lane& me,
                        const Part& part, const HeadFrame& frame, std::uint64_t number, std::uint32_t wanted) {
  finishHead(launch, rank, s, me, frame, part.tokens, wanted, part.tooMany);
  // What this launch's successor counts into, which nobody reads any more.
  for (int key = threadIdx.x; key < launch.room; key += blockDim.x) *countOf(rank.counts, number + 1, key) = 0;
  if (threadIdx.x == 0) {
    rank.counts->bad[(number + 1) & 1] = 0;
    rank.counts->ended = number + 1;
  }
  clearTails(launch, rank, s, part.tokens, 0, part.chunks + 1);
}

// Writes the arena, unless rows have to be dropped: then it only counts what is kept of each chunk.
__global__ void __launch_bounds__(32 * kMaxWarps, 2) layKernel(const __grid_constant__ PlanLaunch launch) {
  const PlanRank& rank = launch.rank[blockIdx.y];
  const PlanShared s = shareOut(launch, false);
  const Lane me = whoAmI(launch);
  const Columns columns = myColumns(launch);
  const Part part(launch, rank);
  if (part.idle()) {
    ptx::waitForPreviousLaunch();  // the next launch takes the end of this one for the end of that one
    return;
  }
  clearForLay(launch, rank, s);
  ptx::letNextLaunchBegin();
  if (part.isHead) __syncthreads();  // a walk has its own

  std::uint64_t number = 0;
  const auto basesAreKnown = [&] {
    ptx::waitForPreviousLaunch();
    number = loadFresh(&rank.counts->begun);
    const bool isOdd = (number & 1) != 0;
    gather(launch, rank, s, columns, isOdd, part.chunk);
    gatherNodes(launch, s, me, rank.chunkOfNode, part.chunks, part.chunk);
    if (part.isHead) lookForBadIds(launch, rank, s, isOdd);
    __syncthreads();
    placeNodes(launch, s, me);
    findBases(launch, rank, s, me, part, isOdd);
    return s.words[kRefused] == 0 && s.words[kLimited] == 0;
  };
  if (part.isHead) {
    HeadFrame frame;
    frame.load(rank, me);
    basesAreKnown();
    const bool isLimited = s.words[kRefused] == 0 && s.words[kLimited] != 0;
    if (threadIdx.x == 0) rank.counts->limited = isLimited;
    if (!isLimited) endHead(launch, rank, s, me, part, frame, number, s.entries[launch.nodes]);
    return;
  }
  walk<true>(launch, rank, s, me, part.begin(), part.end(), true, basesAreKnown);
  if (s.words[kRefused] != 0 || s.words[kLimited] == 0) {
    clearTails(launch, rank, s, part.tokens, part.chunk + 1, part.chunks + 1);
    return;
  }
  __syncthreads();
  clear(s.copies, launch.nodes);
  clear(s.entries, launch.nodes);
  walk<false>(launch, rank, s, me, part.begin(), part.end(), false, [] { return true; });
  for (int node = threadIdx.x; node < launch.nodes; node += blockDim.x) {
    rank.keptOfNode[node * kMaxChunks + part.chunk] = uint2{s.copies[node], s.entries[node]};
  }
}

// Behind layKernel, where a capacity may cut rows off: writes the arenas of ranks that drop rows.
__global__ void __launch_bounds__(32 * kMaxWarps, 2) dropKernel(const __grid_constant__ PlanLaunch launch) {
  const PlanRank& rank = launch.rank[blockIdx.y];
  const PlanShared s = shareOut(launch, false);
  const Lane me = whoAmI(launch);
  const Columns columns = myColumns(launch);
  ptx::letNextLaunchBegin();
  ptx::waitForPreviousLaunch();
  if (loadFresh(&rank.counts->limited) == 0) return;
  const Part part(launch, rank);
  if (part.idle()) return;
  clearForLay(launch, rank, s);
  __syncthreads();
  const std::uint64_t number = loadFresh(&rank.counts->begun);
  const bool isOdd = (number & 1) != 0;
  std::uint32_t wanted = 0;
  const auto basesAreKnown = [&] {
    gather(launch, rank, s, columns, isOdd, part.chunk);
    if (part.isHead) {
      lookForBadIds(launch, rank, s, isOdd);
      gatherNodes(launch, s, me, rank.chunkOfNode, part.chunks, 0);
      __syncthreads();
      for (int node = 0; node < launch.nodes; ++node) wanted += s.entriesOfNode[node];
    }
    __syncthreads();
    gatherNodes(launch, s, me, rank.keptOfNode, part.chunks, part.chunk);
    __syncthreads();
    placeNodes(launch, s, me);
    findBases(launch, rank, s, me, part, isOdd);
    return true;
  };
  if (part.isHead) {
    HeadFrame frame;
    frame.load(rank, me);
    basesAreKnown();
    endHead(launch, rank, s, me, part, frame, number, wanted);
    return;
  }
  walk<true>(launch, rank, s, me, part.begin(), part.end(), false, basesAreKnown);
  clearTails(launch, rank, s, part.tokens, part.chunk + 1, part.chunks + 1);
}

struct Device {
  int multiprocessors = 0, sharedMemory = 0, major = 0;
};
int askDevice(Device& device) {
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  const auto ask = [&](int& value, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, what, number);
  };
  ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(device.sharedMemory, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.major = deviceShape().major;
  return error;
}

int keysOf(const PlanArgs& args) { return args.layout == plan::Layout::rankOrder ? args.ranks : args.experts; }
bool mayDrop(const PlanArgs& args) { return args.capacityRows > 0 || args.layout == plan::Layout::slotted; }

// Shared memory that a block may have here.
std::size_t roomIn(const Device& device) {
  constexpr std::size_t kSharedLimit = 98304;
  return std::min<std::size_t>(device.sharedMemory, kSharedLimit);
}

// The most warps whose counts find room in shared memory; 0: not even one.
int warpsThatFit(const PlanArgs& args, const Device& device, bool alone) {
  const int keys = keysOf(args), pairs = (keys + 1) / 2;
  const std::size_t room = roomIn(device);
  for (int warps = kMaxWarps; warps > 0; warps /= 2) {
    if (sharedBytes(keys, pairs, warps, args.nodes, mayDrop(args), alone) <= room) return warps;
  }
  return 0;
}

constexpr std::size_t pad(std::size_t bytes) { return (bytes + 63) & ~std::size_t{63}; }

// Whether a kernel of one block a rank does it all.
bool isSmall(const PlanArgs& args) {
  std::int64_t all = 0, most = 0;
  for (int i = 0; i < args.rankCount; ++i) {
    const std::int64_t ids = args.rank[i].tokens * args.topk;
    all += ids;
    most = std::max(most, ids);
  }
  if (args.layout == plan::Layout::slotted) return most <= kSlottedInBlock;
  return most <= kOwnInBlock && all <= (args.ranksHere > 0 ? kWholeApart : kWholeInBlock);
}

// Whether a kernel of its own adds up the ranks' counts, since they are too many for every block to do so.
bool summedApart(const PlanArgs& args, int rank) {
  return args.layout != plan::Layout::slotted && args.rank[rank].before == nullptr &&
         (args.ranks > kMaxDirect || args.ranks * keysOf(args) > kMostDirect);
}

int blocksOfRank(const PlanArgs& args, const Device& device) {
  const int blocks = args.blocks > 0 ? args.blocks : 2 * device.multiprocessors;
  return std::clamp(blocks / args.rankCount, 1, kMaxChunks);
}

PlanLaunch prepare(const PlanArgs& args, const Device& device, bool alone) {
  PlanLaunch launch{};
  launch.allCounts = args.layout == plan::Layout::slotted ? nullptr : args.allCounts;
  launch.maxTokens = args.maxTokens;
  launch.capacity = args.capacityRows > 0 ? static_cast<std::uint32_t>(args.capacityRows) : kMaxRows;
  launch.slotted = args.layout == plan::Layout::slotted;
  launch.byRank = args.layout == plan::Layout::rankOrder;
  launch.copyPerEntry = args.dedup == plan::Dedup::none;
  launch.mayDrop = mayDrop(args);
  launch.blockRows = launch.slotted ? static_cast<std::uint32_t>(args.maxTokens) : kMaxRows;
  launch.idBytes = args.idBytes;
  launch.topk = args.topk;
  launch.experts = args.experts;
  launch.ranks = args.ranks;
  launch.nodes = args.nodes;
  launch.keys = keysOf(args);
  launch.pairs = (launch.keys + 1) / 2;
  launch.room = args.countsRoom;
  launch.alignment = args.alignment;
  launch.rankCount = args.rankCount;
  launch.firstHere = args.firstHere;
  launch.ranksHere = args.ranksHere;
  launch.turn = args.turn;
  launch.turnBytes = args.turnBytes;
  launch.warps = warpsThatFit(args, device, alone);
  launch.tokensOfBatch = 32 / args.topk;
  launch.each = args.experts / args.ranks;
  launch.larger = args.experts % args.ranks;
  launch.largerEnd = launch.larger * (launch.each + 1);
  launch.perLarger = 1.0f / static_cast<float>(launch.each + 1);
  launch.perSmaller = launch.each == 0 ? 0.0f : 1.0f / static_cast<float>(launch.each);

  std::int64_t most = 0;
  for (int i = 0; i < args.rankCount; ++i) {
    const PlanArgs::Rank& from = args.rank[i];
    PlanRank& rank = launch.rank[i];
    const plan::ArenaOffsets offsets = plan::arenaOffsets(from.tokens, args.topk, args.experts, args.ranks, args.nodes,
                                                          from.localExperts, from.flowCount, args.dedup);
    rank.ids = from.ids;
    rank.weights = from.weights;
    rank.tokensUsed = from.tokensUsed;
    rank.tokens = from.tokens;
    rank.arena = static_cast<std::byte*>(from.arena);
    rank.copies = offsets.copies;
    rank.entries = offsets.entries;
    rank.weightsOfEntries = offsets.weights;
    rank.end = offsets.end;
    rank.rowBase = static_cast<std::uint32_t>(offsets.rowBase);
    rank.localRows = static_cast<std::uint32_t>(offsets.localExpertRows);
    rank.localStart = static_cast<std::uint32_t>(offsets.localExpertStart);
    rank.flows = static_cast<std::uint32_t>(offsets.flows);
    rank.frame = from.frame;
    rank.homes = from.homes;
    rank.flowShares = from.flows;
    rank.counts = from.counts;
    auto* scratch = static_cast<std::byte*>(from.scratch);
    const std::size_t ofNodes = pad(sizeof(uint2) * kMaxChunks * args.nodes);
    rank.chunkOfNode = reinterpret_cast<uint2*>(scratch);
    rank.keptOfNode = reinterpret_cast<uint2*>(scratch + ofNodes);
    rank.chunkRows = reinterpret_cast<std::uint32_t*>(scratch + 2 * ofNodes);
    rank.sums = reinterpret_cast<std::int32_t*>(rank.chunkRows + static_cast<std::size_t>(kMaxChunks) * launch.keys);
    rank.before = launch.slotted ? nullptr : from.before;
    rank.total = from.total;
    if (summedApart(args, i)) {
      rank.before = rank.sums;
      rank.total = rank.sums + launch.keys;
    }
    rank.status = from.status;
    rank.exchanged = from.exchanged;
    rank.rank = from.rank;
    rank.node = from.node;
    rank.localExperts = from.localExperts;
    rank.flowCount = from.flowCount;
    most = std::max(most, from.tokens);
  }
  launch.batchesOfRank = static_cast<int>((most + launch.tokensOfBatch - 1) / launch.tokensOfBatch);
  launch.idsOfRank = std::bit_width(static_cast<std::uint64_t>(std::max<std::int64_t>(most * args.topk - 1, 1)));
  const std::int64_t step = std::int64_t{launch.warps} * launch.tokensOfBatch;
  const std::int64_t useful = std::max<std::int64_t>((most + step - 1) / step, 1);
  launch.chunks = static_cast<int>(std::min<std::int64_t>(useful, blocksOfRank(args, device)));
  return launch;
}

template <typename Kernel>
cudaError_t start(Kernel kernel, const PlanLaunch& launch, const Device& device, int blocks, bool alone, void* stream) {
  const std::size_t shared =
      (sharedBytes(launch.keys, launch.pairs, launch.warps, launch.nodes, launch.mayDrop, alone) + 15) / 16 * 16;
  constexpr std::size_t kUnasked = 49152 - 1024;  // kernels have a little beside it
  if (shared > kUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(roomIn(device)));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks, launch.ranksHere > 0 ? launch.ranksHere : launch.rankCount);
  config.blockDim = dim3(32 * launch.warps);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (device.major >= 9) {  // every kernel waits for the previous launch before it touches what others use
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, launch);
}

bool isSane(const PlanArgs& args) {
  if (args.rankCount < 1 || args.rankCount > kMaxPlanRanks || args.topk < 1 || args.topk > kMaxPlanTopk) return false;
  return args.experts >= 1 && args.experts < 65535 && args.ranks >= 1 && args.ranks < 65535 && args.nodes >= 1 &&
         args.nodes < 65535 && (args.idBytes == 4 || args.idBytes == 8);
}

}  // namespace

std::size_t planCountsBytes(int room) { return sizeof(PlanCounts) + 2 * sizeof(std::int32_t) * room; }

std::size_t planScratchBytes(int experts, int ranks, int nodes) {
  return 2 * pad(sizeof(uint2) * kMaxChunks * nodes) +
         sizeof(std::uint32_t) * (kMaxChunks + 2) * std::max(experts, ranks);
}

bool planFits(const PlanArgs& args) {
  Device device;
  return isSane(args) && askDevice(device) == cudaSuccess && warpsThatFit(args, device, true) > 0;
}

int planBlocksOfRank(const PlanArgs& args) {
  Device device;
  return isSane(args) && askDevice(device) == cudaSuccess ? blocksOfRank(args, device) : 0;
}

int launchPlanCount(const PlanArgs& args, void* stream) {
  Device device;
  if (const int error = askDevice(device); error != cudaSuccess) return error;
  if (!isSane(args) || warpsThatFit(args, device, false) == 0) return cudaErrorInvalidValue;
  const PlanLaunch launch = prepare(args, device, false);
  return start(countKernel, launch, device, launch.chunks, false, stream);
}

int launchPlanLay(const PlanArgs& args, void* stream) {
  Device device;
  if (const int error = askDevice(device); error != cudaSuccess) return error;
  if (!isSane(args) || warpsThatFit(args, device, false) == 0) return cudaErrorInvalidValue;
  const PlanLaunch launch = prepare(args, device, false);
  if (summedApart(args, 0)) {
    const int blocks = (launch.keys + kKeysOfSum - 1) / kKeysOfSum;
    const cudaError_t error = start(sumKernel, launch, device, blocks, false, stream);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = start(layKernel, launch, device, launch.chunks + 1, false, stream);
  if (error != cudaSuccess || !launch.mayDrop) return error;
  return start(dropKernel, launch, device, launch.chunks + 1, false, stream);
}

bool planIsSmall(const PlanArgs& args) {
  Device device;
  return isSane(args) && isSmall(args) && askDevice(device) == cudaSuccess && warpsThatFit(args, device, true) > 0;
}

int launchPlan(const PlanArgs& args, void* stream) {
  Device device;
  if (const int error = askDevice(device); error != cudaSuccess) return error;
  if (!isSane(args)) return cudaErrorInvalidValue;
  if (isSmall(args) && warpsThatFit(args, device, true) > 0) {
    const PlanLaunch launch = prepare(args, device, true);
    return start(launch.byRank || launch.slotted ? aloneKernel<true> : aloneKernel<false>, launch, device, 1, true,
                 stream);
  }
  if (args.ranksHere > 0) return cudaErrorInvalidValue;
  if (const int error = launchPlanCount(args, stream); error != cudaSuccess) return error;
  return launchPlanLay(args, stream);
}

}  // namespace fusco::kernels
