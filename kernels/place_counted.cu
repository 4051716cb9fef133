// Dispatch that tells when a row is complete: a block for each copy, so that one barrier knows that its row has been
// written to all places.
#include <algorithm>

#include "kernels/beside.cuh"
#include "kernels/grid.h"
#include "kernels/ptx.cuh"

namespace fusco::kernels {

namespace {

constexpr int kThreads = 256;

template <typename Vector>
__global__ void __launch_bounds__(kThreads) placeCounted(const __grid_constant__ CountedPlaceArgs args) {
  __shared__ CopyMap map;
  __shared__ std::byte* bases[kMaxNodeRanks];
  const PlaceArgs& place = args.place;
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kThreads) bases[i] = place.bases[i];
  ptx::waitForPreviousLaunch();
  map.fill(place.ranks, place.rankCount);
  __syncthreads();
  constexpr unsigned kUnroll = 4;
  const auto vectors = static_cast<unsigned>(place.rowBytes / sizeof(Vector));
  for (unsigned index = blockIdx.x; index < map.first[place.rankCount]; index += gridDim.x) {
    const int r = map.rankOf(index);
    const PlanPointers& plan = place.ranks[r].plan;
    const unsigned c = map.copyOf(r, index);
    const plan::Copy copy = plan.copies[c];
    const unsigned end = plan.copies[c + 1].firstEntry;
    const auto* source = reinterpret_cast<const Vector*>(place.ranks[r].source + copy.token * place.sourceStride);
    for (unsigned begin = threadIdx.x; begin < vectors; begin += kThreads * kUnroll) {
      Vector values[kUnroll];
#pragma unroll
      for (unsigned i = 0; i < kUnroll; ++i) {
        if (begin + i * kThreads < vectors) values[i] = __ldcs(source + begin + i * kThreads);
      }
      for (unsigned e = copy.firstEntry; e < end; ++e) {
        const plan::Entry entry = plan.entries[e];
        std::byte* base = bases[entry.rank];
        if (base == nullptr || (place.skipDuplicates && (entry.slot & plan::kDuplicate) != 0)) continue;
        auto* destination = reinterpret_cast<Vector*>(base + entry.row * place.destinationStride);
#pragma unroll
        for (unsigned i = 0; i < kUnroll; ++i) {
          if (begin + i * kThreads < vectors) destination[begin + i * kThreads] = values[i];
        }
      }
    }
    __syncthreads();
    for (unsigned e = copy.firstEntry + threadIdx.x; e < end; e += kThreads) {
      const plan::Entry entry = plan.entries[e];
      const BesideBoard& board = args.boards[entry.rank];
      if (board.counters != nullptr) countRow(board, entry.row, args.oneGpu);
    }
  }
}

template <typename Vector>
cudaError_t launchVectors(const CountedPlaceArgs& args, const Budget& budget, cudaStream_t stream) {
  const std::int64_t copies = std::int64_t{args.place.rankCount} * args.place.maxTokens;
  const std::int64_t most = blocksFor(budget, deviceShape().sms, 8);
  return launch(placeCounted<Vector>, args, static_cast<int>(std::clamp<std::int64_t>(copies, 1, most)), kThreads, 0,
                stream);
}

}  // namespace

int launchCountedPlace(const CountedPlaceArgs& args, const Budget& budget, void* stream) {
  const PlaceArgs& place = args.place;
  if (place.maxTokens == 0 || place.rankCount == 0 || place.rowBytes == 0) return cudaSuccess;
  if (place.rowBytes > UINT32_MAX / 2) return cudaErrorInvalidValue;
  std::uint64_t bits = place.sourceStride | place.destinationStride | place.rowBytes;
  for (int i = 0; i < place.rankCount; ++i) bits |= reinterpret_cast<std::uintptr_t>(place.ranks[i].source);
  for (const std::byte* base : place.bases) bits |= reinterpret_cast<std::uintptr_t>(base);
  auto* on = static_cast<cudaStream_t>(stream);
  if (bits % 16 == 0) return launchVectors<uint4>(args, budget, on);
  if (bits % 4 == 0) return launchVectors<unsigned>(args, budget, on);
  return launchVectors<unsigned char>(args, budget, on);
}

}  // namespace fusco::kernels
