// The backward of combine in a node: a warp takes a gradient row, four lanes each of its entries.
#include <algorithm>

#include "kernels/beside.cuh"
#include "kernels/convert.h"
#include "kernels/grid.h"
#include "kernels/numbers.cuh"
#include "kernels/ptx.cuh"

namespace fusco::kernels {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kPartials = 32;                    // of a dot product: element i goes to partial i mod 32
constexpr int kLanes = 4;                        // of an entry
constexpr int kOfLane = kPartials / kLanes;      // partials of a lane
constexpr int kEntries = kWarpThreads / kLanes;  // that a warp has in hand

// Folds the partials of four lanes in halves: p[i] += p[i + 16], then 8, 4, 2, 1. The first lane has the result.
__device__ float fold(float* p) {
#pragma unroll
  for (int d = 2; d > 0; d /= 2) {
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) p[j] = __fadd_rn(p[j], __shfl_down_sync(0xffffffffu, p[j], d, kLanes));
  }
#pragma unroll
  for (int half = kOfLane / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) p[j] = __fadd_rn(p[j], p[j + half]);
  }
  return p[0] != p[0] ? __uint_as_float(0x7fc00000u) : p[0];
}

// kBytes: 16, or one element.
template <typename Number, int kBytes>
__global__ void __launch_bounds__(kThreads) backRows(const __grid_constant__ BackArgs args) {
  using Vector = Pack<Number, kBytes>;
  constexpr int kVectors = kOfLane / Vector::kCount;
  constexpr int kSize = static_cast<int>(sizeof(typename Number::Element));
  __shared__ CopyMap map;
  __shared__ std::byte* bases[kMaxNodeRanks];
  __shared__ const std::byte* expertBases[kMaxNodeRanks];
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kThreads) {
    bases[i] = args.bases[i];
    expertBases[i] = args.expertBases[i];
  }
  ptx::waitForPreviousLaunch();
  map.fill(args.ranks, args.rankCount);
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarpThreads;
  const unsigned part = lane % kLanes * kOfLane;  // first element of this lane among 32
  const std::size_t dense = args.elements * kSize;
  const std::size_t gradientStride = args.gradientStride > 0 ? args.gradientStride : dense;
  const std::size_t stride = args.stride > 0 ? args.stride : dense;
  for (unsigned index = blockIdx.x * kWarps + threadIdx.x / kWarpThreads; index < map.first[args.rankCount];
       index += gridDim.x * kWarps) {
    const int r = map.rankOf(index);
    const BackArgs::Rank& rank = args.ranks[r];
    const unsigned c = map.copyOf(r, index);
    const plan::Copy copy = rank.plan.copies[c];
    const unsigned last = rank.plan.copies[c + 1].firstEntry;
    const std::byte* gradient = rank.gradient + copy.token * gradientStride;
    for (unsigned first = copy.firstEntry; first < last; first += kEntries) {
      const unsigned e = first + lane / kLanes;
      const bool mine = e < last;
      const plan::Entry entry = rank.plan.entries[mine ? e : first];
      const float weight = rank.plan.weights[mine ? e : first];
      std::byte* to = bases[entry.rank] + entry.row * stride;
      const std::byte* expert = expertBases[entry.rank] + entry.row * stride;
      float partials[kOfLane] = {};
#pragma unroll 2
      for (std::size_t begin = part; begin < args.elements; begin += kPartials) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const std::size_t element = begin + v * Vector::kCount;
          if (!mine || element >= args.elements) continue;
          Vector g, x, scaled;
          g.read(gradient + element * kSize);
          x.read(expert + element * kSize);
#pragma unroll
          for (int i = 0; i < Vector::kCount; ++i) {
            const float value = Number::load(g.elements[i]);
            float& partial = partials[v * Vector::kCount + i];
            partial = fmaf(value, Number::load(x.elements[i]), partial);
            scaled.elements[i] = Number::round(__fmul_rn(weight, value));
          }
          scaled.write(to + element * kSize);
        }
      }
      const float dot = fold(partials);
      if (mine && lane % kLanes == 0)
        rank.dots[static_cast<std::size_t>(copy.token) * args.topk + (entry.slot & plan::kSlotMask)] = dot;
    }
  }
}

template <typename Number, int kBytes>
cudaError_t launchNumbers(const BackArgs& args, const Budget& budget, cudaStream_t stream) {
  const std::int64_t copies = std::int64_t{args.rankCount} * args.maxTokens;
  const std::int64_t most = blocksFor(budget, deviceShape().sms, 8);
  const int blocks = static_cast<int>(std::clamp<std::int64_t>((copies + kWarps - 1) / kWarps, 1, most));
  return launch(backRows<Number, kBytes>, args, blocks, kThreads, 0, stream);
}

template <typename Number>
cudaError_t launchType(const BackArgs& args, std::uint64_t bits, const Budget& budget, cudaStream_t stream) {
  if (bits % 16 == 0) return launchNumbers<Number, 16>(args, budget, stream);
  return launchNumbers<Anywhere<Number>, static_cast<int>(sizeof(typename Number::Element))>(args, budget, stream);
}

}  // namespace

int launchBack(const BackArgs& args, const Budget& budget, void* stream) {
  if (args.maxTokens == 0 || args.rankCount == 0 || args.elements == 0) return cudaSuccess;
  std::uint64_t bits = args.elements * (args.type == SumType::f32 ? 4 : 2) | args.gradientStride | args.stride;
  for (int i = 0; i < args.rankCount; ++i) bits |= reinterpret_cast<std::uintptr_t>(args.ranks[i].gradient);
  for (const std::byte* base : args.bases) bits |= reinterpret_cast<std::uintptr_t>(base);
  for (const std::byte* base : args.expertBases) bits |= reinterpret_cast<std::uintptr_t>(base);
  auto* on = static_cast<cudaStream_t>(stream);
  switch (args.type) {
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
