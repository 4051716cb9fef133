// Combine in a node: for each token its rows are read where they lie, added up in FP32 by rank, then slot, and written
// once.
#include <algorithm>

#include "kernels/across.cuh"
#include "kernels/grid.h"
#include "kernels/launch.h"
#include "kernels/numbers.cuh"
#include "kernels/ptx.cuh"

namespace fusco::kernels {

namespace {

constexpr int kWarp = 32;
constexpr int kWarpsOfBlock = 8;

// A unit of work is a piece of a token's row; units of all local ranks form one sequence.
struct SumKernelArgs {
  SumArgs sum;
  std::size_t rowBytes;
  int pieces;
  unsigned pieceBytes;
};

// Terms of one token in the order of addition, by lane. More than 32 are taken in rounds.
struct Terms {
  const std::byte* row;
  float weight;
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

template <typename Number, int kBytes>
struct Sum {
  using Vector = Pack<Number, kBytes>;
  static constexpr int kGroup = 8;  // rows in flight

  // acc += weight * row for terms [0, count) held by lanes, at byte `at` of the rows.
  __device__ static void add(float* acc, const Terms& terms, int count, unsigned at, bool inside) {
    for (int first = 0; first < count; first += kGroup) {
      Vector values[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (first + k >= count) break;
        const auto* row = reinterpret_cast<const std::byte*>(
            __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(terms.row), first + k));
        if (inside) values[k].read(row + at);
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (first + k >= count) break;
        const float weight = __shfl_sync(0xffffffffu, terms.weight, first + k);
#pragma unroll
        for (int i = 0; i < Vector::kCount; ++i) acc[i] = fmaf(weight, Number::load(values[k].elements[i]), acc[i]);
      }
    }
  }
};

// The largest entry rank that was taken, so that more than 32 terms can be added in order: rank by rank.
template <typename Number, int kBytes>
__device__ void sumPiece(const SumKernelArgs& args, const SumArgs::Rank& rank, unsigned token, unsigned firstEntry,
                         unsigned endEntry, unsigned offset, unsigned bytes, const std::byte* const* bases, int local) {
  using Vector = Pack<Number, kBytes>;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const unsigned many = endEntry - firstEntry;
  const std::byte* biasRow = rank.bias == nullptr ? nullptr : rank.bias + token * args.rowBytes + offset;
  std::byte* out = rank.out + token * args.rowBytes + offset;

  Terms terms{nullptr, 0.0f};
  int count = many <= kWarp ? static_cast<int>(many) : 0;
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
        const unsigned pieces = static_cast<unsigned>(args.pieces);
        for (unsigned left = __ballot_sync(0xffffffffu, brought && first); left != 0; left &= left - 1) {
          const unsigned ordinal = static_cast<unsigned>(__popc(ranks & ((left & -left) - 1)));
          const std::size_t at =
              (std::size_t{token} * args.sum.mostPartials + ordinal) * pieces + offset / args.pieceBytes;
          if (!waitForArrival(args.sum.arrivals[local] + at, args.sum.wait)) return;
        }
      }
      count -= __popc(__ballot_sync(0xffffffffu, brought && !first));
    }
    const int position = positionOf(order, lane, static_cast<int>(many));
    int from = lane;
    for (int j = 0; j < static_cast<int>(many); ++j) {
      if (__shfl_sync(0xffffffffu, position, j) == lane) from = j;
    }
    terms.row =
        reinterpret_cast<const std::byte*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), from));
    terms.weight = __shfl_sync(0xffffffffu, weight, from);
  }

  for (unsigned begin = 0; begin < bytes; begin += kWarp * kBytes) {
    const unsigned at = begin + static_cast<unsigned>(lane) * kBytes;
    const bool inside = at < bytes;
    float acc[Vector::kCount];
    if (biasRow != nullptr && inside) {
      Vector bias;
      bias.read(biasRow + at);
#pragma unroll
      for (int i = 0; i < Vector::kCount; ++i) acc[i] = Number::load(bias.elements[i]);
    } else {
#pragma unroll
      for (int i = 0; i < Vector::kCount; ++i) acc[i] = 0.0f;
    }
    if (many <= kWarp) {
      Sum<Number, kBytes>::add(acc, terms, count, at, inside);
    } else if (inside) {
      // Rare: more than 32 slots. Passes over the entries, one for each rank that occurs, rising.
      int last = -1;
      for (;;) {
        int next = 0x10000;
        for (unsigned e = firstEntry; e < endEntry; ++e) {
          const int r = rank.plan.entries[e].rank;
          if (r > last && r < next) next = r;
        }
        if (next == 0x10000) break;
        for (unsigned e = firstEntry; e < endEntry; ++e) {
          const plan::Entry entry = rank.plan.entries[e];
          if (entry.rank != next) continue;
          Vector value;
          value.read(bases[entry.rank] + entry.row * args.rowBytes + offset + at);
          const float weight = args.sum.weighted ? rank.plan.weights[e] : 1.0f;
#pragma unroll
          for (int i = 0; i < Vector::kCount; ++i) acc[i] = fmaf(weight, Number::load(value.elements[i]), acc[i]);
        }
        last = next;
      }
    }
    if (inside) {
      Vector result;
#pragma unroll
      for (int i = 0; i < Vector::kCount; ++i) result.elements[i] = Number::round(acc[i]);
      result.write(out + at);
    }
  }
}

struct RankUnits {
  unsigned first[kMaxLocalRanks + 1];
  unsigned copyBegin[kMaxLocalRanks], copyEnd[kMaxLocalRanks];
  unsigned tokens[kMaxLocalRanks];
};

// Copies of a flow lie by token. A unit is a copy; it also writes the tokens without a copy that come before it, and
// the last one those behind. Several copies of one token (a copy per entry) are summed by the first of them.
template <typename Number, int kBytes>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp, 3) sumRows(const __grid_constant__ SumKernelArgs args) {
  __shared__ RankUnits map;
  __shared__ const std::byte* bases[kMaxNodeRanks];
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += static_cast<int>(blockDim.x))
    bases[i] = args.sum.bases[i];
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

  const unsigned warps = gridDim.x * kWarpsOfBlock;
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
      sumPiece<Number, kBytes>(args, rank, bare, 0, 0, offset, bytes, bases, r);
    if (isEnd) continue;
    unsigned end = copy + 1;
    while (end < map.copyEnd[r] && copies[end].token == token) ++end;
    sumPiece<Number, kBytes>(args, rank, token, copies[copy].firstEntry, copies[end].firstEntry, offset, bytes, bases,
                             r);
  }
}

template <typename Number, int kBytes>
cudaError_t launchNumbers(SumKernelArgs args, int sms, int budget, cudaStream_t stream) {
  const std::int64_t tokens = std::int64_t{args.sum.rankCount} * args.sum.maxTokens;
  // Who waits for other GPUs leaves them room to work.
  const bool waits = args.sum.across && args.sum.arrivals[0] != nullptr;
  const int most = budget > 0 ? budget * 3 : sms * (waits ? 1 : 3);
  const auto row = static_cast<std::int64_t>(args.rowBytes);
  constexpr std::int64_t kStep = kWarp * kBytes;
  const std::int64_t wanted = (2 * std::int64_t{most} * kWarpsOfBlock + tokens - 1) / tokens;
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
  const int blocks = static_cast<int>(std::clamp<std::int64_t>((units + kWarpsOfBlock - 1) / kWarpsOfBlock, 1, most));
  return launch(sumRows<Number, kBytes>, args, blocks, kWarpsOfBlock * kWarp, 0, stream);
}

// `bits`: of all addresses and sizes.
template <typename Number>
cudaError_t launchType(const SumKernelArgs& args, std::uint64_t bits, int sms, int budget, cudaStream_t stream) {
  constexpr int kElement = static_cast<int>(sizeof(typename Number::Element));
  if (bits % 16 == 0) return launchNumbers<Number, 16>(args, sms, budget, stream);
  if (bits % kElement == 0) return launchNumbers<Number, kElement>(args, sms, budget, stream);
  return launchNumbers<Anywhere<Number>, kElement>(args, sms, budget, stream);
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
  const int sms = deviceShape().sms;
  auto* on = static_cast<cudaStream_t>(stream);
  switch (sum.type) {
    case SumType::bf16:
      return launchType<Bf16>(args, bits, sms, budget.blocks, on);
    case SumType::f16:
      return launchType<F16>(args, bits, sms, budget.blocks, on);
    case SumType::f32:
      return launchType<F32>(args, bits, sms, budget.blocks, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fusco::kernels
