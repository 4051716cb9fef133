// Dispatch of BF16 rows that are cast to FP8 e4m3 on their way: each row is read and cast once and written to all of
// its places.
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
constexpr int kGroup = 128;                      // elements that share a scale
constexpr int kOfLane = 16;                      // elements of a lane: eight lanes have a group
constexpr int kOfWarp = kWarpThreads * kOfLane;  // elements of a step

// To nearest even, saturating at 448; NaN is 0x7f.
__device__ unsigned toE4m3(float x) {
  if (x != x) return 0x7f;
  const unsigned bits = __float_as_uint(x);
  const unsigned sign = bits >> 24 & 0x80u;
  const float magnitude = fminf(fabsf(x), 448.0f);
  if (magnitude < 0x1p-6f) {
    // Multiples of 2^-9: a sum with 2^14 rounds to them and leaves the multiple in the lowest bits.
    return sign | (__float_as_uint(__fadd_rn(magnitude, 0x1p14f)) - __float_as_uint(0x1p14f));
  }
  const unsigned wide = __float_as_uint(magnitude);
  const unsigned rounded = wide + 0x7ffffu + (wide >> 20 & 1u) - (120u << 23);
  return sign | rounded >> 20;
}

// Sixteen elements of a lane.
template <bool kAligned>
__device__ void readElements(const std::byte* from, unsigned short* elements) {
  if constexpr (kAligned) {
    const auto* vectors = reinterpret_cast<const uint4*>(from);
    reinterpret_cast<uint4*>(elements)[0] = __ldcs(vectors);
    reinterpret_cast<uint4*>(elements)[1] = __ldcs(vectors + 1);
  } else {
    for (int i = 0; i < kOfLane; ++i)
      elements[i] =
          static_cast<unsigned short>(static_cast<unsigned>(from[2 * i]) | static_cast<unsigned>(from[2 * i + 1]) << 8);
  }
}

template <bool kAligned>
__device__ void writeCodes(std::byte* to, uint4 codes) {
  if constexpr (kAligned) {
    __stcs(reinterpret_cast<uint4*>(to), codes);
  } else {
    const unsigned words[] = {codes.x, codes.y, codes.z, codes.w};
    for (int i = 0; i < kOfLane; ++i) to[i] = static_cast<std::byte>(words[i / 4] >> (8 * (i % 4)));
  }
}

__device__ void writeScale(std::byte* to, float scale, bool aligned) {
  if (aligned) {
    *reinterpret_cast<float*>(to) = scale;
    return;
  }
  for (int i = 0; i < 4; ++i) to[i] = static_cast<std::byte>(__float_as_uint(scale) >> (8 * i));
}

// A unit is a piece of a copy's row, a warp's work.
struct CastKernelArgs {
  CastPlaceArgs cast;
  int pieces;
  unsigned pieceElements;
};

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) castRows(const __grid_constant__ CastKernelArgs args) {
  __shared__ CopyMap map;
  __shared__ std::byte* bases[kMaxNodeRanks];
  __shared__ std::byte* scaleBases[kMaxNodeRanks];
  const PlaceArgs& place = args.cast.place;
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kThreads) {
    bases[i] = place.bases[i];
    scaleBases[i] = args.cast.scaleBases[i];
  }
  ptx::waitForPreviousLaunch();
  map.fill(place.ranks, place.rankCount);
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarpThreads;
  const auto pieces = static_cast<unsigned>(args.pieces);
  const auto all = static_cast<unsigned>(place.rowBytes / 2);
  for (unsigned unit = blockIdx.x * kWarps + threadIdx.x / kWarpThreads; unit / pieces < map.first[place.rankCount];
       unit += gridDim.x * kWarps) {
    const unsigned index = unit / pieces;
    const int r = map.rankOf(index);
    const PlanPointers& plan = place.ranks[r].plan;
    const unsigned c = map.copyOf(r, index);
    const plan::Copy copy = plan.copies[c];
    const unsigned last = plan.copies[c + 1].firstEntry;
    const std::byte* row = place.ranks[r].source + copy.token * place.sourceStride;
    const unsigned end = min(all, (unit % pieces + 1) * args.pieceElements);
    for (unsigned begin = unit % pieces * args.pieceElements; begin < end; begin += kOfWarp) {
      const unsigned at = begin + lane * kOfLane;
      const bool inside = at < end;  // the same for all lanes of a group
      alignas(16) unsigned short elements[kOfLane] = {};
      if (inside) readElements<kAligned>(row + 2 * at, elements);
      unsigned largest = 0;  // bits of the largest finite magnitude: as integers they compare alike
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const unsigned magnitude = elements[i] & 0x7fffu;
        if (magnitude < 0x7f80u) largest = max(largest, magnitude);
      }
      for (int d = 1; d < kGroup / kOfLane; d *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, d));
      const float scale = __fdiv_rn(fmaxf(__uint_as_float(largest << 16), 1e-4f), 448.0f);
      unsigned words[4] = {};
#pragma unroll
      for (int i = 0; i < kOfLane; ++i)
        words[i / 4] |= toE4m3(__fdiv_rn(Bf16::load(elements[i]), scale)) << (8 * (i % 4));
      if (!inside) continue;
      const uint4 codes = make_uint4(words[0], words[1], words[2], words[3]);
      for (unsigned e = copy.firstEntry; e < last; ++e) {
        const plan::Entry entry = plan.entries[e];
        if (place.skipDuplicates && (entry.slot & plan::kDuplicate) != 0) continue;
        if (std::byte* base = bases[entry.rank]; base != nullptr)
          writeCodes<kAligned>(base + entry.row * place.destinationStride + at, codes);
        if (lane % (kGroup / kOfLane) != 0) continue;
        if (std::byte* base = scaleBases[entry.rank]; base != nullptr)
          writeScale(base + entry.row * args.cast.scaleStride + at / kGroup * 4, scale, kAligned);
      }
    }
  }
}

}  // namespace

int launchCastPlace(const CastPlaceArgs& cast, const Budget& budget, void* stream) {
  const PlaceArgs& place = cast.place;
  if (place.maxTokens == 0 || place.rankCount == 0 || place.rowBytes == 0) return cudaSuccess;
  if (place.rowBytes > UINT32_MAX / 2 || place.rowBytes % (2 * kGroup) != 0) return cudaErrorInvalidValue;
  std::uint64_t bits = place.sourceStride | place.destinationStride;
  std::uint64_t scaleBits = cast.scaleStride;
  for (int i = 0; i < place.rankCount; ++i) bits |= reinterpret_cast<std::uintptr_t>(place.ranks[i].source);
  for (const std::byte* base : place.bases) bits |= reinterpret_cast<std::uintptr_t>(base);
  for (const std::byte* base : cast.scaleBases) scaleBits |= reinterpret_cast<std::uintptr_t>(base);
  CastKernelArgs args{};
  args.cast = cast;
  const std::int64_t copies = std::int64_t{place.rankCount} * place.maxTokens;
  const std::int64_t most = blocksFor(budget, deviceShape().sms, 8);
  // Rows are cut when there are too few of them for the GPU.
  const auto elements = static_cast<std::int64_t>(place.rowBytes / 2);
  const std::int64_t steps = (elements + kOfWarp - 1) / kOfWarp;
  const std::int64_t pieces = std::clamp<std::int64_t>(most * kWarps / copies, 1, steps);
  args.pieceElements = static_cast<unsigned>((steps + pieces - 1) / pieces * kOfWarp);
  args.pieces = static_cast<int>((elements + args.pieceElements - 1) / args.pieceElements);
  const std::int64_t units = copies * args.pieces;
  const int blocks = static_cast<int>(std::clamp<std::int64_t>((units + kWarps - 1) / kWarps, 1, most));
  auto* on = static_cast<cudaStream_t>(stream);
  if (bits % 16 == 0 && scaleBits % 4 == 0) return launch(castRows<true>, args, blocks, kThreads, 0, on);
  return launch(castRows<false>, args, blocks, kThreads, 0, on);
}

}  // namespace fusco::kernels
