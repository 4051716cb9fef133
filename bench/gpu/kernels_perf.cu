// The kernels of dispatch and combine against what the GPU can do at most, on one GPU that stands for several ranks.
// Plans are made on the host.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/gpu/limit.h"
#include "kernels/launch.h"
#include "plan/plan.h"

using namespace fusco;

namespace {

#define CHECK(call) checkCuda(call, __LINE__)
void checkCuda(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::printf("line %d: %s\n", line, cudaGetErrorString(error));
  std::exit(1);
}

constexpr int kTopk = 8;
constexpr int kExperts = 256;
constexpr std::size_t kRowBytes = 14336;

template <typename T>
T* onDevice(const std::vector<T>& values) {
  T* pointer = nullptr;
  CHECK(cudaMalloc(&pointer, values.size() * sizeof(T) + 16));
  CHECK(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return pointer;
}

struct World {
  int ranks, tokens;
  std::vector<std::byte*> arenas, sources, outputs, homes;
  std::vector<std::vector<std::byte>> hostArenas;
  std::uint32_t* places = nullptr;  // of all ranks' tokens, in one destination of all rows
  std::byte* all = nullptr;         // all outputs in one piece
  std::byte* allSources = nullptr;
  std::byte* allHomes = nullptr;
  std::size_t rows = 0;
};


World makeWorld(int ranks, int tokens) {
  World w{ranks, tokens, {}, {}, {}, {}, {}};
  const plan::Topology topology(std::vector<int>(static_cast<std::size_t>(ranks), 0));
  plan::Options options;
  std::mt19937 random(7);
  std::vector<std::vector<std::int32_t>> ids(static_cast<std::size_t>(ranks));
  std::vector<plan::RoutingMap> maps;
  std::vector<plan::Analysis> counts;
  for (int r = 0; r < ranks; ++r) {
    for (int t = 0; t < tokens; ++t) {
      int chosen[kTopk];
      for (int k = 0; k < kTopk; ++k) {
        do chosen[k] = static_cast<int>(random() % kExperts);
        while (std::find(chosen, chosen + k, chosen[k]) != chosen + k);
        ids[static_cast<std::size_t>(r)].push_back(chosen[k]);
      }
    }
    plan::RoutingMap map;
    map.ids = ids[static_cast<std::size_t>(r)].data();
    map.idBytes = 4;
    map.tokens = tokens;
    map.topk = kTopk;
    map.experts = kExperts;
    maps.push_back(map);
    counts.push_back(plan::analyse(map, topology, r, options));
  }
  plan::Exchanged x;
  x.before.assign(kExperts, 0);
  x.total.assign(kExperts, 0);
  for (const auto& c : counts)
    for (int e = 0; e < kExperts; ++e) x.total[static_cast<std::size_t>(e)] += c.rowsOfKey[static_cast<std::size_t>(e)];
  std::vector<std::size_t> rowsOfRank;
  for (int r = 0; r < ranks; ++r) {
    const auto at = static_cast<std::size_t>(r);
    const std::uint64_t bytes = plan::arenaBytes(maps[at], topology, r, options);
    auto* arena = static_cast<std::byte*>(std::aligned_alloc(64, bytes));
    plan::makePlan(maps[at], topology, r, options, counts[at], x, arena);
    for (int e = 0; e < kExperts; ++e)
      x.before[static_cast<std::size_t>(e)] += counts[at].rowsOfKey[static_cast<std::size_t>(e)];
    w.hostArenas.emplace_back(arena, arena + bytes);
    w.arenas.push_back(onDevice(w.hostArenas.back()));
    rowsOfRank.push_back(static_cast<std::size_t>(plan::view(arena).header->receiveRows));
    w.rows += rowsOfRank.back();
    std::free(arena);
  }
  CHECK(cudaMalloc(&w.all, w.rows * kRowBytes));
  const std::size_t tokenBytes = static_cast<std::size_t>(ranks) * static_cast<std::size_t>(tokens) * kRowBytes;
  CHECK(cudaMalloc(&w.allSources, tokenBytes));
  CHECK(cudaMalloc(&w.allHomes, tokenBytes));
  std::size_t first = 0;
  std::vector<std::size_t> firstRow;
  for (int r = 0; r < ranks; ++r) {
    const auto at = static_cast<std::size_t>(r);
    firstRow.push_back(first);
    w.outputs.push_back(w.all + first * kRowBytes);
    first += rowsOfRank[at];
    w.sources.push_back(w.allSources + at * static_cast<std::size_t>(tokens) * kRowBytes);
    w.homes.push_back(w.allHomes + at * static_cast<std::size_t>(tokens) * kRowBytes);
  }
  std::vector<std::uint32_t> places;
  for (int r = 0; r < ranks; ++r) {
    const plan::View view = plan::view(w.hostArenas[static_cast<std::size_t>(r)].data());
    for (int i = 0; i < tokens * kTopk; ++i)
      places.push_back(static_cast<std::uint32_t>(firstRow[view.entries[i].rank] + view.entries[i].row));
  }
  w.places = onDevice(places);
  std::vector<std::uint16_t> rows(tokenBytes / 2);
  for (auto& x16 : rows) x16 = static_cast<std::uint16_t>(0x3c00 + random() % 1024);
  CHECK(cudaMemcpy(w.allSources, rows.data(), tokenBytes, cudaMemcpyHostToDevice));
  return w;
}

void freeWorld(World& w) {
  for (std::byte* arena : w.arenas) cudaFree(arena);
  cudaFree(w.all);
  cudaFree(w.allSources);
  cudaFree(w.allHomes);
  cudaFree(w.places);
}

kernels::PlanPointers pointersOf(const World& w, int r) {
  const auto at = static_cast<std::size_t>(r);
  const auto o = plan::arenaOffsets(*reinterpret_cast<const plan::ArenaHeader*>(w.hostArenas[at].data()));
  const std::byte* a = w.arenas[at];
  return {reinterpret_cast<const plan::ArenaHeader*>(a), reinterpret_cast<const plan::Flow*>(a + o.flows),
          reinterpret_cast<const plan::Copy*>(a + o.copies), reinterpret_cast<const plan::Entry*>(a + o.entries),
          reinterpret_cast<const float*>(a + o.weights)};
}

kernels::PlaceArgs placeArgs(const World& w) {
  kernels::PlaceArgs p{};
  p.rankCount = w.ranks;
  p.maxTokens = w.tokens;
  p.sourceStride = p.destinationStride = p.rowBytes = kRowBytes;
  for (int r = 0; r < w.ranks; ++r) {
    p.ranks[r] = {pointersOf(w, r), w.sources[static_cast<std::size_t>(r)]};
    p.bases[r] = w.outputs[static_cast<std::size_t>(r)];
  }
  return p;
}

kernels::SumArgs sumArgs(const World& w) {
  kernels::SumArgs s{};
  s.rankCount = w.ranks;
  s.maxTokens = w.tokens;
  s.topk = kTopk;
  s.elements = kRowBytes / 2;
  s.type = kernels::SumType::bf16;
  s.weighted = true;
  for (int r = 0; r < w.ranks; ++r) {
    s.ranks[r] = {pointersOf(w, r), w.homes[static_cast<std::size_t>(r)], nullptr};
    s.bases[r] = w.outputs[static_cast<std::size_t>(r)];
  }
  return s;
}

// Median over rounds of the time of `repeats` launches replayed as one graph, in us each.
double timeGraph(const std::function<cudaError_t(cudaStream_t)>& work, int repeats, int rounds) {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  CHECK(work(stream));
  CHECK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < repeats; ++i) CHECK(work(stream));
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < rounds + 2; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaStreamSynchronize(stream));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1000.0 / repeats;
}

bench::Replicate replicateOf(const World& w, int blocks) {
  return {w.allSources, w.all, w.places, w.ranks * w.tokens, kTopk, kRowBytes, blocks};
}

bool rowsAreRight(const World& w) {
  std::vector<std::uint32_t> places(static_cast<std::size_t>(w.ranks) * static_cast<std::size_t>(w.tokens) * kTopk);
  CHECK(cudaMemcpy(places.data(), w.places, places.size() * 4, cudaMemcpyDeviceToHost));
  std::vector<char> a(kRowBytes), b(kRowBytes);
  std::mt19937 random(3);
  for (int i = 0; i < 3000; ++i) {
    const std::size_t slot = i < 64 ? static_cast<std::size_t>(i) % places.size() : random() % places.size();
    CHECK(cudaMemcpy(a.data(), w.allSources + slot / kTopk * kRowBytes, kRowBytes, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(b.data(), w.all + places[slot] * kRowBytes, kRowBytes, cudaMemcpyDeviceToHost));
    if (std::memcmp(a.data(), b.data(), kRowBytes) != 0) return false;
  }
  return true;
}

void limits(const World& w) {
  const double read = static_cast<double>(w.ranks) * w.tokens * kRowBytes;
  const double written = read * kTopk;
  const auto row = [&](const char* name, int blocks, double us, double bytes) {
    std::printf("%-44s %4d blocks %9.1f us %7.3f TB/s\n", name, blocks, us, bytes / us / 1e6);
  };
  row("device copy (read + write)", 0, timeGraph([&](cudaStream_t s) {
        return cudaMemcpyAsync(w.all, w.all + static_cast<std::size_t>(written) / 2, static_cast<std::size_t>(written) / 2,
                               cudaMemcpyDeviceToDevice, s);
      }, 1, 7), written);
  row("memset", 0, timeGraph([&](cudaStream_t s) { return cudaMemsetAsync(w.all, 1, static_cast<std::size_t>(written), s); }, 1, 7),
      written);
  // Writes only: in order, and to random rows.
  std::vector<std::uint32_t> order(static_cast<std::size_t>(w.ranks) * static_cast<std::size_t>(w.tokens) * kTopk);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::uint32_t>(i);
  std::uint32_t* inOrder = onDevice(order);
  std::shuffle(order.begin(), order.end(), std::mt19937(5));
  std::uint32_t* anyOrder = onDevice(order);
  for (const int way : {2, 3, 6, 8}) {
    for (const auto& [name, places] : {std::pair{"in order", inOrder}, {"expert-major", w.places}, {"random", anyOrder}}) {
      bench::Replicate r = replicateOf(w, 132);
      r.source = nullptr;
      r.places = places;
      const double us = timeGraph([&](cudaStream_t s) { return bench::replicate(r, way, s); }, 1, 5);
      row((std::string("write only, ") + name + ", " + bench::replicateName(way)).c_str(), 132, us, written);
    }
  }
  for (int way = 0; way < bench::replicateWays(); ++way) {
    for (const int blocks : {132, 264, 528}) {
      if (way > 0 && blocks == 528) continue;
      if (way >= 4 && way <= 5 && blocks > 132) continue;
      const bench::Replicate r = replicateOf(w, way == 0 ? blocks * 2 : blocks);
      const double us = timeGraph([&](cudaStream_t s) { return bench::replicate(r, way, s); }, 1, 5);
      row(bench::replicateName(way), r.blocks, us, written);
    }
  }
  for (const int blocks : {264, 396, 528, 792}) {
    bench::Replicate r = replicateOf(w, blocks);
    r.source = w.allHomes;
    row("sum of rows, read where they lie (r + w)", blocks,
        timeGraph([&](cudaStream_t s) { return bench::gatherSum(r, s); }, 1, 5), read + written);
  }
  cudaFree(inOrder);
  cudaFree(anyOrder);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  for (const int tokens : {4096, 128, 1}) {
    World w = makeWorld(8, tokens);
    const double read = 8.0 * tokens * kRowBytes;
    std::printf("--- 8 ranks x %d tokens, top-%d of %d, rows of %zu bytes\n", tokens, kTopk, kExperts, kRowBytes);
    if (tokens == 4096 && !quick) limits(w);
    CHECK(cudaMemset(w.all, 0xcc, w.rows * kRowBytes));
    const kernels::PlaceArgs place = placeArgs(w);
    CHECK(static_cast<cudaError_t>(kernels::launchPlace(place, {}, nullptr)));
    CHECK(cudaDeviceSynchronize());
    std::printf("place: rows %s\n", rowsAreRight(w) ? "right" : "WRONG");
    const int repeats = tokens > 1000 ? 1 : 20;
    const int rounds = 9;
    double best = 1e9;
    for (const int way : {0, 1, 2, 7}) {
      const bench::Replicate r = replicateOf(w, way == 0 ? 528 : 132);
      const double us = timeGraph([&](cudaStream_t s) { return bench::replicate(r, way, s); }, repeats, rounds);
      std::printf("  limit: %-38s %9.2f us\n", bench::replicateName(way), us);
      best = std::min(best, us);
    }
    for (const int blocks : {0, 264, 132, 66, 32, 24, 16, 8, 4}) {
      if (tokens < 4096 && blocks > 0 && blocks < 132) continue;
      const double us = timeGraph(
          [&](cudaStream_t s) { return static_cast<cudaError_t>(kernels::launchPlace(place, {blocks}, s)); }, repeats, rounds);
      std::printf("  place, %3d blocks %9.2f us  %6.3f TB/s written  %5.1f %% of limit\n", blocks, us, read * kTopk / us / 1e6,
                  100 * best / us);
    }
    const kernels::SumArgs sum = sumArgs(w);
    for (const int blocks : {0, 132, 66, 24, 8}) {
      if (tokens < 4096 && blocks > 0) continue;
      const double us = timeGraph(
          [&](cudaStream_t s) { return static_cast<cudaError_t>(kernels::launchSum(sum, {blocks}, s)); }, repeats, rounds);
      std::printf("  sum,   %3d blocks %9.2f us  %6.3f TB/s read + written\n", blocks, us, read * (kTopk + 1) / us / 1e6);
    }
    freeWorld(w);
  }
  return 0;
}
