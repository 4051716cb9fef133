// Copies between layouts of rows: one launch for a list of them, cut into units that warps take in turn, so that a long
// copy and many short ones keep the GPU equally busy. Row lists of both ends are composed here: no row is packed first.
#include <algorithm>
#include <numeric>

#include "kernels/grid.h"
#include "kernels/ptx.cuh"
#include "kernels/transfer.h"

namespace fusco::kernels {

namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// A row list, counted in chunks: the longest pieces that are contiguous at both ends.
struct ListedEnd {
  std::byte* base;
  const void* list;
  std::size_t rowBytes;
  unsigned chunksOfRow;
  unsigned startChunk;
};

struct Piece {
  ListedEnd source, destination;
  std::size_t body;            // bytes that are copied by vectors, from `head` on
  unsigned firstUnit;          // units of this launch before it
  unsigned chunkVectors;       // vectors of a chunk; contiguous at both ends: 0
  unsigned chunks;
  unsigned chunksOfUnit;       // either several chunks are a unit,
  unsigned unitsOfChunk;       // or several units a chunk
  unsigned unitVectors;        // of the latter, and of contiguous copies
  unsigned char width;         // bytes of a vector: 16, 8, 4, 2, 1
  unsigned char head, tail;    // bytes before and behind the vectors, contiguous copies only
  unsigned char narrow;        // 1: source's list is of int32; 2: destination's
};

struct Pieces {
  Piece pieces[kMaxCopies];
  int count;
  unsigned units;
};
static_assert(sizeof(Pieces) <= 4096, "arguments of a kernel");

__device__ inline std::byte* chunkAt(const ListedEnd& end, bool narrow, unsigned chunk, std::size_t chunkBytes) {
  const unsigned at = end.startChunk + chunk;
  if (end.list == nullptr) return end.base + static_cast<std::size_t>(at) * chunkBytes;
  unsigned row = at, within = 0;
  if (end.chunksOfRow != 1) {
    row = at / end.chunksOfRow;
    within = at % end.chunksOfRow;
  }
  const long long index = narrow ? static_cast<long long>(__ldg(static_cast<const int*>(end.list) + row))
                                 : __ldg(static_cast<const long long*>(end.list) + row);
  return end.base + index * static_cast<long long>(end.rowBytes) + static_cast<std::size_t>(within) * chunkBytes;
}

template <typename Vector>
__device__ void copyStraight(const Piece& piece, unsigned unit, int lane) {
  const std::size_t all = piece.body / sizeof(Vector);
  const std::size_t begin = static_cast<std::size_t>(unit) * piece.unitVectors;
  const std::size_t left = all - begin;
  const unsigned count = left < piece.unitVectors ? static_cast<unsigned>(left) : piece.unitVectors;
  const auto* source = reinterpret_cast<const Vector*>(piece.source.base + piece.head) + begin;
  auto* destination = reinterpret_cast<Vector*>(piece.destination.base + piece.head) + begin;
  for (unsigned at = static_cast<unsigned>(lane); at < count; at += kWarp * kUnroll) {
    Vector values[kUnroll];
#pragma unroll
    for (unsigned i = 0; i < kUnroll; ++i) {
      if (at + i * kWarp < count) values[i] = __ldcs(source + at + i * kWarp);
    }
#pragma unroll
    for (unsigned i = 0; i < kUnroll; ++i) {
      if (at + i * kWarp < count) __stcs(destination + at + i * kWarp, values[i]);
    }
  }
  if (unit != 0) return;
  if (lane < piece.head) piece.destination.base[lane] = piece.source.base[lane];
  if (lane < piece.tail) {
    const std::size_t at = piece.head + piece.body + static_cast<unsigned>(lane);
    piece.destination.base[at] = piece.source.base[at];
  }
}

template <typename Vector>
__device__ void copyRows(const Piece& piece, unsigned unit, int lane) {
  const std::size_t chunkBytes = static_cast<std::size_t>(piece.chunkVectors) * sizeof(Vector);
  const bool narrowSource = (piece.narrow & 1) != 0, narrowDestination = (piece.narrow & 2) != 0;
  unsigned chunk, first, count;
  if (piece.unitsOfChunk > 1) {
    chunk = unit / piece.unitsOfChunk;
    first = unit % piece.unitsOfChunk * piece.unitVectors;
    count = min(piece.unitVectors, piece.chunkVectors - first);
  } else {
    chunk = unit * piece.chunksOfUnit;
    first = 0;
    count = min(piece.chunksOfUnit, piece.chunks - chunk) * piece.chunkVectors;
  }
  for (unsigned at = static_cast<unsigned>(lane); at < count; at += kWarp * kUnroll) {
    Vector values[kUnroll];
    std::byte* places[kUnroll];
#pragma unroll
    for (unsigned i = 0; i < kUnroll; ++i) {
      const unsigned n = first + at + i * kWarp;
      if (at + i * kWarp >= count) continue;
      const unsigned further = n / piece.chunkVectors;
      const std::size_t within = static_cast<std::size_t>(n % piece.chunkVectors) * sizeof(Vector);
      values[i] = __ldcs(reinterpret_cast<const Vector*>(
          chunkAt(piece.source, narrowSource, chunk + further, chunkBytes) + within));
      places[i] = chunkAt(piece.destination, narrowDestination, chunk + further, chunkBytes) + within;
    }
#pragma unroll
    for (unsigned i = 0; i < kUnroll; ++i) {
      if (at + i * kWarp < count) __stcs(reinterpret_cast<Vector*>(places[i]), values[i]);
    }
  }
}

template <typename Vector>
__device__ void copyUnit(const Piece& piece, unsigned unit, int lane) {
  if (piece.chunkVectors == 0) {
    copyStraight<Vector>(piece, unit, lane);
  } else {
    copyRows<Vector>(piece, unit, lane);
  }
}

__global__ void __launch_bounds__(kThreads) copyPieces(const __grid_constant__ Pieces args) {
  ptx::waitForPreviousLaunch();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // Each block has a part of the units to itself, so that all copies, and with them all links, are worked on at once.
  const auto begins = [&](unsigned block) {
    return static_cast<unsigned>(static_cast<unsigned long long>(args.units) * block / gridDim.x);
  };
  const unsigned end = begins(blockIdx.x + 1);
  int at = 0;
  for (unsigned unit = begins(blockIdx.x) + threadIdx.x / kWarp; unit < end; unit += kThreads / kWarp) {
    while (at + 1 < args.count && args.pieces[at + 1].firstUnit <= unit) ++at;
    const Piece& piece = args.pieces[at];
    const unsigned mine = unit - piece.firstUnit;
    switch (piece.width) {
      case 16:
        copyUnit<uint4>(piece, mine, lane);
        break;
      case 8:
        copyUnit<uint2>(piece, mine, lane);
        break;
      case 4:
        copyUnit<unsigned>(piece, mine, lane);
        break;
      case 2:
        copyUnit<unsigned short>(piece, mine, lane);
        break;
      default:
        copyUnit<unsigned char>(piece, mine, lane);
    }
  }
}

// The largest power of two, at most 16, that divides all that was or-ed.
unsigned widthOf(std::uint64_t bits) {
  unsigned width = 16;
  while (bits % width != 0) width /= 2;
  return width;
}

std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// Cut so that a unit has about `unitBytes`. Returns how many units it has; 0: more than can be counted.
std::uint64_t straight(const RowCopy& copy, std::size_t unitBytes, Piece& piece) {
  piece.source.base = copy.source.base + copy.source.start;
  piece.destination.base = copy.destination.base + copy.destination.start;
  const std::uint64_t to = address(piece.destination.base);
  const unsigned width = widthOf(to - address(piece.source.base));
  const std::size_t head = std::min<std::size_t>(copy.bytes, (width - to % width) % width);
  piece.width = static_cast<unsigned char>(width);
  piece.head = static_cast<unsigned char>(head);
  piece.body = (copy.bytes - head) / width * width;
  piece.tail = static_cast<unsigned char>(copy.bytes - head - piece.body);
  piece.unitVectors = static_cast<unsigned>(std::max<std::size_t>(unitBytes / width, kWarp));
  const std::size_t vectors = piece.body / width;
  return std::max<std::uint64_t>(1, (vectors + piece.unitVectors - 1) / piece.unitVectors);
}

std::uint64_t byRows(const RowCopy& copy, std::size_t unitBytes, Piece& piece) {
  std::size_t chunk = copy.bytes;
  std::uint64_t bits = 0;
  for (const RowEnd* end : {&copy.source, &copy.destination}) {
    if (end->list != nullptr) chunk = std::gcd(std::gcd(chunk, end->rowBytes), end->start);
    bits |= address(end->base) | (end->list != nullptr ? end->rowBytes : end->start);
  }
  const unsigned width = widthOf(bits | chunk);
  const auto fill = [&](const RowEnd& end, ListedEnd& out) {
    out.base = end.list != nullptr ? end.base : end.base + end.start;
    out.list = end.list;
    out.rowBytes = end.rowBytes;
    out.chunksOfRow = end.list != nullptr ? static_cast<unsigned>(end.rowBytes / chunk) : 1;
    out.startChunk = end.list != nullptr ? static_cast<unsigned>(end.start / chunk) : 0;
  };
  fill(copy.source, piece.source);
  fill(copy.destination, piece.destination);
  piece.width = static_cast<unsigned char>(width);
  piece.narrow = static_cast<unsigned char>((copy.source.narrow ? 1 : 0) | (copy.destination.narrow ? 2 : 0));
  const std::uint64_t most = std::uint64_t{1} << 31;
  if (chunk / width >= most || (copy.bytes + std::max(copy.source.start, copy.destination.start)) / chunk >= most)
    return 0;
  piece.body = copy.bytes;
  piece.chunkVectors = static_cast<unsigned>(chunk / width);
  piece.chunks = static_cast<unsigned>(copy.bytes / chunk);
  const auto wanted = static_cast<unsigned>(std::max<std::size_t>(unitBytes / width, kWarp));
  piece.unitsOfChunk = (piece.chunkVectors + wanted - 1) / wanted;
  piece.unitVectors = (piece.chunkVectors + piece.unitsOfChunk - 1) / piece.unitsOfChunk;
  piece.chunksOfUnit = std::max(1u, wanted / piece.chunkVectors);
  if (piece.unitsOfChunk > 1) return std::uint64_t{piece.chunks} * piece.unitsOfChunk;
  return (piece.chunks + piece.chunksOfUnit - 1) / piece.chunksOfUnit;
}

}  // namespace

int launchCopies(const RowCopy* copies, int count, const Budget& budget, void* stream) {
  if (count < 0 || count > kMaxCopies) return cudaErrorInvalidValue;
  const int sms = budget.blocks > 0 ? budget.blocks : deviceShape().sms;
  constexpr int kBlocksOfSm = 4;
  std::size_t total = 0;
  for (int i = 0; i < count; ++i) total += copies[i].bytes;
  // About two units for each warp of a full GPU; not so short that a unit's set-up shows.
  const std::size_t warps = static_cast<std::size_t>(sms) * kBlocksOfSm * (kThreads / kWarp);
  const std::size_t unitBytes = std::clamp<std::size_t>(total / warps / 2 / 2048 * 2048, 2048, 16384);
  Pieces args{};
  std::uint64_t units = 0;
  for (int i = 0; i < count; ++i) {
    const RowCopy& copy = copies[i];
    if (copy.bytes == 0) continue;
    Piece& piece = args.pieces[args.count];
    const bool listed = copy.source.list != nullptr || copy.destination.list != nullptr;
    const std::uint64_t own = listed ? byRows(copy, unitBytes, piece) : straight(copy, unitBytes, piece);
    if (own == 0) return cudaErrorInvalidValue;
    piece.firstUnit = static_cast<unsigned>(units);
    units += own;
    if (units >= std::uint64_t{1} << 31) return cudaErrorInvalidValue;
    ++args.count;
  }
  if (args.count == 0) return cudaSuccess;
  args.units = static_cast<unsigned>(units);
  const std::uint64_t blocks = std::min<std::uint64_t>((units + kThreads / kWarp - 1) / (kThreads / kWarp),
                                                       static_cast<std::uint64_t>(sms) * kBlocksOfSm);
  return launch(copyPieces, args, static_cast<int>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace fusco::kernels
