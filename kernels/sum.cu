// Combine in a node: for each token its rows are read where they lie, added up in FP32 by rank, then slot, and written
// once.
#include <algorithm>

#include "kernels/across.cuh"
#include "kernels/grid.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/warp_sum.cuh"

namespace fusco::kernels {

namespace {

constexpr int kWarp = 32;

// A unit of work is a piece of a token's row; units of all local ranks form one sequence.
struct SumKernelArgs {
  SumArgs sum;
  std::size_t rowBytes;
  int pieces;
  unsigned pieceBytes;
};

// The rank and slot order of `count` <= 32 entries: lane k's entry comes at the returned position.
__device__ int positionOf(unsigned rank, int lane, int count) {
  int position = 0;
  for (int j = 0; j < count; ++j) {
    const unsigned other = __shfl_sync(0xffffffffu, rank, j);
    position += other < rank || (other == rank && j < lane);
  }
  return position;
}

// More than 32 terms, which is rare: passes over the entries, one for each rank that occurs, rising.
template <typename Number, int kBytes>
__device__ void sumMany(const SumKernelArgs& args, const PlanPointers& plan, unsigned firstEntry, unsigned endEntry,
                        unsigned offset, unsigned bytes, const std::byte* const* bases, const std::byte* bias,
                        std::byte* out) {
  for (unsigned at = threadIdx.x % kWarp * kBytes; at < bytes; at += kWarp * kBytes) {
    VectorSum<Number, kBytes> sum(bias, at);
    int last = -1;
    for (;;) {
      int next = 0x10000;
      for (unsigned e = firstEntry; e < endEntry; ++e) {
        const int r = plan.entries[e].rank;
        if (r > last && r < next) next = r;
      }
      if (next == 0x10000) break;
      for (unsigned e = firstEntry; e < endEntry; ++e) {
        const plan::Entry entry = plan.entries[e];
        if (entry.rank != next) continue;
        Pack<Number, kBytes> value;
        value.read(bases[entry.rank] + entry.row * args.rowBytes + offset + at);
        sum.add(value, args.sum.weighted ? plan.weights[e] : 1.0f);
      }
      last = next;
    }
    sum.write(out + at);
  }
}

template <typename Number, int kBytes, Warps kWarps>
__device__ void sumPiece(const SumKernelArgs& args, const SumArgs::Rank& rank, unsigned token, unsigned firstEntry,
                         unsigned endEntry, unsigned offset, unsigned bytes, const std::byte* const* bases, int local) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const unsigned many = endEntry - firstEntry;
  const std::byte* bias = rank.bias == nullptr ? nullptr : rank.bias + token * args.rowBytes + offset;
  std::byte* out = rank.out + token * args.rowBytes + offset;
  if (many > kWarp)
    return sumMany<Number, kBytes>(args, rank.plan, firstEntry, endEntry, offset, bytes, bases, bias, out);

  WarpTerm mine{nullptr, 0.0f};
  int count = static_cast<int>(many);
  if (count > 0) {
    // Each lane takes an entry; then lane p fetches the one that comes p-th.
    plan::Entry entry{0xffff, 0, 0};
    float weight = 0.0f;
    if (lane < count) {
      entry = rank.plan.entries[firstEntry + lane];
      weight = args.sum.weighted ? rank.plan.weights[firstEntry + lane] : 1.0f;
    }
    const std::byte* row = lane < count ? bases[entry.rank] + entry.row * args.rowBytes + offset : nullptr;
    unsigned order = entry.rank;
    if (args.sum.across) {
      // A sum stands for the rows of its rank, the others of them come last and are left out.
      const bool first = lane < count && (entry.slot & plan::kDuplicate) == 0;
      const unsigned ranks = __ballot_sync(0xffffffffu, first);
      const bool brought = lane < count && args.sum.brings[entry.rank];
      if (brought) {
        const unsigned at = token * static_cast<unsigned>(args.sum.mostPartials) +
                            static_cast<unsigned>(__popc(ranks & ((1u << lane) - 1)));
        row = args.sum.partials[local] + std::size_t{at} * args.rowBytes + offset;
        weight = 1.0f;
        if (!first) order = 0x10000;
      }
      if (args.sum.arrivals[local] != nullptr) {
        std::uint32_t* arrival = nullptr;
        if (brought && first) {
          const auto ordinal = static_cast<unsigned>(__popc(ranks & ((1u << lane) - 1)));
          arrival = args.sum.arrivals[local] +
                    (std::size_t{token} * args.sum.mostPartials + ordinal) * static_cast<unsigned>(args.pieces) +
                    offset / args.pieceBytes;
        }
        if (!waitForArrivals(arrival, args.sum.wait)) return;
      }
      count -= __popc(__ballot_sync(0xffffffffu, brought && !first));
    }
    const int position = positionOf(order, lane, static_cast<int>(many));
    int from = lane;
    for (int j = 0; j < static_cast<int>(many); ++j) {
      if (__shfl_sync(0xffffffffu, position, j) == lane) from = j;
    }
    mine = termOf({row, weight}, from);
  }
  sumOfWarp<Number, kBytes, kWarps>(mine, count, bias, bytes, out);
}

struct RankUnits {
  unsigned first[kMaxLocalRanks + 1];
  unsigned copyBegin[kMaxLocalRanks], copyEnd[kMaxLocalRanks];
  unsigned tokens[kMaxLocalRanks];
};

// Copies of a flow lie by token. A unit is a copy; it also writes the tokens without a copy that come before it, and
// the last one those behind. Several copies of one token (a copy per entry) are summed by the first of them.
template <typename Number, int kBytes, Warps kWarps>
__global__ void __launch_bounds__(kSumThreads<kWarps>, kSumBlocks<kWarps>)
    sumRows(const __grid_constant__ SumKernelArgs args) {
  __shared__ RankUnits map;
  __shared__ const std::byte* bases[kMaxNodeRanks];
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kSumThreads<kWarps>) bases[i] = args.sum.bases[i];
  ptx::waitForPreviousLaunch();
  if (threadIdx.x < kWarp) {
    const int lane = static_cast<int>(threadIdx.x);
    unsigned units = 0;
    if (lane < args.sum.rankCount) {
      const PlanPointers& plan = args.sum.ranks[lane].plan;
      map.copyBegin[lane] = plan.flow->copyBegin;
      map.copyEnd[lane] = plan.flow->copyEnd;
      map.tokens[lane] = static_cast<unsigned>(plan.header->tokensUsed);
      // One more than the copies: it writes the tokens behind the last copy.
      units = (plan.flow->copyEnd - plan.flow->copyBegin + 1) * static_cast<unsigned>(args.pieces);
    }
    for (int d = 1; d < kWarp; d *= 2) {
      const unsigned other = __shfl_up_sync(0xffffffffu, units, d);
      if (lane >= d) units += other;
    }
    if (lane < args.sum.rankCount) map.first[lane + 1] = units;
    if (lane == 0) map.first[0] = 0;
  }
  __syncthreads();

  const unsigned warps = gridDim.x * (kSumThreads<kWarps> / kWarp);
  const unsigned total = map.first[args.sum.rankCount];
  for (unsigned index = (threadIdx.x / kWarp) * gridDim.x + blockIdx.x; index < total; index += warps) {
    int r = 0;
    while (index >= map.first[r + 1]) ++r;
    const SumArgs::Rank& rank = args.sum.ranks[r];
    const unsigned within = index - map.first[r];
    const unsigned offset = within % static_cast<unsigned>(args.pieces) * args.pieceBytes;
    const unsigned bytes = min(args.pieceBytes, static_cast<unsigned>(args.rowBytes) - offset);
    const unsigned copy = map.copyBegin[r] + within / static_cast<unsigned>(args.pieces);
    const plan::Copy* copies = rank.plan.copies;
    const bool isFirst = copy == map.copyBegin[r];
    const bool isEnd = copy == map.copyEnd[r];
    const unsigned token = isEnd ? map.tokens[r] : copies[copy].token;
    const unsigned previous = isFirst ? 0xffffffffu : copies[copy - 1].token;
    if (!isEnd && !isFirst && previous == token) continue;
    for (unsigned bare = previous + 1; bare < token; ++bare)
      sumPiece<Number, kBytes, kWarps>(args, rank, bare, 0, 0, offset, bytes, bases, r);
    if (isEnd) continue;
    unsigned end = copy + 1;
    while (end < map.copyEnd[r] && copies[end].token == token) ++end;
    sumPiece<Number, kBytes, kWarps>(args, rank, token, copies[copy].firstEntry, copies[end].firstEntry, offset, bytes,
                                     bases, r);
  }
}

template <typename Number, int kBytes, Warps kWarps>
cudaError_t launchWarps(SumKernelArgs args, const Budget& budget, cudaStream_t stream) {
  constexpr int kThreads = kSumThreads<kWarps>, kUnits = kThreads / kWarp;
  const std::int64_t tokens = std::int64_t{args.sum.rankCount} * args.sum.maxTokens;
  // Who waits for other GPUs leaves them room to work.
  const bool waits = args.sum.across && args.sum.arrivals[0] != nullptr;
  const std::int64_t most = budget.blocks > 0 ? std::int64_t{budget.blocks} * kSumBlocks<kWarps>
                                              : std::int64_t{deviceShape().sms} * (waits ? 1 : kSumBlocks<kWarps>);
  const auto row = static_cast<std::int64_t>(args.rowBytes);
  constexpr std::int64_t kStep = kWarp * kBytes;
  const std::int64_t wanted = (2 * most * kUnits + tokens - 1) / tokens;
  std::int64_t pieces = std::clamp<std::int64_t>(wanted, 1, (row + kStep - 1) / kStep);
  std::int64_t piece = (row + pieces - 1) / pieces;
  piece = (piece + kStep - 1) / kStep * kStep;
  args.pieces = static_cast<int>((row + piece - 1) / piece);
  args.pieceBytes = static_cast<unsigned>(piece);
  if (waits) {
    args.pieces = static_cast<int>(args.sum.pieces.count);
    args.pieceBytes = args.sum.pieces.bytes;
  }
  const std::int64_t units = (tokens + args.sum.rankCount) * args.pieces;
  const auto blocks = static_cast<int>(std::clamp<std::int64_t>((units + kUnits - 1) / kUnits, 1, most));
  return launch(sumRows<Number, kBytes, kWarps>, args, blocks, kThreads, 0, stream);
}

// `bits`: of all addresses and sizes.
template <typename Number>
cudaError_t launchType(const SumKernelArgs& args, std::uint64_t bits, const Budget& budget, cudaStream_t stream) {
  constexpr int kElement = static_cast<int>(sizeof(typename Number::Element));
  if (bits % 16 == 0 && budget.blocks > 0) return launchWarps<Number, 16, Warps::few>(args, budget, stream);
  if (bits % 16 == 0) return launchWarps<Number, 16, Warps::many>(args, budget, stream);
  if (bits % kElement == 0) return launchWarps<Number, kElement, Warps::many>(args, budget, stream);
  return launchWarps<Anywhere<Number>, kElement, Warps::many>(args, budget, stream);
}

}  // namespace

int launchSum(const SumArgs& sum, const Budget& budget, void* stream) {
  if (sum.maxTokens == 0 || sum.rankCount == 0 || sum.elements == 0) return cudaSuccess;
  SumKernelArgs args{};
  args.sum = sum;
  args.rowBytes = sum.elements * (sum.type == SumType::f32 ? 4 : 2);
  std::uint64_t bits = args.rowBytes;
  for (int i = 0; i < sum.rankCount; ++i)
    bits |= reinterpret_cast<std::uintptr_t>(sum.ranks[i].out) | reinterpret_cast<std::uintptr_t>(sum.ranks[i].bias);
  for (const std::byte* base : sum.bases) bits |= reinterpret_cast<std::uintptr_t>(base);
  auto* on = static_cast<cudaStream_t>(stream);
  switch (sum.type) {
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
