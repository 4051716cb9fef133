#include <algorithm>
#include <cstring>

#include "moe_nccl/device.h"
#include "moe_nccl/expert_host.h"
#include "moe_nccl/layer.h"
#include "shuffle/routing.h"
#include "shuffle/stream.h"

namespace fusco::bench::moe {

namespace {

// With the loops of shuffle_perf's limit: the unchanged layer's own passes are as fast as this machine's memory.
class HostDevice : public Device {
 public:
  explicit HostDevice(const Shape& shape) : shape_(shape), experts_(shape) {}

  cudaStream_t stream() override { return nullptr; }
  void* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    OK(ncclMemAlloc(&memory, bytes));
    return memory;
  }
  void release(void* memory) override { ncclMemFree(memory); }
  void wait() override {}
  void toDevice(void* to, const void* fromHost, std::size_t bytes) override { std::memcpy(to, fromHost, bytes); }
  void toHost(void* toHost, const void* from, std::size_t bytes) override { std::memcpy(toHost, from, bytes); }

  void sortSlots(const std::int64_t* ids, const SortedSlots& sorted) override {
    std::fill_n(sorted.counts, shape_.experts, 0);
    for (std::int64_t slot = 0; slot < shape_.slots(); ++slot) {
      if (ids[slot] >= 0) ++sorted.counts[ids[slot]];
    }
    std::vector<std::int64_t> next(static_cast<std::size_t>(shape_.experts));
    for (int e = 1; e < shape_.experts; ++e) {
      const auto i = static_cast<std::size_t>(e);
      next[i] = next[i - 1] + sorted.counts[e - 1];
    }
    std::vector<std::pair<int, std::int64_t>> byRank;
    for (std::int64_t token = 0; token < shape_.tokens; ++token) {
      byRank.clear();
      const std::int64_t first = token * shape_.topk;
      for (std::int64_t slot = first; slot < first + shape_.topk; ++slot) {
        if (ids[slot] < 0) continue;
        const std::int64_t place = next[static_cast<std::size_t>(ids[slot])]++;
        sorted.order[place] = slot;
        sorted.tokenOf[place] = token;
        sorted.sumPlaces[slot] = place;
        byRank.emplace_back(rankOfExpert(static_cast<int>(ids[slot]), shape_.ranks, shape_.experts), slot);
      }
      std::sort(byRank.begin(), byRank.end());
      std::int64_t places[kMostSlots];
      for (std::size_t k = 0; k < byRank.size(); ++k) places[k] = sorted.sumPlaces[byRank[k].second];
      for (std::size_t k = 0; k < static_cast<std::size_t>(shape_.topk); ++k) {
        const auto at = first + static_cast<std::int64_t>(k);
        sorted.sumPlaces[at] = k < byRank.size() ? places[k] : -1;
        sorted.sumSlots[at] = k < byRank.size() ? byRank[k].second : -1;
      }
    }
  }

  void gatherRows(void* to, const void* from, const std::int64_t* index, std::int64_t rows) override {
    const std::size_t bytes = shape_.rowBytes();
    const auto rowAt = [&](std::int64_t i) {
      return static_cast<const std::byte*>(from) + static_cast<std::size_t>(index[i]) * bytes;
    };
    for (std::int64_t i = 0; i < rows; ++i) {
      std::byte* place = static_cast<std::byte*>(to) + static_cast<std::size_t>(i) * bytes;
      copyRow(rowAt(i), rowAt(std::min(i + 1, rows - 1)), &place, 1, bytes, Stores::nonTemporal);
    }
    storeFence();
  }

  void moveChunks(void* to, const void* from, const std::vector<Chunk>& chunksHost) override {
    const std::size_t bytes = shape_.rowBytes();
    for (const Chunk& chunk : chunksHost) {
      if (chunk.rows == 0) continue;
      std::byte* place = static_cast<std::byte*>(to) + static_cast<std::size_t>(chunk.to) * bytes;
      const std::byte* const rows = static_cast<const std::byte*>(from) + static_cast<std::size_t>(chunk.from) * bytes;
      copyRow(rows, rows, &place, 1, static_cast<std::size_t>(chunk.rows) * bytes, Stores::nonTemporal);
    }
    storeFence();
  }

  void weightedSum(void* y, const void* rows, const std::int64_t* places, const std::int64_t* slots,
                   const float* weights) override {
    const std::size_t bytes = shape_.rowBytes();
    const auto* const base = static_cast<const std::byte*>(rows);
    const std::byte* sources[2][kMostSlots];
    float factors[2][kMostSlots];
    int counts[2] = {};
    const auto look = [&](std::int64_t token, int which) {
      counts[which] = 0;
      for (std::int64_t at = token * shape_.topk; at < (token + 1) * shape_.topk && slots[at] >= 0; ++at) {
        sources[which][counts[which]] = base + static_cast<std::size_t>(places[at]) * bytes;
        factors[which][counts[which]++] = weights[slots[at]];
      }
    };
    look(0, 0);
    for (std::int64_t token = 0; token < shape_.tokens; ++token) {
      const int now = static_cast<int>(token % 2), then = 1 - now;
      if (token + 1 < shape_.tokens) look(token + 1, then);
      sumRows(sources[now], factors[now], counts[now], sources[then], token + 1 < shape_.tokens ? counts[then] : 0,
              static_cast<std::byte*>(y) + static_cast<std::size_t>(token) * bytes,
              static_cast<std::size_t>(shape_.hidden), Type::bf16, Stores::nonTemporal);
    }
    storeFence();
  }

  void experts(const void* rows, void* results, const std::int64_t* startsHost) override {
    experts_.run(static_cast<const std::uint16_t*>(rows), static_cast<std::uint16_t*>(results), startsHost);
  }

 private:
  static constexpr int kMostSlots = 64;
  const Shape shape_;
  HostExperts experts_;
};

}  // namespace

std::unique_ptr<Device> makeHostDevice(const Shape& shape) { return std::make_unique<HostDevice>(shape); }

}  // namespace fusco::bench::moe
