// Copies of rows that came over a link once, made where they have landed: a warp takes a piece of a copy's row, the
// copy engine of the SM moves it. Entries are read from the plans of other GPUs two pieces ahead of their use.
#include <algorithm>

#include "kernels/across.cuh"
#include "kernels/grid.h"

namespace fusco::kernels {

namespace {

__host__ __device__ constexpr unsigned bufferBytes(const RowPieces& pieces) { return (pieces.bytes + 127) / 128 * 128; }

// A warp has one piece under way. What it waits for is long, so many warps do more than many pieces for each.
template <int kWarps>
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
  unsigned char* const buffer = buffers + static_cast<std::size_t>(warp) * bufferBytes(pieces);
  const std::uint64_t policy = ptx::evictFirst();
  SourceReader reader(map, args.sourceCount, pieces.count, static_cast<unsigned>(warp) * gridDim.x + blockIdx.x,
                      gridDim.x * kWarps, false, [&](int i) -> const AcrossSource& { return args.sources[i]; });

  unsigned parity = 0;
  bool loading = false;         // into the buffer; stored when the next piece is found and there
  std::byte* target = nullptr;  // where this lane stores it, or null
  unsigned targetBytes = 0;
  const auto store = [&] {
    if (!loading) return;
    loading = false;
    ptx::barrierWait(&barriers[warp], parity);
    parity ^= 1;
    if (target != nullptr) ptx::bulkStore(target, buffer, targetBytes);
    ptx::bulkCommit();
  };
  const auto load = [&](const std::byte* row, bool leads, unsigned bytes) {
    store();
    ptx::bulkWaitRead<0>();
    __syncwarp();
    if (leads) {
      ptx::barrierExpect(&barriers[warp], bytes);
      ptx::bulkLoad(buffer, row, bytes, &barriers[warp], policy);
    }
    loading = true;
  };

  for (SourceUnit unit; reader.next(unit);) {
    std::byte* const base = unit.held ? bases[unit.entry.rank] : nullptr;
    const bool here = base != nullptr;
    const bool duplicate = here && (unit.entry.slot & plan::kDuplicate) != 0;
    const unsigned duplicates = __ballot_sync(0xffffffffu, duplicate);
    if (duplicates == 0) continue;
    if (args.arrivals != nullptr) {
      std::uint32_t* const word = args.arrivals + args.sources[unit.source].firstUnit + unit.number;
      if (!takeArrival(word)) {
        store();
        if (!waitForArrival(word, args.wait)) break;
      }
    }
    // All entries of a rank have its first one's row.
    const unsigned same = __match_any_sync(0xffffffffu, here ? unit.entry.rank : 0xffffu);
    const std::size_t offset = std::size_t{unit.piece} * pieces.bytes;
    const auto bytes = static_cast<unsigned>(min(std::size_t{pieces.bytes}, args.rowBytes - offset));
    std::byte* const row = here ? base + unit.entry.row * args.rowBytes + offset : nullptr;
    ptx::fenceProxyAsync();
    for (unsigned left = duplicates; left != 0;) {
      const unsigned group = __shfl_sync(0xffffffffu, same, __ffs(static_cast<int>(left)) - 1);
      left &= ~group;
      load(row, static_cast<int>(lane) == __ffs(static_cast<int>(group)) - 1, bytes);
      target = duplicate && (group >> lane & 1) != 0 ? row : nullptr;
      targetBytes = bytes;
    }
  }
  store();
  ptx::bulkWait<0>();
#endif
}

template <int kWarps>
cudaError_t launchWarps(const ExpandArgs& args, int most, cudaStream_t stream) {
  const std::int64_t units = std::int64_t{args.sourceCount} * args.maxTokens * args.pieces.count;
  const auto blocks = static_cast<int>(std::clamp<std::int64_t>((units + kWarps - 1) / kWarps, 1, most));
  return launch(expandRows<kWarps>, args, blocks, kWarps * kWarpThreads, std::size_t{bufferBytes(args.pieces)} * kWarps,
                stream);
}

}  // namespace

int launchExpand(const ExpandArgs& args, const Budget& budget, void* stream) {
  if (args.sourceCount == 0 || args.maxTokens == 0 || args.rowBytes == 0) return cudaSuccess;
  auto* on = static_cast<cudaStream_t>(stream);
  // Blocks that are given multiprocessors fill them. Else half of these are enough, each with room for one of
  // launchPlace beside it, whatever happens.
  if (budget.blocks > 0 && std::size_t{bufferBytes(args.pieces)} * 14 <= mostDynamicBytes())
    return launchWarps<14>(args, budget.blocks, on);
  return launchWarps<6>(args, budget.blocks > 0 ? budget.blocks : std::max(1, deviceShape().sms / 2), on);
}

}  // namespace fusco::kernels
