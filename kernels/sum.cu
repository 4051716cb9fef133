// Combine in a node: for each token its rows are read where they lie, added up in FP32 by rank, then slot, and written
// once.
#include <algorithm>

#include "kernels/across.cuh"
#include "kernels/grid.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/staged_sum.cuh"
#include "kernels/warp_sum.cuh"

namespace fusco::kernels {

namespace {

constexpr int kWarp = 32;
constexpr std::int64_t kMostRowPiece = std::int64_t{1} << 30;  // counted in 32 bits

bool waitsForOthers(const SumArgs& sum) { return sum.across && sum.arrivals[0] != nullptr; }

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

// A piece of a token's row, as a warp has it.
struct TokenPiece {
  int rank;  // among the local ones
  unsigned token, firstEntry, endEntry;
  unsigned offset, bytes;

  __device__ const std::byte* biasOf(const SumKernelArgs& args) const {
    const std::byte* bias = args.sum.ranks[rank].bias;
    return bias == nullptr ? nullptr : bias + token * args.rowBytes + offset;
  }
  __device__ std::byte* outOf(const SumKernelArgs& args) const {
    return args.sum.ranks[rank].out + token * args.rowBytes + offset;
  }
};

// What a piece of a token's sum is made of: the k-th term with lane k, and the words that say that sums of other GPUs
// are there, each with some lane or null.
struct PieceTerms {
  WarpTerm mine{nullptr, 0.0f};
  int count = 0;
  std::uint32_t* arrival = nullptr;
};

// A lane's entry of such a piece, of at most 32.
struct PieceEntry {
  plan::Entry entry{0xffff, 0, 0};
  float weight = 0.0f;

  __device__ void load(const SumKernelArgs& args, const TokenPiece& piece) {
    const unsigned at = piece.firstEntry + threadIdx.x % kWarp;
    if (at >= piece.endEntry) return;
    const PlanPointers& plan = args.sum.ranks[piece.rank].plan;
    entry = plan.entries[at];
    weight = args.sum.weighted ? plan.weights[at] : 1.0f;
  }
};

// Each lane has an entry; then lane p fetches the one that comes p-th.
__device__ PieceTerms termsOfPiece(const SumKernelArgs& args, const TokenPiece& piece, const PieceEntry& mine,
                                   const std::byte* const* bases) {
  const int lane = static_cast<int>(threadIdx.x % kWarp), many = static_cast<int>(piece.endEntry - piece.firstEntry);
  PieceTerms terms;
  if (many == 0) return terms;
  const plan::Entry entry = mine.entry;
  float weight = mine.weight;
  const std::byte* row = lane < many ? bases[entry.rank] + entry.row * args.rowBytes + piece.offset : nullptr;
  unsigned order = entry.rank;
  terms.count = many;
  if (args.sum.across) {
    // A sum stands for the rows of its rank, the others of them come last and are left out.
    const bool first = lane < many && (entry.slot & plan::kDuplicate) == 0;
    const unsigned ranks = __ballot_sync(0xffffffffu, first);
    const bool brought = lane < many && args.sum.brings[entry.rank];
    if (brought) {
      const unsigned at = piece.token * static_cast<unsigned>(args.sum.mostPartials) +
                          static_cast<unsigned>(__popc(ranks & ((1u << lane) - 1)));
      row = args.sum.partials[piece.rank] + std::size_t{at} * args.rowBytes + piece.offset;
      weight = 1.0f;
      if (!first) order = 0x10000;
    }
    if (args.sum.arrivals[piece.rank] != nullptr && brought && first) {
      const auto ordinal = static_cast<unsigned>(__popc(ranks & ((1u << lane) - 1)));
      terms.arrival =
          args.sum.arrivals[piece.rank] +
          (std::size_t{piece.token} * args.sum.mostPartials + ordinal) * static_cast<unsigned>(args.pieces) +
          piece.offset / args.pieceBytes;
    }
    terms.count -= __popc(__ballot_sync(0xffffffffu, brought && !first));
  }
  const int position = positionOf(order, lane, many);
  int from = lane;
  for (int j = 0; j < many; ++j) {
    if (__shfl_sync(0xffffffffu, position, j) == lane) from = j;
  }
  terms.mine = termOf({row, weight}, from);
  return terms;
}

template <typename Number, int kBytes, Warps kWarps>
__device__ void sumPiece(const SumKernelArgs& args, const TokenPiece& piece, const std::byte* const* bases) {
  const SumArgs::Rank& rank = args.sum.ranks[piece.rank];
  const unsigned many = piece.endEntry - piece.firstEntry;
  const std::byte* const bias = piece.biasOf(args);
  std::byte* const out = piece.outOf(args);
  if (many > kWarp)
    return sumMany<Number, kBytes>(args, rank.plan, piece.firstEntry, piece.endEntry, piece.offset, piece.bytes, bases,
                                   bias, out);
  PieceEntry entry;
  entry.load(args, piece);
  const PieceTerms terms = termsOfPiece(args, piece, entry, bases);
  if (__any_sync(0xffffffffu, terms.arrival != nullptr) && !waitForArrivals(terms.arrival, args.sum.wait)) return;
  sumOfWarp<Number, kBytes, kWarps>(terms.mine, terms.count, bias, piece.bytes, out);
}

struct RankUnits {
  unsigned first[kMaxLocalRanks + 1];
  unsigned copyBegin[kMaxLocalRanks], copyEnd[kMaxLocalRanks];
  unsigned tokens[kMaxLocalRanks];

  // By the first warp of a block; the caller synchronises.
  __device__ void fill(const SumKernelArgs& args) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane >= kWarp) return;
    unsigned units = 0;
    if (lane < args.sum.rankCount) {
      const PlanPointers& plan = args.sum.ranks[lane].plan;
      copyBegin[lane] = plan.flow->copyBegin;
      copyEnd[lane] = plan.flow->copyEnd;
      tokens[lane] = static_cast<unsigned>(plan.header->tokensUsed);
      // One more than the copies: it writes the tokens behind the last copy.
      units = (plan.flow->copyEnd - plan.flow->copyBegin + 1) * static_cast<unsigned>(args.pieces);
    }
    for (int d = 1; d < kWarp; d *= 2) {
      const unsigned other = __shfl_up_sync(0xffffffffu, units, d);
      if (lane >= d) units += other;
    }
    if (lane < args.sum.rankCount) first[lane + 1] = units;
    if (lane == 0) first[0] = 0;
  }
};

// A warp's pieces, one after the other. Copies of a flow lie by token. A unit is a copy; it also writes the tokens
// without a copy that come before it, and the last one those behind. Several copies of one token (a copy per entry) are
// summed by the first of them.
class PieceReader {
 public:
  __device__ PieceReader(const SumKernelArgs& args, const RankUnits& map, unsigned first, unsigned stride)
      : args_(args), map_(map), index_(first), stride_(stride) {}

  __device__ bool next(TokenPiece& piece) {
    for (;;) {
      if (bare_ < token_) {
        piece = {rank_, bare_++, 0, 0, offset_, bytes_};
        return true;
      }
      if (hasCopy_) {
        hasCopy_ = false;
        const plan::Copy* const copies = args_.sum.ranks[rank_].plan.copies;
        unsigned end = copy_ + 1;
        while (end < map_.copyEnd[rank_] && copies[end].token == token_) ++end;
        piece = {rank_, token_, copies[copy_].firstEntry, copies[end].firstEntry, offset_, bytes_};
        return true;
      }
      if (index_ >= map_.first[args_.sum.rankCount]) return false;
      take();
      index_ += stride_;
    }
  }

 private:
  __device__ void take() {
    rank_ = 0;
    while (index_ >= map_.first[rank_ + 1]) ++rank_;
    const unsigned within = index_ - map_.first[rank_];
    offset_ = within % static_cast<unsigned>(args_.pieces) * args_.pieceBytes;
    bytes_ = min(args_.pieceBytes, static_cast<unsigned>(args_.rowBytes) - offset_);
    copy_ = map_.copyBegin[rank_] + within / static_cast<unsigned>(args_.pieces);
    const plan::Copy* const copies = args_.sum.ranks[rank_].plan.copies;
    const bool isFirst = copy_ == map_.copyBegin[rank_];
    const bool isEnd = copy_ == map_.copyEnd[rank_];
    token_ = isEnd ? map_.tokens[rank_] : copies[copy_].token;
    const unsigned previous = isFirst ? 0xffffffffu : copies[copy_ - 1].token;
    const bool repeats = !isEnd && !isFirst && previous == token_;
    bare_ = repeats ? token_ : previous + 1;
    hasCopy_ = !isEnd && !repeats;
  }

  const SumKernelArgs& args_;
  const RankUnits& map_;
  unsigned index_;
  const unsigned stride_;
  int rank_ = 0;
  unsigned copy_ = 0, offset_ = 0, bytes_ = 0;
  unsigned bare_ = 0, token_ = 0;  // tokens without a copy before this one
  bool hasCopy_ = false;           // of the token, still to be summed
};

template <typename Number, int kBytes, Warps kWarps>
__global__ void __launch_bounds__(kSumThreads<kWarps>, kSumBlocks<kWarps>)
    sumRows(const __grid_constant__ SumKernelArgs args) {
  __shared__ RankUnits map;
  __shared__ const std::byte* bases[kMaxNodeRanks];
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kSumThreads<kWarps>) bases[i] = args.sum.bases[i];
  ptx::waitForPreviousLaunch();
  map.fill(args);
  __syncthreads();
  PieceReader reader(args, map, (threadIdx.x / kWarp) * gridDim.x + blockIdx.x,
                     gridDim.x * (kSumThreads<kWarps> / kWarp));
  for (TokenPiece piece; reader.next(piece);) sumPiece<Number, kBytes, kWarps>(args, piece, bases);
}

#if __CUDA_ARCH__ >= 900
// The same for StagedSum. The next piece's entries are under way, too.
class StagedPieces {
 public:
  __device__ StagedPieces(const SumKernelArgs& args, const std::byte* const* bases, PieceReader& reader)
      : args_(args), bases_(bases), reader_(reader) {
    readEntries();
  }

  __device__ Next next(StagedUnit& unit, bool wait) {
    if (!has_) {
      if (!coming_) return Next::none;
      piece_ = comingPiece_;
      terms_ = termsOfPiece(args_, piece_, entry_, bases_);
      has_ = true;
      readEntries();
    }
    if (__any_sync(0xffffffffu, terms_.arrival != nullptr)) {
      if (!takeArrivals(terms_.arrival)) {
        if (!wait) return Next::later;
        if (!waitForArrivals(terms_.arrival, args_.sum.wait)) return Next::none;
      }
      ptx::fenceProxyAsync();
    }
    has_ = false;
    unit = {terms_.mine, terms_.count, piece_.bytes, piece_.biasOf(args_), piece_.outOf(args_), nullptr};
    return Next::unit;
  }

 private:
  __device__ void readEntries() {
    coming_ = reader_.next(comingPiece_);
    entry_ = {};
    if (coming_) entry_.load(args_, comingPiece_);
  }

  const SumKernelArgs& args_;
  const std::byte* const* bases_;
  PieceReader& reader_;
  TokenPiece piece_, comingPiece_;
  PieceTerms terms_;
  PieceEntry entry_;
  bool has_ = false;     // a piece whose sums may not all have come
  bool coming_ = false;  // its entries are asked for
};
#endif

// Many bytes under way on each of few multiprocessors.
template <typename Number>
__global__ void __launch_bounds__(kStagedThreads, 1) sumStagedRows(const __grid_constant__ SumKernelArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ RankUnits map;
  __shared__ const std::byte* bases[kMaxNodeRanks];
  __shared__ std::uint64_t barriers[kStagedWarps][kStagedSlots];
  for (int i = static_cast<int>(threadIdx.x); i < kMaxNodeRanks; i += kStagedThreads) bases[i] = args.sum.bases[i];
  beginStaged(barriers);
  ptx::waitForPreviousLaunch();
  map.fill(args);
  __syncthreads();
  PieceReader reader(args, map, (threadIdx.x / kWarp) * gridDim.x + blockIdx.x, gridDim.x * kStagedWarps);
  StagedPieces pieces(args, bases, reader);
  sumStaged<Number>(buffers, barriers, stagedChunk(args.pieceBytes), pieces, nullptr);
#endif
}

// Cuts rows so that all warps have work, in steps of `step` bytes; the blocks that are wanted then, at most `most`.
int shapeLaunch(SumKernelArgs& args, std::int64_t most, std::int64_t warpsOfBlock, std::int64_t step) {
  const std::int64_t tokens = std::int64_t{args.sum.rankCount} * args.sum.maxTokens;
  const auto row = static_cast<std::int64_t>(args.rowBytes);
  if (waitsForOthers(args.sum)) {
    args.pieces = static_cast<int>(args.sum.pieces.count);
    args.pieceBytes = args.sum.pieces.bytes;
  } else {
    const std::int64_t wanted = (2 * most * warpsOfBlock + tokens - 1) / tokens;
    std::int64_t pieces = std::clamp<std::int64_t>(wanted, 1, (row + step - 1) / step);
    pieces = std::max<std::int64_t>(pieces, (row + kMostRowPiece - 1) / kMostRowPiece);
    const std::int64_t piece = ((row + pieces - 1) / pieces + step - 1) / step * step;
    args.pieces = static_cast<int>((row + piece - 1) / piece);
    args.pieceBytes = static_cast<unsigned>(piece);
  }
  const std::int64_t units = (tokens + args.sum.rankCount) * args.pieces;
  return static_cast<int>(std::clamp<std::int64_t>((units + warpsOfBlock - 1) / warpsOfBlock, 1, most));
}

template <typename Number, int kBytes, Warps kWarps>
cudaError_t launchWarps(SumKernelArgs args, const Budget& budget, cudaStream_t stream) {
  constexpr int kThreads = kSumThreads<kWarps>;
  // Who waits for other GPUs leaves them room to work.
  const std::int64_t most = budget.blocks > 0
                                ? std::int64_t{budget.blocks} * kSumBlocks<kWarps>
                                : std::int64_t{deviceShape().sms} * (waitsForOthers(args.sum) ? 1 : kSumBlocks<kWarps>);
  const int blocks = shapeLaunch(args, most, kThreads / kWarp, kWarp * kBytes);
  return launch(sumRows<Number, kBytes, kWarps>, args, blocks, kThreads, 0, stream);
}

template <typename Number>
cudaError_t launchStaged(SumKernelArgs args, int most, cudaStream_t stream) {
  const int blocks = shapeLaunch(args, most, kStagedWarps, kStagedStep);
  const std::size_t shared = aloneBytes(stagedBytes(stagedChunk(args.pieceBytes)));
  return launch(sumStagedRows<Number>, args, blocks, kStagedThreads, shared, stream);
}

std::size_t rowBytesOf(const SumArgs& sum) { return sum.elements * (sum.type == SumType::f32 ? 4 : 2); }

// Of all addresses and sizes.
std::uint64_t bitsOf(const SumArgs& sum) {
  std::uint64_t bits = rowBytesOf(sum);
  for (int i = 0; i < sum.rankCount; ++i)
    bits |= reinterpret_cast<std::uintptr_t>(sum.ranks[i].out) | reinterpret_cast<std::uintptr_t>(sum.ranks[i].bias);
  for (const std::byte* base : sum.bases) bits |= reinterpret_cast<std::uintptr_t>(base);
  return bits;
}

bool isStaged(const SumArgs& sum, std::uint64_t bits) {
  return bits % 16 == 0 && sum.topk <= kWarp && stages(rowBytesOf(sum));
}

template <typename Number>
cudaError_t launchType(const SumKernelArgs& args, std::uint64_t bits, const Budget& budget, cudaStream_t stream) {
  constexpr int kElement = static_cast<int>(sizeof(typename Number::Element));
  if (budget.blocks > 0 && isStaged(args.sum, bits)) return launchStaged<Number>(args, budget.blocks, stream);
  if (bits % 16 == 0 && budget.blocks > 0) return launchWarps<Number, 16, Warps::few>(args, budget, stream);
  if (bits % 16 == 0) return launchWarps<Number, 16, Warps::many>(args, budget, stream);
  if (bits % kElement == 0) return launchWarps<Number, kElement, Warps::many>(args, budget, stream);
  return launchWarps<Anywhere<Number>, kElement, Warps::many>(args, budget, stream);
}

}  // namespace

bool sumFillsMultiprocessors(const SumArgs& sum) { return isStaged(sum, bitsOf(sum)); }

int launchSum(const SumArgs& sum, const Budget& budget, void* stream) {
  if (sum.maxTokens == 0 || sum.rankCount == 0 || sum.elements == 0) return cudaSuccess;
  SumKernelArgs args{};
  args.sum = sum;
  args.rowBytes = rowBytesOf(sum);
  const std::uint64_t bits = bitsOf(sum);
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
