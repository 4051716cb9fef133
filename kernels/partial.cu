// Before a combine across links: the rows that a token of another GPU's rank has here, added up in FP32 by slot,
// rounded once and brought to its home. A warp takes a piece of a token's row.
#include <algorithm>

#include "kernels/across.cuh"
#include "kernels/grid.h"
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

template <typename Number, int kBytes, Warps kWarps>
__global__ void __launch_bounds__(kSumThreads<kWarps>, kSumBlocks<kWarps>)
    sumForHomes(const __grid_constant__ PartialKernelArgs args) {
  __shared__ SourceMap map;
  __shared__ const std::byte* bases[kMaxNodeRanks];
  const PartialArgs& p = args.partial;
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kSumThreads<kWarps>) bases[i] = p.bases[i];
  ptx::waitForPreviousLaunch();
  const auto sourceAt = [&](int i) -> const AcrossSource& { return p.homes[i].from; };
  map.fill(p.homeCount, sourceAt);
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarpThreads;
  const RowPieces pieces = p.pieces;
  SourceReader reader(map, p.homeCount, pieces.count, threadIdx.x / kWarpThreads * gridDim.x + blockIdx.x,
                      gridDim.x * (kSumThreads<kWarps> / kWarpThreads), p.weighted, sourceAt);
  for (SourceUnit unit; reader.next(unit);) {
    const PartialArgs::Home& home = p.homes[unit.source];
    const std::byte* const base = unit.held ? bases[unit.entry.rank] : nullptr;
    const bool here = base != nullptr;
    const std::byte* const row = here ? base + unit.entry.row * args.rowBytes : nullptr;
    // The k-th rank of a token has its k-th place.
    const unsigned ranks = __ballot_sync(0xffffffffu, unit.held && (unit.entry.slot & plan::kDuplicate) == 0);
    const unsigned same = __match_any_sync(0xffffffffu, here ? unit.entry.rank : 0xffffu);
    const std::size_t offset = std::size_t{unit.piece} * pieces.bytes;
    const auto bytes = static_cast<unsigned>(min(std::size_t{pieces.bytes}, args.rowBytes - offset));
    for (unsigned left = __ballot_sync(0xffffffffu, here); left != 0;) {
      const int one = __ffs(static_cast<int>(left)) - 1;
      const unsigned members = __shfl_sync(0xffffffffu, same, one);
      left &= ~members;
      const unsigned ordinal = static_cast<unsigned>(__popc(ranks & ((1u << one) - 1)));
      const std::size_t place = std::size_t{unit.token} * p.mostPartials + ordinal;
      const int from = laneOfMember(members);
      const WarpTerm mine = termOf({row == nullptr ? nullptr : row + offset, unit.weight}, from);
      sumOfWarp<Number, kBytes, kWarps>(mine, __popc(members), nullptr, bytes,
                                        home.partials + place * args.rowBytes + offset);
      if (home.arrivals == nullptr) continue;
      __syncwarp();
      if (lane == 0) {
        ptx::storeRelease(home.arrivals + place * pieces.count + unit.piece, 1);
      }
    }
  }
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
cudaError_t launchType(const PartialKernelArgs& args, std::uint64_t bits, const Budget& budget, cudaStream_t stream) {
  constexpr int kElement = static_cast<int>(sizeof(typename Number::Element));
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
