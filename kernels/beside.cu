// Gaps of the output, and what lies beside received rows.
#include <algorithm>

#include "kernels/beside.cuh"
#include "kernels/grid.h"
#include "kernels/ptx.cuh"

namespace fusco::kernels {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;

// A warp zeroes a row; bytes up to the first whole vector and behind the last one by one.
__device__ void zeroRow(std::byte* row, std::size_t bytes, unsigned lane) {
  const std::size_t head = std::min<std::size_t>((16 - reinterpret_cast<std::uintptr_t>(row) % 16) % 16, bytes);
  const std::size_t vectors = (bytes - head) / 16;
  const std::size_t tail = head + vectors * 16;
  for (std::size_t i = lane; i < head; i += kWarpThreads) row[i] = std::byte{0};
  for (std::size_t i = lane; i < vectors; i += kWarpThreads)
    reinterpret_cast<uint4*>(row + head)[i] = make_uint4(0, 0, 0, 0);
  for (std::size_t i = tail + lane; i < bytes; i += kWarpThreads) row[i] = std::byte{0};
}

// A gap is shared out to so many warps at most.
constexpr int kPartsOfGap = 32;

__global__ void __launch_bounds__(kThreads) zeroGaps(const __grid_constant__ GapsArgs args) {
  ptx::waitForPreviousLaunch();
  const unsigned lane = threadIdx.x % kWarpThreads;
  const int parts = args.mostRows < kPartsOfGap ? args.mostRows : kPartsOfGap;
  const int units = args.rankCount * args.mostExperts * parts;
  for (int unit = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / kWarpThreads); unit < units;
       unit += static_cast<int>(gridDim.x * kWarps)) {
    const GapsArgs::Rank& rank = args.ranks[unit / parts / args.mostExperts];
    const int expert = unit / parts % args.mostExperts;
    if (expert >= rank.experts) continue;
    const int end = rank.starts[expert + 1];
    for (std::int64_t row = rank.starts[expert] + rank.rows[expert] + unit % parts; row < end; row += parts) {
      for (int t = 0; t < 2; ++t) {
        if (args.rowBytes[t] > 0)
          zeroRow(rank.outputs[t] + static_cast<std::size_t>(row) * args.rowBytes[t], args.rowBytes[t], lane);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) resetBeside(const __grid_constant__ ResetArgs args) {
  ptx::waitForPreviousLaunch();
  const std::size_t self = blockIdx.x * kThreads + threadIdx.x;
  const std::size_t all = std::size_t{gridDim.x} * kThreads;
  for (int r = 0; r < args.rankCount; ++r) {
    const ResetArgs::Rank& rank = args.ranks[r];
    if (rank.board.counters != nullptr) {
      const auto experts = static_cast<std::size_t>(rank.board.localExperts);
      for (std::size_t e = self; e <= experts; e += all) {
        if (e < experts) rank.board.counters[e] = 0;
        startsOf(rank.board)[e] = rank.starts[e];
      }
    }
    if (rank.tickets != nullptr) {
      // As words: {-1, -1, -1, 0.0, kNoRow}.
      auto* words = reinterpret_cast<std::uint32_t*>(rank.tickets);
      for (std::size_t i = self; i < rank.rows * 5; i += all) words[i] = i % 5 == 3 ? 0u : 0xffffffffu;
    }
  }
}

__device__ std::int64_t idAt(const void* ids, std::size_t index, int idBytes) {
  return idBytes == 8 ? static_cast<const std::int64_t*>(ids)[index] : static_cast<const std::int32_t*>(ids)[index];
}

// The first row of the token on the entry's rank. Copies of one token lie side by side: the token's first one begins
// it.
__device__ std::uint32_t primaryOf(const PlanPointers& plan, unsigned copy, unsigned entry) {
  const std::uint32_t token = plan.copies[copy].token;
  while (copy > plan.flow->copyBegin && plan.copies[copy - 1].token == token) --copy;
  const std::uint16_t rank = plan.entries[entry].rank;
  for (unsigned e = plan.copies[copy].firstEntry; e < entry; ++e) {
    if (plan.entries[e].rank == rank) return plan.entries[e].row;
  }
  return plan.entries[entry].row;
}

// A warp takes a copy, a lane an entry.
__global__ void __launch_bounds__(kThreads) describeRows(const __grid_constant__ DescribeArgs args) {
  __shared__ CopyMap map;
  ptx::waitForPreviousLaunch();
  map.fill(args.ranks, args.rankCount);
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarpThreads;
  for (unsigned index = blockIdx.x * kWarps + threadIdx.x / kWarpThreads; index < map.first[args.rankCount];
       index += gridDim.x * kWarps) {
    const int r = map.rankOf(index);
    const DescribeArgs::Rank& rank = args.ranks[r];
    const unsigned c = map.copyOf(r, index);
    const plan::Copy copy = rank.plan.copies[c];
    const unsigned end = rank.plan.copies[c + 1].firstEntry;
    for (unsigned e = copy.firstEntry + lane; e < end; e += kWarpThreads) {
      const plan::Entry entry = rank.plan.entries[e];
      const BesideRows& rows = args.rows[entry.rank];
      if (rows.tickets != nullptr) {
        rows.tickets[entry.row] = {rank.plan.header->rank, static_cast<std::int32_t>(copy.token),
                                   entry.slot & plan::kSlotMask, rank.plan.weights[e], primaryOf(rank.plan, c, e)};
      }
      if (rows.board.counters != nullptr) countRow(rows.board, entry.row, args.oneGpu);
    }
    if (rank.ids == nullptr) continue;
    // Rank order: all of the token's slots beside each of its rows.
    for (unsigned e = copy.firstEntry; e < end; ++e) {
      const plan::Entry entry = rank.plan.entries[e];
      const BesideRows& rows = args.rows[entry.rank];
      if (rows.localIds == nullptr) continue;
      for (int k = static_cast<int>(lane); k < args.topk; k += kWarpThreads) {
        const std::size_t from = static_cast<std::size_t>(copy.token) * args.topk + k;
        const std::size_t to = static_cast<std::size_t>(entry.row) * args.topk + k;
        const std::int64_t local = idAt(rank.ids, from, rank.idBytes) - rows.board.firstExpert;
        const bool here = local >= 0 && local < rows.board.localExperts;
        rows.localIds[to] = here ? static_cast<std::int32_t>(local) : -1;
        rows.weights[to] = !here ? 0.0f : rank.weights == nullptr ? 1.0f : rank.weights[from];
      }
    }
  }
}

}  // namespace

int launchGaps(const GapsArgs& args, const Budget& budget, void* stream) {
  if (args.rankCount == 0 || args.mostExperts == 0 || args.mostRows == 0) return cudaSuccess;
  const std::int64_t units = std::int64_t{args.rankCount} * args.mostExperts * std::min(args.mostRows, kPartsOfGap);
  const std::int64_t most = blocksFor(budget, deviceShape().sms, 8);
  const int blocks = static_cast<int>(std::clamp<std::int64_t>((units + kWarps - 1) / kWarps, 1, most));
  return launch(zeroGaps, args, blocks, kThreads, 0, static_cast<cudaStream_t>(stream));
}

int launchReset(const ResetArgs& args, const Budget& budget, void* stream) {
  std::size_t most = 0;
  for (int i = 0; i < args.rankCount; ++i) {
    const ResetArgs::Rank& rank = args.ranks[i];
    const auto experts = static_cast<std::size_t>(rank.board.localExperts);
    if (rank.board.counters != nullptr) most = std::max(most, experts + 1);
    if (rank.tickets != nullptr) most = std::max(most, rank.rows * 5);
  }
  if (most == 0) return cudaSuccess;
  const auto blocks = std::clamp<std::size_t>((most + kThreads - 1) / kThreads, 1,
                                              static_cast<std::size_t>(blocksFor(budget, deviceShape().sms, 2)));
  return launch(resetBeside, args, static_cast<int>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream));
}

int launchDescribe(const DescribeArgs& args, const Budget& budget, void* stream) {
  if (args.rankCount == 0 || args.maxTokens == 0) return cudaSuccess;
  const std::int64_t copies = std::int64_t{args.rankCount} * args.maxTokens;
  const std::int64_t most = blocksFor(budget, deviceShape().sms, 8);
  const int blocks = static_cast<int>(std::clamp<std::int64_t>((copies + kWarps - 1) / kWarps, 1, most));
  return launch(describeRows, args, blocks, kThreads, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace fusco::kernels
