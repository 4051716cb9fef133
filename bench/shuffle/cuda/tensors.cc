#include "shuffle/cuda/tensors.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace fusco::bench::gpu {

namespace {

constexpr std::size_t kScaleElements = 128;
constexpr std::uint64_t kScaleSeed = 0x5ca1e5;

std::size_t scaleBytesOf(const Options& o) {
  return o.scales ? (static_cast<std::size_t>(o.hidden) + kScaleElements - 1) / kScaleElements * sizeof(float) : 0;
}

std::vector<std::int64_t> mostRows(const std::vector<const ShuffleMap*>& maps, bool capacity) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(maps[0]->ranks), 0);
  for (const ShuffleMap* map : maps)
    for (int r = 0; r < map->ranks; ++r)
      rows[static_cast<std::size_t>(r)] = std::max(rows[static_cast<std::size_t>(r)], map->rowsOf(r));
  if (capacity)
    std::fill(rows.begin(), rows.end(), std::max<std::int64_t>(1, *std::max_element(rows.begin(), rows.end())));
  return rows;
}

std::vector<std::int64_t> tokensOf(const ShuffleMap& map) {
  std::vector<std::int64_t> tokens;
  for (const Routing& routing : map.routing) tokens.push_back(routing.tokens);
  return tokens;
}

}  // namespace

std::size_t Tensors::bytesNeeded(const Options& options, const std::vector<const ShuffleMap*>& maps, int gpus,
                                 bool capacity) {
  const std::size_t rowBytes = static_cast<std::size_t>(options.hidden) * bytesOf(options.type);
  std::vector<std::int64_t> tokens, rows;
  placesOf(tokensOf(*maps[0]), rowBytes, gpus, tokens);
  placesOf(mostRows(maps, capacity), rowBytes, gpus, rows);
  std::size_t most = 0;
  for (std::size_t gpu = 0; gpu < tokens.size(); ++gpu)
    most = std::max(most, static_cast<std::size_t>(tokens[gpu] + rows[gpu]) * (rowBytes + scaleBytesOf(options) + 64));
  return most;
}

bool sumsCrossGpus(int gpus) {
  const char* apart = std::getenv("FUSCO_GPU_APART");
  return gpus > 1 || (apart != nullptr && std::string_view(apart) == "1");
}

Tensors::Tensors(World& world, const Options& options, Op op, const std::vector<const ShuffleMap*>& maps, bool capacity)
    : world_(world),
      sumsCross_(sumsCrossGpus(world.gpus())),
      options_(options),
      op_(op),
      rowBytes_(static_cast<std::size_t>(options.hidden) * bytesOf(options.type)),
      scaleBytes_(op == Op::dispatch ? scaleBytesOf(options) : 0) {
  const std::vector<std::int64_t> rows = mostRows(maps, capacity);
  if (capacity) capacity_ = rows[0];
  tokenPlaces_ = placesOf(tokensOf(*maps[0]), rowBytes_, world.gpus(), tokenRows_);
  expertPlaces_ = placesOf(rows, rowBytes_, world.gpus(), expertRows_);
  for (int gpu = 0; gpu < world.gpus(); ++gpu) {
    tokens_.emplace_back(gpu, static_cast<std::size_t>(tokenRowsOfGpu(gpu)) * rowBytes_);
    experts_.emplace_back(gpu, static_cast<std::size_t>(expertRowsOfGpu(gpu)) * rowBytes_);
  }
  for (int r = 0; r < world.ranks(); ++r) {
    const int gpu = world.gpuOf(r);
    const auto slots = static_cast<std::size_t>(tokenPlace(r).rows) * static_cast<std::size_t>(maps[0]->topk);
    ids_.emplace_back(gpu, std::vector<std::int32_t>(slots));
    rows_.emplace_back(gpu, std::vector<std::int32_t>(slots));
    weights_.emplace_back(gpu, std::vector<float>(slots));
    keys_.emplace_back(gpu, std::vector<std::uint64_t>(std::max(
                                slots, static_cast<std::size_t>(std::max(tokenPlace(r).rows, expertPlace(r).rows)))));
    wrong_.emplace_back(gpu, sizeof(unsigned long long));
    tokenScales_.emplace_back(gpu, static_cast<std::size_t>(tokenPlace(r).rows) * scaleBytes_);
    expertScales_.emplace_back(gpu, static_cast<std::size_t>(expertPlace(r).rows) * scaleBytes_);
  }
  use(*maps[0]);
}

std::byte* Tensors::tokens(int rank) const {
  return tokensOfGpu(world_.gpuOf(rank)) + static_cast<std::size_t>(tokenPlace(rank).first) * rowBytes_;
}
std::byte* Tensors::experts(int rank) const {
  return expertsOfGpu(world_.gpuOf(rank)) + static_cast<std::size_t>(expertPlace(rank).first) * rowBytes_;
}
std::byte* Tensors::tokenScales(int rank) const { return tokenScales_[static_cast<std::size_t>(rank)].at(); }
std::byte* Tensors::expertScales(int rank) const { return expertScales_[static_cast<std::size_t>(rank)].at(); }

void Tensors::use(const ShuffleMap& map) {
  map_ = &map;
  for (std::size_t r = 0; r < map.routing.size(); ++r) {
    const OnGpu on(world_.gpuOf(static_cast<int>(r)));
    ids_[r].assign(map.routing[r].ids);
    weights_[r].assign(map.routing[r].weights);
    rows_[r].assign(map.row[r]);
  }
}

std::vector<std::uint64_t> Tensors::keysOfTokens(int rank, std::uint64_t seed) const {
  std::vector<std::uint64_t> keys;
  for (std::int64_t t = 0; t < tokenPlace(rank).rows; ++t) keys.push_back(tokenKey(seed, rank, t));
  return keys;
}

std::vector<std::uint64_t> Tensors::keysOfReceived(int rank, std::uint64_t seed) const {
  std::vector<std::uint64_t> keys;
  for (const Slot& s : map_->received[static_cast<std::size_t>(rank)])
    keys.push_back(op_ == Op::dispatch ? tokenKey(seed, s.source, s.token) : slotKey(seed, s.source, s.token, s.slot));
  return keys;
}

std::vector<std::uint64_t> Tensors::keysOfSlots(int rank, std::uint64_t seed) const {
  std::vector<std::uint64_t> keys;
  for (std::int64_t t = 0; t < tokenPlace(rank).rows; ++t)
    for (int k = 0; k < map_->topk; ++k) keys.push_back(slotKey(seed, rank, t, k));
  return keys;
}

void Tensors::fillRank(int rank, std::uint64_t seed) {
  const auto r = static_cast<std::size_t>(rank);
  const OnGpu on(world_.gpuOf(rank));
  const cudaStream_t stream = world_.ofRank(rank).get();
  const auto fill = [&](const std::vector<std::uint64_t>& keys, std::byte* at, std::size_t rowBytes, Type type) {
    keys_[r].assign(keys);
    FUSCO_BENCH_CUDA(
        fillRows({at, keys_[r].at(), static_cast<std::int64_t>(keys.size()), rowBytes, patternOf(type)}, stream));
    FUSCO_BENCH_CUDA(cudaStreamSynchronize(stream));
  };
  const auto spoilAll = [&](std::byte* at, std::int64_t rows, std::size_t rowBytes) {
    if (rows > 0) FUSCO_BENCH_CUDA(cudaMemsetAsync(at, kPoison, static_cast<std::size_t>(rows) * rowBytes, stream));
  };
  if (op_ == Op::dispatch) {
    fill(keysOfTokens(rank, seed), tokens(rank), rowBytes_, options_.type);
    spoilAll(experts(rank), expertPlace(rank).rows, rowBytes_);
    if (scaleBytes_ > 0) {
      fill(keysOfTokens(rank, seed ^ kScaleSeed), tokenScales(rank), scaleBytes_, Type::f32);
      spoilAll(expertScales(rank), expertPlace(rank).rows, scaleBytes_);
    }
  } else {
    fill(keysOfReceived(rank, seed), experts(rank), rowBytes_, options_.type);
    spoilAll(tokens(rank), tokenPlace(rank).rows, rowBytes_);
  }
  FUSCO_BENCH_CUDA(cudaStreamSynchronize(stream));
}

void Tensors::refill(std::uint64_t seed) {
  for (int r = 0; r < world_.ranks(); ++r) fillRank(r, seed);
}

void Tensors::checkRank(int rank, std::uint64_t seed, bool scales) {
  const auto r = static_cast<std::size_t>(rank);
  const OnGpu on(world_.gpuOf(rank));
  const cudaStream_t stream = world_.ofRank(rank).get();
  auto* wrong = reinterpret_cast<unsigned long long*>(wrong_[r].at());
  const auto compare = [&](const std::vector<std::uint64_t>& keys, std::byte* at, std::size_t rowBytes, Type type) {
    const auto rows = static_cast<std::int64_t>(keys.size());
    keys_[r].assign(keys);
    FUSCO_BENCH_CUDA(
        countWrongRows({at, keys_[r].at(), rows, rowBytes, patternOf(type)}, bytesOf(type), wrong, stream));
    // Nothing belongs behind the last row.
    FUSCO_BENCH_CUDA(countOtherBytes(at + static_cast<std::size_t>(rows) * rowBytes,
                                     static_cast<std::size_t>(expertPlace(rank).rows - rows) * rowBytes, kPoison, wrong,
                                     stream));
    FUSCO_BENCH_CUDA(cudaStreamSynchronize(stream));
  };
  FUSCO_BENCH_CUDA(cudaMemsetAsync(wrong, 0, sizeof *wrong, stream));
  if (op_ == Op::dispatch) {
    compare(keysOfReceived(rank, seed), experts(rank), rowBytes_, options_.type);
    if (scales && scaleBytes_ > 0)
      compare(keysOfReceived(rank, seed ^ kScaleSeed), expertScales(rank), scaleBytes_, Type::f32);
    return;
  }
  keys_[r].assign(keysOfSlots(rank, seed));
  SumCheck check{};
  check.out = tokens(rank);
  check.keys = keys_[r].at();
  check.routed = rows_[r].at();
  check.weights = weights(rank);
  check.tokens = tokenPlace(rank).rows;
  check.topk = map_->topk;
  check.hidden = options_.hidden;
  check.type = options_.type;
  check.pattern = patternOf(options_.type);
  check.relative = (sumsCross_ ? 2 : 1) * roundingUnit(options_.type) + map_->topk * 0x1p-24;
  FUSCO_BENCH_CUDA(countWrongSums(check, wrong, stream));
  FUSCO_BENCH_CUDA(cudaStreamSynchronize(stream));
}

std::uint64_t Tensors::wrong(std::uint64_t seed, bool scales) {
  std::uint64_t all = 0;
  for (int r = 0; r < world_.ranks(); ++r) {
    checkRank(r, seed, scales);
    unsigned long long wrong = 0;
    FUSCO_BENCH_CUDA(
        cudaMemcpy(&wrong, wrong_[static_cast<std::size_t>(r)].at(), sizeof wrong, cudaMemcpyDeviceToHost));
    all += wrong;
  }
  return all;
}

void Tensors::spoil() {
  for (int r = 0; r < world_.ranks(); ++r) {
    const std::int64_t rows = op_ == Op::dispatch ? map_->rowsOf(r) : tokenPlace(r).rows;
    if (rows == 0) continue;
    // The last byte of an element is its most significant one: no tolerance hides it.
    std::byte* at = (op_ == Op::dispatch ? experts(r) : tokens(r)) + static_cast<std::size_t>(rows / 2) * rowBytes_ +
                    bytesOf(options_.type) - 1;
    unsigned char byte = 0;
    FUSCO_BENCH_CUDA(cudaMemcpy(&byte, at, 1, cudaMemcpyDeviceToHost));
    byte ^= 0x40;
    FUSCO_BENCH_CUDA(cudaMemcpy(at, &byte, 1, cudaMemcpyHostToDevice));
  }
}

}  // namespace fusco::bench::gpu
