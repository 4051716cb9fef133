// Dispatch in a node: rows in source order, each read once and written to all of its places.
#include <algorithm>
#include <iterator>

#include "kernels/grid.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"

namespace fusco::kernels {

namespace {

constexpr int kWarp = 32;

// A unit of work is a piece of a copy's row. Units of all local ranks form one sequence; a warp takes every n-th.
struct PlaceKernelArgs {
  PlaceArgs place;
  int pieces;            // of a row
  unsigned pieceBytes;   // of all but the last
  unsigned bufferBytes;  // bulk: room of one piece in shared memory
};

struct Unit {
  int rank;
  unsigned copy;  // index in the arena
  unsigned offset;
  unsigned bytes;
};

// The first unit of each local rank, and behind the last.
struct UnitMap {
  unsigned first[kMaxLocalRanks + 1];
  unsigned copyBegin[kMaxLocalRanks];
};

__device__ void mapUnits(const PlaceKernelArgs& args, UnitMap& map) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= kWarp) return;
  unsigned copies = 0;
  if (lane < args.place.rankCount) {
    const plan::Flow* flow = args.place.ranks[lane].plan.flow;
    map.copyBegin[lane] = flow->copyBegin;
    copies = flow->copyEnd - flow->copyBegin;
  }
  unsigned sum = copies * static_cast<unsigned>(args.pieces);
  for (int d = 1; d < kWarp; d *= 2) {
    const unsigned other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane < args.place.rankCount) map.first[lane + 1] = sum;
  if (lane == 0) map.first[0] = 0;
}

__device__ Unit unitAt(const PlaceKernelArgs& args, const UnitMap& map, unsigned index) {
  int rank = 0;
  while (index >= map.first[rank + 1]) ++rank;
  const unsigned within = index - map.first[rank];
  const unsigned piece = within % static_cast<unsigned>(args.pieces);
  Unit unit;
  unit.rank = rank;
  unit.copy = map.copyBegin[rank] + within / static_cast<unsigned>(args.pieces);
  unit.offset = piece * args.pieceBytes;
  unit.bytes = min(args.pieceBytes, static_cast<unsigned>(args.place.rowBytes) - unit.offset);
  return unit;
}

__device__ void copyBases(const PlaceKernelArgs& args, std::byte** bases) {
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += static_cast<int>(blockDim.x))
    bases[i] = args.place.bases[i];
}

// Where an entry's row begins, or null when it is left out.
__device__ std::byte* placeOf(const PlaceKernelArgs& args, std::byte* const* bases, const plan::Entry& entry) {
  if ((entry.slot & plan::kDuplicate) != 0 &&
      (args.place.skipDuplicates || (args.place.across && args.place.expands[entry.rank])))
    return nullptr;
  std::byte* base = bases[entry.rank];
  return base == nullptr ? nullptr : base + entry.row * args.place.destinationStride;
}

// Any row size and alignment: Vector is what all addresses are multiples of.
template <typename Vector>
__global__ void __launch_bounds__(256) placeVectors(const __grid_constant__ PlaceKernelArgs args) {
  __shared__ UnitMap map;
  __shared__ std::byte* bases[kMaxNodeRanks];
  copyBases(args, bases);
  ptx::waitForPreviousLaunch();
  mapUnits(args, map);
  __syncthreads();
  const unsigned warps = gridDim.x * (blockDim.x / kWarp);
  const unsigned lane = threadIdx.x % kWarp;
  constexpr unsigned kUnroll = 4;
  for (unsigned index = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
       index < map.first[args.place.rankCount]; index += warps) {
    const Unit unit = unitAt(args, map, index);
    const PlanPointers& plan = args.place.ranks[unit.rank].plan;
    const plan::Copy copy = plan.copies[unit.copy];
    const unsigned end = plan.copies[unit.copy + 1].firstEntry;
    const auto* source = reinterpret_cast<const Vector*>(args.place.ranks[unit.rank].source +
                                                         copy.token * args.place.sourceStride + unit.offset);
    const unsigned vectors = unit.bytes / sizeof(Vector);
    for (unsigned begin = lane; begin < vectors; begin += kWarp * kUnroll) {
      Vector values[kUnroll];
#pragma unroll
      for (unsigned i = 0; i < kUnroll; ++i) {
        if (begin + i * kWarp < vectors) values[i] = __ldcs(source + begin + i * kWarp);
      }
      for (unsigned e = copy.firstEntry; e < end; ++e) {
        std::byte* row = placeOf(args, bases, plan.entries[e]);
        if (row == nullptr) continue;
        auto* destination = reinterpret_cast<Vector*>(row + unit.offset);
#pragma unroll
        for (unsigned i = 0; i < kUnroll; ++i) {
          if (begin + i * kWarp < vectors) __stcs(destination + begin + i * kWarp, values[i]);
        }
      }
    }
  }
}

// Hopper and later: the copy engine of the SM moves rows through shared memory. A warp keeps kStages pieces under way;
// lane k stores to the k-th place. Shared memory of a warp: buffers, then barriers; entries lie in static memory.
// kTells: other GPUs are told of pieces that have come there (kernels/across.h).
template <int kStages, int kWarps, bool kTells>
__global__ void __launch_bounds__(kWarps* kWarp) placeBulk(const __grid_constant__ PlaceKernelArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ UnitMap map;
  __shared__ std::byte* bases[kMaxNodeRanks];
  __shared__ std::uint64_t barriers[kWarps][kStages];
  struct Meta {
    unsigned first, end;
    unsigned rank;
    unsigned offset;
    unsigned bytes;
    unsigned arrival;  // among those of a GPU
  };
  __shared__ Meta metas[kWarps][kStages];
  __shared__ plan::Entry entries[kWarps][kStages][kWarp];

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned char* mine = buffers + static_cast<std::size_t>(warp) * kStages * args.bufferBytes;
  if (lane == 0) {
    for (int s = 0; s < kStages; ++s) ptx::barrierInit(&barriers[warp][s], 1);
    ptx::barrierInitFence();
  }
  copyBases(args, bases);
  const std::uint64_t policy = ptx::evictFirst();
  ptx::waitForPreviousLaunch();
  mapUnits(args, map);
  __syncthreads();

  const unsigned warps = gridDim.x * kWarps;
  const unsigned self = static_cast<unsigned>(warp) * gridDim.x + blockIdx.x;
  const unsigned total = map.first[args.place.rankCount];
  const unsigned count = self < total ? (total - self + warps - 1) / warps : 0;  // units of this warp

  // The copy and its successor of the unit to be loaded next, read one step ahead: lane 0 has the first, lane 1 the
  // second.
  const auto readPair = [&](unsigned n) -> plan::Copy {
    if (n >= count || lane > 1) return {0, 0};
    const Unit unit = unitAt(args, map, self + n * warps);
    return args.place.ranks[unit.rank].plan.copies[unit.copy + static_cast<unsigned>(lane)];
  };
  plan::Copy pair = readPair(0);
  const auto load = [&](unsigned n) {
    const Unit unit = unitAt(args, map, self + n * warps);
    const int stage = static_cast<int>(n % kStages);
    const unsigned token = __shfl_sync(0xffffffffu, pair.token, 0);
    const unsigned first = __shfl_sync(0xffffffffu, pair.firstEntry, 0);
    const unsigned end = __shfl_sync(0xffffffffu, pair.firstEntry, 1);
    const PlaceArgs::Rank& rank = args.place.ranks[unit.rank];
    if (lane == 0) {
      ptx::barrierExpect(&barriers[warp][stage], unit.bytes);
      ptx::bulkLoad(mine + stage * args.bufferBytes, rank.source + token * args.place.sourceStride + unit.offset,
                    unit.bytes, &barriers[warp][stage], policy);
      metas[warp][stage] = {first, end, static_cast<unsigned>(unit.rank), unit.offset, unit.bytes, 0};
      if (kTells)
        metas[warp][stage].arrival = args.place.firstUnit[unit.rank] + self + n * warps - map.first[unit.rank];
    }
    if (first + static_cast<unsigned>(lane) < end) {
      // Arrives long before it is needed.
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(ptx::sharedAddress(&entries[warp][stage][lane])),
                   "l"(rank.plan.entries + first + lane)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    pair = readPair(n + 1);
  };

  // Unit n, whose stores have ended: one word for each GPU that copies its row.
  const auto tell = [&](unsigned n) {
    const int stage = static_cast<int>(n % kStages);
    __syncwarp();
    const Meta meta = metas[warp][stage];
    std::uint32_t* arrivals = nullptr;
    if (meta.first + static_cast<unsigned>(lane) < meta.end) {
      const plan::Entry entry = entries[warp][stage][lane];
      if ((entry.slot & plan::kDuplicate) != 0 && args.place.expands[entry.rank])
        arrivals = args.place.arrivals[entry.rank];
    }
    const unsigned same = __match_any_sync(0xffffffffu, reinterpret_cast<unsigned long long>(arrivals));
    if (arrivals != nullptr && lane == __ffs(static_cast<int>(same)) - 1) {
      ptx::storeRelease(arrivals + meta.arrival, 1);
    }
    __syncwarp();
  };

  for (unsigned n = 0; n + 1 < kStages; ++n) {
    if (n < count) {
      load(n);
    } else {
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
  }
  for (unsigned n = 0; n < count; ++n) {
    const int stage = static_cast<int>(n % kStages);
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    ptx::barrierWait(&barriers[warp][stage], n / kStages & 1);
    __syncwarp();
    const Meta meta = metas[warp][stage];
    const unsigned char* row = mine + stage * args.bufferBytes;
    for (unsigned e = meta.first + static_cast<unsigned>(lane); e < meta.end; e += kWarp) {
      const plan::Entry entry =
          e < meta.first + kWarp ? entries[warp][stage][lane] : args.place.ranks[meta.rank].plan.entries[e];
      std::byte* place = placeOf(args, bases, entry);
      if (place != nullptr) ptx::bulkStore(place + meta.offset, row, meta.bytes);
    }
    ptx::bulkCommit();
    if (kTells && n > 0) {
      ptx::bulkWait<1>();
      tell(n - 1);
    }
    if (n + kStages - 1 < count) {
      if (!kTells) ptx::bulkWaitRead<1>();  // the stage before this one is free
      __syncwarp();
      load(n + kStages - 1);
    } else {
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
  }
  ptx::bulkWait<0>();
  if (kTells && count > 0) tell(count - 1);
#endif
}

template <typename Vector>
cudaError_t launchVectors(PlaceKernelArgs args, int sms, int budget, cudaStream_t stream) {
  const std::int64_t copies = std::int64_t{args.place.rankCount} * args.place.maxTokens;
  constexpr int kWarpsOfBlock = 8;
  const int most = (budget > 0 ? budget : sms) * 8;
  // Rows are cut when there are too few of them for the GPU.
  const auto vectors = static_cast<std::int64_t>(args.place.rowBytes / sizeof(Vector));
  const std::int64_t wanted =
      std::max<std::int64_t>(1, std::int64_t{most} * kWarpsOfBlock / std::max<std::int64_t>(copies, 1));
  const std::int64_t possible = std::max<std::int64_t>(1, vectors / kWarp);
  args.pieces = static_cast<int>(std::min(wanted, possible));
  const std::int64_t piece = (vectors + args.pieces - 1) / args.pieces;
  args.pieceBytes = static_cast<unsigned>(piece * static_cast<std::int64_t>(sizeof(Vector)));
  args.pieces = static_cast<int>((vectors + piece - 1) / piece);
  const std::int64_t units = copies * args.pieces;
  const int blocks = static_cast<int>(std::clamp<std::int64_t>((units + kWarpsOfBlock - 1) / kWarpsOfBlock, 1, most));
  return launch(placeVectors<Vector>, args, blocks, kWarpsOfBlock * kWarp, 0, stream);
}

constexpr unsigned kMostBuffer = kMostPieceBytes;

template <int kStages, int kWarps, bool kTells>
cudaError_t launchBulk(PlaceKernelArgs args, int blocks, cudaStream_t stream) {
  const std::int64_t copies = std::int64_t{args.place.rankCount} * args.place.maxTokens;
  const auto row = static_cast<std::int64_t>(args.place.rowBytes);
  // As few pieces as fit the buffers; more where there are too few rows to give every warp several.
  std::int64_t pieces = (row + kMostBuffer - 1) / kMostBuffer;
  const std::int64_t warps = std::int64_t{blocks} * kWarps;
  const std::int64_t wanted = (4 * warps + std::max<std::int64_t>(copies, 1) - 1) / std::max<std::int64_t>(copies, 1);
  pieces = std::max(pieces, std::min(wanted, std::max<std::int64_t>(1, row / 1024)));
  std::int64_t piece = (row + pieces - 1) / pieces;
  piece = kTells ? args.place.pieces.bytes : (piece + 15) / 16 * 16;
  args.pieces = static_cast<int>((row + piece - 1) / piece);
  args.pieceBytes = static_cast<unsigned>(piece);
  args.bufferBytes = (args.pieceBytes + 127) / 128 * 128;
  const std::int64_t units = copies * args.pieces;
  const int used = static_cast<int>(std::clamp<std::int64_t>(units, 1, blocks));
  // A block begins while the planning kernel before it still holds some SMs. One that may share an SM would settle on
  // those that are free, two or three together, and leave the others idle for the whole launch.
  const auto needed = static_cast<std::size_t>(args.bufferBytes) * kStages * kWarps;
  return launch(placeBulk<kStages, kWarps, kTells>, args, used, kWarps * kWarp, aloneBytes(needed), stream);
}

std::uint64_t bitsOf(const PlaceArgs& place) {
  std::uint64_t bits = place.sourceStride | place.destinationStride | place.rowBytes;
  for (int i = 0; i < place.rankCount; ++i) bits |= reinterpret_cast<std::uintptr_t>(place.ranks[i].source);
  for (const std::byte* base : place.bases) bits |= reinterpret_cast<std::uintptr_t>(base);
  return bits;
}

bool isBulk(const PlaceArgs& place) {
  return bitsOf(place) % 16 == 0 && deviceShape().major >= 9 && place.rowBytes < (1u << 31);
}

}  // namespace

bool placesAcross(const PlaceArgs& place) { return isBulk(place); }

int launchPlace(const PlaceArgs& place, const Budget& budget, void* stream) {
  if (place.maxTokens == 0 || place.rankCount == 0 || place.rowBytes == 0) return cudaSuccess;
  PlaceKernelArgs args{};
  args.place = place;
  const DeviceShape shape = deviceShape();
  auto* on = static_cast<cudaStream_t>(stream);
  const std::uint64_t bits = bitsOf(place);
  if (isBulk(place)) {
    // One warp a block reaches the wall when all SMs work; few SMs need more in flight.
    const int blocks = budget.blocks > 0 ? std::min(budget.blocks, shape.sms) : shape.sms;
    const bool tells = place.across && std::any_of(std::begin(place.arrivals), std::end(place.arrivals),
                                                   [](const std::uint32_t* word) { return word != nullptr; });
    constexpr std::size_t kFew = std::size_t{2} * 7 * kMostBuffer;
    if (blocks >= shape.sms * 3 / 4 || kFew > mostDynamicBytes())
      return tells ? launchBulk<4, 1, true>(args, blocks, on) : launchBulk<4, 1, false>(args, blocks, on);
    return tells ? launchBulk<2, 7, true>(args, blocks, on) : launchBulk<2, 7, false>(args, blocks, on);
  }
  if (bits % 16 == 0) return launchVectors<uint4>(args, shape.sms, budget.blocks, on);
  if (bits % 8 == 0) return launchVectors<uint2>(args, shape.sms, budget.blocks, on);
  if (bits % 4 == 0) return launchVectors<unsigned>(args, shape.sms, budget.blocks, on);
  if (bits % 2 == 0) return launchVectors<unsigned short>(args, shape.sms, budget.blocks, on);
  return launchVectors<unsigned char>(args, shape.sms, budget.blocks, on);
}

}  // namespace fusco::kernels
