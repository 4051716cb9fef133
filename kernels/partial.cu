// Before a combine across links: the rows that a token of another GPU's rank has here, added up in FP32 by slot,
// rounded once and brought to its home. A warp takes a piece of a token's row.
#include <algorithm>

#include "kernels/across.cuh"
#include "kernels/grid.h"
#include "kernels/staged_sum.cuh"
#include "kernels/warp_sum.cuh"

namespace fusco::kernels {

namespace {

struct PartialKernelArgs {
  PartialArgs partial;
  std::size_t rowBytes;
};

// The lane of the k-th bit of `members`, for lane k; itself where there are not as many.
__device__ int laneOfMember(unsigned members) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  for (int i = 0; i < lane && members != 0; ++i) members &= members - 1;
  return members == 0 ? lane : __ffs(static_cast<int>(members)) - 1;
}

// A warp's sums, one after the other: those of a token's piece for each rank of this GPU in turn.
template <typename At>
class PartialUnits {
 public:
  __device__ PartialUnits(const PartialKernelArgs& args, const std::byte* const* bases, SourceReader<At>& reader)
      : args_(args), bases_(bases), reader_(reader) {}

  __device__ Next next(StagedUnit& sum, bool) {
    while (left_ == 0) {
      if (!reader_.next(unit_)) return Next::none;
      take();
    }
    const PartialArgs& p = args_.partial;
    const PartialArgs::Home& home = p.homes[unit_.source];
    const int one = __ffs(static_cast<int>(left_)) - 1;
    const unsigned members = __shfl_sync(0xffffffffu, same_, one);
    left_ &= ~members;
    const unsigned ordinal = static_cast<unsigned>(__popc(ranks_ & ((1u << one) - 1)));
    const std::size_t place = std::size_t{unit_.token} * p.mostPartials + ordinal;
    const std::size_t offset = std::size_t{unit_.piece} * p.pieces.bytes;
    sum.term = termOf({row_, unit_.weight}, laneOfMember(members));
    sum.count = __popc(members);
    sum.bytes = static_cast<unsigned>(min(std::size_t{p.pieces.bytes}, args_.rowBytes - offset));
    sum.bias = nullptr;
    sum.out = home.partials + place * args_.rowBytes + offset;
    sum.arrival = home.arrivals == nullptr ? nullptr : home.arrivals + place * p.pieces.count + unit_.piece;
    return Next::unit;
  }

 private:
  __device__ void take() {
    const std::byte* const base = unit_.held ? bases_[unit_.entry.rank] : nullptr;
    const bool here = base != nullptr;
    row_ = here ? base + unit_.entry.row * args_.rowBytes + std::size_t{unit_.piece} * args_.partial.pieces.bytes
                : nullptr;
    // The k-th rank of a token has its k-th place.
    ranks_ = __ballot_sync(0xffffffffu, unit_.held && (unit_.entry.slot & plan::kDuplicate) == 0);
    same_ = __match_any_sync(0xffffffffu, here ? unit_.entry.rank : 0xffffu);
    left_ = __ballot_sync(0xffffffffu, here);
  }

  const PartialKernelArgs& args_;
  const std::byte* const* const bases_;
  SourceReader<At>& reader_;
  SourceUnit unit_;
  const std::byte* row_ = nullptr;  // of this lane's entry
  unsigned ranks_ = 0;              // lanes that are a rank's first
  unsigned same_ = 0;               // lanes of the same rank as this one
  unsigned left_ = 0;               // lanes whose rows are still to be summed
};

// What both kernels do first. `sum` is called with the units of a warp, of as many as work in a block.
template <int kThreads, int kWorkers, typename Sum>
__device__ __forceinline__ void forHomes(const PartialKernelArgs& args, SourceMap& map, const std::byte** bases,
                                         const Sum& sum) {
  const PartialArgs& p = args.partial;
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kThreads) bases[i] = p.bases[i];
  ptx::waitForPreviousLaunch();
  const auto sourceAt = [&](int i) -> const AcrossSource& { return p.homes[i].from; };
  map.fill(p.homeCount, sourceAt);
  __syncthreads();
  const unsigned warp = threadIdx.x / kWarpThreads;
  if (warp >= kWorkers) return;
  SourceReader reader(map, p.homeCount, p.pieces.count, warp * gridDim.x + blockIdx.x, gridDim.x * kWorkers, p.weighted,
                      sourceAt);
  PartialUnits units(args, bases, reader);
  sum(units);
}

template <typename Number, int kBytes, Warps kWarps>
__global__ void __launch_bounds__(kSumThreads<kWarps>, kSumBlocks<kWarps>)
    sumForHomes(const __grid_constant__ PartialKernelArgs args) {
  __shared__ SourceMap map;
  __shared__ const std::byte* bases[kMaxNodeRanks];
  constexpr int kThreads = kSumThreads<kWarps>;
  forHomes<kThreads, kThreads / kWarpThreads>(args, map, bases, [](auto& units) {
    for (StagedUnit unit; units.next(unit, true) == Next::unit;) {
      sumOfWarp<Number, kBytes, kWarps>(unit.term, unit.count, nullptr, unit.bytes, unit.out);
      if (unit.arrival == nullptr) continue;
      __syncwarp();
      if (threadIdx.x % kWarpThreads == 0) ptx::storeRelease(unit.arrival, 1);
    }
  });
}

// Many bytes under way on each of few multiprocessors. The last warp of a block tells the homes.
template <typename Number>
__global__ void __launch_bounds__(kStagedThreads, 1) sumStagedForHomes(const __grid_constant__ PartialKernelArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ SourceMap map;
  __shared__ const std::byte* bases[kMaxNodeRanks];
  __shared__ std::uint64_t barriers[kStagedWarps][kStagedSlots];
  __shared__ TellQueue queue;
  beginStaged(barriers);
  queue.clear();
  forHomes<kStagedThreads, kTellingWarps>(args, map, bases, [&](auto& units) {
    sumStaged<Number>(buffers, barriers, stagedChunk(args.partial.pieces.bytes), units, &queue);
    if (threadIdx.x % kWarpThreads == 0) queue.end();
  });
  if (threadIdx.x / kWarpThreads == kTellingWarps) queue.tellAll();
#endif
}

template <typename Number, int kBytes, Warps kWarps>
cudaError_t launchWarps(const PartialKernelArgs& args, std::int64_t most, cudaStream_t stream) {
  constexpr int kThreads = kSumThreads<kWarps>, kUnits = kThreads / kWarpThreads;
  const PartialArgs& p = args.partial;
  const std::int64_t units = std::int64_t{p.homeCount} * p.maxTokens * p.pieces.count;
  const auto blocks = static_cast<int>(std::clamp<std::int64_t>((units + kUnits - 1) / kUnits, 1, most));
  return launch(sumForHomes<Number, kBytes, kWarps>, args, blocks, kThreads, 0, stream);
}

template <typename Number>
cudaError_t launchStaged(const PartialKernelArgs& args, std::int64_t most, cudaStream_t stream) {
  const PartialArgs& p = args.partial;
  const std::int64_t units = std::int64_t{p.homeCount} * p.maxTokens * p.pieces.count;
  const auto blocks = static_cast<int>(std::clamp<std::int64_t>((units + kTellingWarps - 1) / kTellingWarps, 1, most));
  const std::size_t shared = aloneBytes(stagedBytes(stagedChunk(p.pieces.bytes)));
  return launch(sumStagedForHomes<Number>, args, blocks, kStagedThreads, shared, stream);
}

template <typename Number>
cudaError_t launchType(const PartialKernelArgs& args, std::uint64_t bits, const Budget& budget, cudaStream_t stream) {
  constexpr int kElement = static_cast<int>(sizeof(typename Number::Element));
  if (bits % 16 == 0 && budget.blocks > 0 && stages(args.rowBytes))
    return launchStaged<Number>(args, budget.blocks, stream);
  if (bits % 16 == 0 && budget.blocks > 0) return launchWarps<Number, 16, Warps::few>(args, budget.blocks, stream);
  // On all multiprocessors there is room left for launchSum, which waits; within a budget both have their own.
  const int most = budget.blocks > 0 ? budget.blocks * kSumBlocks<Warps::many> : deviceShape().sms * 2;
  if (bits % 16 == 0) return launchWarps<Number, 16, Warps::many>(args, most, stream);
  if (bits % kElement == 0) return launchWarps<Number, kElement, Warps::many>(args, most, stream);
  return launchWarps<Anywhere<Number>, kElement, Warps::many>(args, most, stream);
}

}  // namespace

int launchPartial(const PartialArgs& partial, const Budget& budget, void* stream) {
  if (partial.homeCount == 0 || partial.maxTokens == 0 || partial.elements == 0) return cudaSuccess;
  PartialKernelArgs args{partial, partial.elements * (partial.type == SumType::f32 ? 4 : 2)};
  std::uint64_t bits = args.rowBytes;
  for (const std::byte* base : partial.bases) bits |= reinterpret_cast<std::uintptr_t>(base);
  auto* on = static_cast<cudaStream_t>(stream);
  switch (partial.type) {
    case SumType::bf16:
      return launchType<Bf16>(args, bits, budget, on);
    case SumType::f16:
      return launchType<F16>(args, bits, budget, on);
    case SumType::f32:
      return launchType<F32>(args, bits, budget, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fusco::kernels
