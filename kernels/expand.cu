// Copies of rows that came over a link once, made where they have landed: a warp takes a piece of a copy's row, the
// copy engine of the SM moves it. Entries are read from the plans of other GPUs two pieces ahead of their use.
#include <algorithm>

#include "kernels/across.cuh"
#include "kernels/grid.h"

namespace fusco::kernels {

namespace {

constexpr int kWarps = 6;  // a block of them leaves room for one of launchPlace beside it

__global__ void __launch_bounds__(kWarps* kWarpThreads) expandRows(const __grid_constant__ ExpandArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ SourceMap map;
  __shared__ std::byte* bases[kMaxNodeRanks];
  __shared__ std::uint64_t barriers[kWarps];
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += static_cast<int>(blockDim.x))
    bases[i] = args.bases[i];
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const unsigned lane = threadIdx.x % kWarpThreads;
  if (lane == 0) {
    ptx::barrierInit(&barriers[warp], 1);
    ptx::barrierInitFence();
  }
  ptx::waitForPreviousLaunch();
  map.fill(args.sourceCount, [&](int i) -> const AcrossSource& { return args.sources[i]; });
  __syncthreads();

  const RowPieces pieces = args.pieces;
  unsigned char* const buffer = buffers + static_cast<std::size_t>(warp) * ((pieces.bytes + 127) / 128 * 128);
  const std::uint64_t policy = ptx::evictFirst();
  SourceReader reader(map, args.sourceCount, pieces.count, static_cast<unsigned>(warp) * gridDim.x + blockIdx.x,
                      gridDim.x * kWarps, [&](int i) -> const AcrossSource& { return args.sources[i]; });
  unsigned parity = 0;
  for (SourceUnit unit; reader.next(unit);) {
    std::byte* const base = unit.held ? bases[unit.entry.rank] : nullptr;
    const bool here = base != nullptr;
    const bool duplicate = here && (unit.entry.slot & plan::kDuplicate) != 0;
    const unsigned duplicates = __ballot_sync(0xffffffffu, duplicate);
    if (duplicates == 0) continue;
    if (args.arrivals != nullptr &&
        !waitForArrival(args.arrivals + args.sources[unit.source].firstUnit + unit.number, args.wait))
      break;
    // All entries of a rank have its first one's row.
    const unsigned same = __match_any_sync(0xffffffffu, here ? unit.entry.rank : 0xffffu);
    const std::size_t offset = std::size_t{unit.piece} * pieces.bytes;
    const auto bytes = static_cast<unsigned>(min(std::size_t{pieces.bytes}, args.rowBytes - offset));
    ptx::fenceProxyAsync();
    for (unsigned left = duplicates; left != 0;) {
      const int one = __ffs(static_cast<int>(left)) - 1;
      const unsigned group = __shfl_sync(0xffffffffu, same, one);
      left &= ~group;
      if (static_cast<int>(lane) == __ffs(static_cast<int>(group)) - 1) {
        ptx::barrierExpect(&barriers[warp], bytes);
        ptx::bulkLoad(buffer, base + unit.entry.row * args.rowBytes + offset, bytes, &barriers[warp], policy);
      }
      ptx::barrierWait(&barriers[warp], parity);
      parity ^= 1;
      if (duplicate && (group >> lane & 1) != 0)
        ptx::bulkStore(base + unit.entry.row * args.rowBytes + offset, buffer, bytes);
      ptx::bulkCommit();
      ptx::bulkWaitRead<0>();
      __syncwarp();
    }
  }
  ptx::bulkWait<0>();
#endif
}

}  // namespace

int launchExpand(const ExpandArgs& args, const Budget& budget, void* stream) {
  if (args.sourceCount == 0 || args.maxTokens == 0 || args.rowBytes == 0) return cudaSuccess;
  const std::int64_t units = std::int64_t{args.sourceCount} * args.maxTokens * args.pieces.count;
  // Half of the multiprocessors are enough, and there is room for those that send whatever happens.
  const std::int64_t most = budget.blocks > 0 ? budget.blocks : std::max(1, deviceShape().sms / 2);
  const auto blocks = static_cast<int>(std::clamp<std::int64_t>((units + kWarps - 1) / kWarps, 1, most));
  return launch(expandRows, args, blocks, kWarps * kWarpThreads,
                std::size_t{(args.pieces.bytes + 127) / 128 * 128} * kWarps, static_cast<cudaStream_t>(stream));
}

}  // namespace fusco::kernels
