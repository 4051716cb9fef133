// Before a combine across links: the rows that a token of another GPU's rank has here, added up in FP32 by slot,
// rounded once and brought to its home. A warp takes a piece of a token's row.
#include <algorithm>

#include "kernels/across.cuh"
#include "kernels/grid.h"
#include "kernels/numbers.cuh"

namespace fusco::kernels {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kGroup = 8;  // rows in flight

struct PartialKernelArgs {
  PartialArgs partial;
  std::size_t rowBytes;
};

// kBytes of the rows of `members` (a bit for each lane that has one) at byte `at`, which `inside` has.
template <typename Number, int kBytes>
__device__ void sumMembers(unsigned members, const std::byte* row, float weight, std::size_t at, bool inside,
                           std::byte* out) {
  using Vector = Pack<Number, kBytes>;
  float acc[Vector::kCount];
#pragma unroll
  for (int i = 0; i < Vector::kCount; ++i) acc[i] = 0.0f;
  for (unsigned left = members; left != 0;) {
    Vector values[kGroup];
    unsigned reading = left;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (reading == 0) break;
      const int from = __ffs(static_cast<int>(reading)) - 1;
      reading &= reading - 1;
      const auto* source =
          reinterpret_cast<const std::byte*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), from));
      if (inside) values[k].read(source + at);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (left == 0) break;
      const float factor = __shfl_sync(0xffffffffu, weight, __ffs(static_cast<int>(left)) - 1);
      left &= left - 1;
#pragma unroll
      for (int i = 0; i < Vector::kCount; ++i) acc[i] = fmaf(factor, Number::load(values[k].elements[i]), acc[i]);
    }
  }
  if (!inside) return;
  Vector result;
#pragma unroll
  for (int i = 0; i < Vector::kCount; ++i) result.elements[i] = Number::round(acc[i]);
  result.write(out + at);
}

template <typename Number, int kBytes>
__global__ void __launch_bounds__(kThreads, 3) sumForHomes(const __grid_constant__ PartialKernelArgs args) {
  __shared__ SourceMap map;
  __shared__ const std::byte* bases[kMaxNodeRanks];
  const PartialArgs& p = args.partial;
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kThreads) bases[i] = p.bases[i];
  ptx::waitForPreviousLaunch();
  const auto sourceAt = [&](int i) -> const AcrossSource& { return p.homes[i].from; };
  map.fill(p.homeCount, sourceAt);
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarpThreads;
  const RowPieces pieces = p.pieces;
  SourceReader reader(map, p.homeCount, pieces.count, threadIdx.x / kWarpThreads * gridDim.x + blockIdx.x,
                      gridDim.x * kWarps, sourceAt);
  for (SourceUnit unit; reader.next(unit);) {
    const PartialArgs::Home& home = p.homes[unit.source];
    const std::byte* const base = unit.held ? bases[unit.entry.rank] : nullptr;
    const bool here = base != nullptr;
    float weight = 0.0f;
    if (here) weight = p.weighted ? home.from.plan.weights[unit.firstEntry + lane] : 1.0f;
    const std::byte* const row = here ? base + unit.entry.row * args.rowBytes : nullptr;
    // The k-th rank of a token has its k-th place.
    const unsigned ranks = __ballot_sync(0xffffffffu, unit.held && (unit.entry.slot & plan::kDuplicate) == 0);
    const unsigned same = __match_any_sync(0xffffffffu, here ? unit.entry.rank : 0xffffu);
    const std::size_t offset = std::size_t{unit.piece} * pieces.bytes;
    const std::size_t end = min(offset + pieces.bytes, args.rowBytes);
    for (unsigned left = __ballot_sync(0xffffffffu, here); left != 0;) {
      const int one = __ffs(static_cast<int>(left)) - 1;
      const unsigned members = __shfl_sync(0xffffffffu, same, one);
      left &= ~members;
      const unsigned ordinal = static_cast<unsigned>(__popc(ranks & ((1u << one) - 1)));
      const std::size_t place = std::size_t{unit.token} * p.mostPartials + ordinal;
      std::byte* const out = home.partials + place * args.rowBytes;
      for (std::size_t begin = offset; begin < end; begin += kWarpThreads * kBytes) {
        const std::size_t at = begin + lane * kBytes;
        sumMembers<Number, kBytes>(members, row, weight, at, at < end, out);
      }
      if (home.arrivals == nullptr) continue;
      __syncwarp();
      if (lane == 0) {
        __threadfence_system();
        ptx::storeRelease(home.arrivals + place * pieces.count + unit.piece, 1);
      }
    }
  }
}

template <typename Number>
cudaError_t launchType(const PartialKernelArgs& args, std::uint64_t bits, int blocks, cudaStream_t stream) {
  constexpr int kElement = static_cast<int>(sizeof(typename Number::Element));
  if (bits % 16 == 0) return launch(sumForHomes<Number, 16>, args, blocks, kThreads, 0, stream);
  if (bits % kElement == 0) return launch(sumForHomes<Number, kElement>, args, blocks, kThreads, 0, stream);
  return launch(sumForHomes<Anywhere<Number>, kElement>, args, blocks, kThreads, 0, stream);
}

}  // namespace

int launchPartial(const PartialArgs& partial, const Budget& budget, void* stream) {
  if (partial.homeCount == 0 || partial.maxTokens == 0 || partial.elements == 0) return cudaSuccess;
  PartialKernelArgs args{partial, partial.elements * (partial.type == SumType::f32 ? 4 : 2)};
  std::uint64_t bits = args.rowBytes;
  for (const std::byte* base : partial.bases) bits |= reinterpret_cast<std::uintptr_t>(base);
  const std::int64_t units = std::int64_t{partial.homeCount} * partial.maxTokens * partial.pieces.count;
  // On all multiprocessors there is room left for launchSum, which waits; within a budget both have their own.
  const std::int64_t most = budget.blocks > 0 ? budget.blocks * 3 : deviceShape().sms * 2;
  const auto blocks = static_cast<int>(std::clamp<std::int64_t>((units + kWarps - 1) / kWarps, 1, most));
  auto* on = static_cast<cudaStream_t>(stream);
  switch (partial.type) {
    case SumType::bf16:
      return launchType<Bf16>(args, bits, blocks, on);
    case SumType::f16:
      return launchType<F16>(args, bits, blocks, on);
    case SumType::f32:
      return launchType<F32>(args, bits, blocks, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fusco::kernels
