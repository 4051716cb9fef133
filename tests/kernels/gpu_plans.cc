#include "kernels/gpu_plans.h"

#include <algorithm>

#include "plan/frame.h"

namespace fusco::kernels::testing {

using plan::testing::Arena;
using plan::testing::World;

namespace {

int pick(std::mt19937& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

template <typename T>
GpuMemory upload(const std::vector<T>& values) {
  return GpuMemory(values.data(), values.size() * sizeof(T));
}

}  // namespace

GpuPlans::GpuPlans(const World& world, std::int64_t capacity, int blocks) {
  const plan::Topology& topology = world.topology;
  const int room = std::max(world.experts, topology.ranks()) + 3;
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    plan::RoutingMap shape = world.map(rank);
    if (capacity >= 0) shape.tokens = capacity;
    const plan::Frame frame = plan::makeFrame(shape, topology, rank, world.options);
    const std::size_t slots = static_cast<std::size_t>(shape.tokens) * world.topk;
    ranks_.push_back({GpuMemory(slots * world.idBytes), GpuMemory(slots * sizeof(float)),
                      GpuMemory(sizeof(std::int64_t)), GpuMemory(frame.header.bytes),
                      GpuMemory(&frame.header, sizeof frame.header), upload(frame.homes), upload(frame.flows),
                      GpuMemory(planCountsBytes(room), 0),
                      GpuMemory(planScratchBytes(world.experts, topology.ranks(), topology.nodes())),
                      GpuMemory(sizeof(PlanStatus)), GpuMemory(2 * sizeof(std::int32_t) * room), shape.tokens});
  }
  std::vector<const void*> counts;
  for (const Rank& rank : ranks_) counts.push_back(rank.counts.get());
  tables_.push_back(upload(counts));

  for (int first = 0; first < topology.ranks(); ++first) {
    PlanArgs args{};
    args.idBytes = world.idBytes;
    args.topk = world.topk;
    args.experts = world.experts;
    args.ranks = topology.ranks();
    args.nodes = topology.nodes();
    args.layout = world.options.layout;
    args.dedup = world.options.dedup;
    args.alignment = world.options.alignment;
    args.maxTokens = world.options.maxTokens;
    args.capacityRows = world.options.capacityRows;
    args.countsRoom = room;
    args.allCounts = static_cast<const PlanCounts* const*>(tables_[0].get());
    args.blocks = blocks;
    for (int rank = first; rank < std::min(first + kMaxPlanRanks, topology.ranks()); ++rank) {
      const Rank& memory = ranks_[rank];
      PlanArgs::Rank& of = args.rank[args.rankCount++];
      of.ids = memory.ids.get();
      of.weights = world.weighted ? static_cast<const float*>(memory.weights.get()) : nullptr;
      of.tokens = memory.capacity;
      of.tokensUsed = capacity >= 0 ? static_cast<const std::int64_t*>(memory.tokens.get()) : nullptr;
      of.arena = memory.arena.get();
      of.frame = static_cast<const plan::ArenaHeader*>(memory.frame.get());
      of.homes = static_cast<const std::uint32_t*>(memory.homes.get());
      of.flows = static_cast<const plan::Flow*>(memory.flows.get());
      of.rank = rank;
      of.node = topology.nodeOf(rank);
      of.localExperts = topology.expertsOf(rank, world.experts);
      of.flowCount = topology.flowCount(rank);
      of.counts = static_cast<PlanCounts*>(memory.counts.get());
      of.scratch = memory.scratch.get();
      of.status = static_cast<PlanStatus*>(memory.status.get());
    }
    launches_.push_back(args);
  }
}

void GpuPlans::bring(const World& world) {
  const std::vector<plan::Exchanged> exchanged = exchange(world);
  for (int rank = 0; rank < static_cast<int>(ranks_.size()); ++rank) {
    const plan::RoutingMap map = world.map(rank);
    const std::size_t slots = static_cast<std::size_t>(map.tokens) * map.topk;
    Rank& memory = ranks_[rank];
    memory.ids.put(map.ids, slots * map.idBytes);
    if (map.weights != nullptr) memory.weights.put(map.weights, slots * sizeof(float));
    memory.tokens.put(&map.tokens, sizeof map.tokens);
    std::vector<std::int32_t> sums = exchanged[rank].before;
    sums.insert(sums.end(), exchanged[rank].total.begin(), exchanged[rank].total.end());
    memory.exchanged.put(sums.data(), sums.size() * sizeof(std::int32_t));
    check(cudaMemset(memory.arena.get(), 0xab, memory.arena.bytes()), "cudaMemset");
    check(cudaMemset(memory.scratch.get(), 0xab, memory.scratch.bytes()), "cudaMemset");
  }
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void GpuPlans::plan(Way way, cudaStream_t stream) {
  const int ranks = static_cast<int>(ranks_.size());
  if (way == Way::whole && ranks <= kMaxPlanRanks) {
    check(launchPlan(launches_[0], stream), "launchPlan");
    return;
  }
  std::vector<PlanArgs> launches;
  for (int first = 0; first < ranks;) {
    launches.push_back(launches_[first]);
    PlanArgs& args = launches.back();
    if (way == Way::apart) args.rankCount = 1;
    if (way == Way::brought) {
      args.allCounts = nullptr;
      const int keys = args.layout == plan::Layout::rankOrder ? args.ranks : args.experts;
      for (int i = 0; i < args.rankCount; ++i) {
        args.rank[i].before = static_cast<const std::int32_t*>(ranks_[first + i].exchanged.get());
        args.rank[i].total = args.rank[i].before + keys;
      }
    }
    first += args.rankCount;
  }
  for (const PlanArgs& args : launches) check(launchPlanCount(args, stream), "launchPlanCount");
  if (way == Way::laidApart) {
    std::vector<PlanArgs> alone;
    for (const PlanArgs& args : launches) {
      for (int i = 0; i < args.rankCount; ++i) {
        alone.push_back(args);
        alone.back().rank[0] = args.rank[i];
        alone.back().rankCount = 1;
        alone.back().blocks = planBlocksOfRank(args);
      }
    }
    launches = std::move(alone);
  }
  for (const PlanArgs& args : launches) check(launchPlanLay(args, stream), "launchPlanLay");
}

PlanStatus GpuPlans::status(int rank) const {
  PlanStatus status;
  std::memcpy(&status, ranks_[rank].status.read().data(), sizeof status);
  return status;
}

plan::ArenaHeader GpuPlans::header(int rank) const {
  plan::ArenaHeader header;
  std::memcpy(&header, ranks_[rank].arena.read().data(), sizeof header);
  return header;
}

std::string GpuPlans::difference(int rank, const void* expected, std::size_t expectedBytes) const {
  const Rank& memory = ranks_[rank];
  const std::vector<char> arena = memory.arena.read();
  plan::ArenaHeader wanted, got;
  std::memcpy(&wanted, expected, sizeof wanted);
  std::memcpy(&got, arena.data(), sizeof got);
  for (const GpuMemory* part : {&memory.arena, &memory.counts, &memory.scratch, &memory.status}) {
    if (!part->isWhole()) return "something was written beyond the end of a buffer";
  }
  // An arena that is larger than this step needs is folded into the shape that the host gives it.
  plan::ArenaHeader folded = got;
  if (got.tokens == memory.capacity && got.bytes == arena.size()) {
    folded.tokens = wanted.tokens;
    folded.bytes = wanted.bytes;
  }
  const auto words = [&](const char* name, const void* a, const void* b, std::size_t bytes) -> std::string {
    if (std::memcmp(a, b, bytes) == 0) return "";
    std::size_t i = 0;
    while (static_cast<const char*>(a)[i] == static_cast<const char*>(b)[i]) ++i;
    i &= ~std::size_t{3};
    std::uint32_t one, other;
    std::memcpy(&one, static_cast<const char*>(a) + i, 4);
    std::memcpy(&other, static_cast<const char*>(b) + i, 4);
    return std::string(name) + ", byte " + std::to_string(i) + " of " + std::to_string(bytes) + ": the host has " +
           std::to_string(one) + ", the GPU " + std::to_string(other);
  };
  std::string found = words("header", expected, &folded, sizeof wanted);
  if (!found.empty()) return found;
  const plan::ArenaOffsets there = plan::arenaOffsets(got), here = plan::arenaOffsets(wanted);
  if (here.end != expectedBytes) return "the host's arena has another size";
  const auto section = [&](const char* name, std::uint64_t fromHere, std::uint64_t fromThere, std::uint64_t bytes) {
    if (!found.empty()) return;
    found = words(name, static_cast<const char*>(expected) + fromHere, arena.data() + fromThere, bytes);
  };
  const bool sameShape = got.tokens == wanted.tokens;
  const std::uint64_t slots = static_cast<std::uint64_t>(wanted.tokens) * wanted.topk;
  const std::uint64_t copies = plan::maxCopies(wanted.tokens, wanted.topk, wanted.nodes, wanted.dedup) + 1;
  section("rows of keys", here.rowsOfExpert, there.rowsOfExpert, here.rowBase - here.rowsOfExpert);
  section("row bases", here.rowBase, there.rowBase, here.localExpertRows - here.rowBase);
  section("rows of experts", here.localExpertRows, there.localExpertRows, here.localExpertStart - here.localExpertRows);
  section("starts of experts", here.localExpertStart, there.localExpertStart, here.flows - here.localExpertStart);
  section("flows", here.flows, there.flows, here.copies - here.flows);
  section("copies", here.copies, there.copies, sameShape ? here.entries - here.copies : copies * sizeof(plan::Copy));
  section("entries", here.entries, there.entries,
          sameShape ? here.weights - here.entries : slots * sizeof(plan::Entry));
  section("weights", here.weights, there.weights, sameShape ? here.end - here.weights : slots * sizeof(float));
  return found;
}

std::vector<plan::Exchanged> exchange(const World& world) {
  const int ranks = world.topology.ranks();
  std::vector<plan::Exchanged> exchanged;
  std::vector<std::int32_t> sum;
  for (int rank = 0; rank < ranks; ++rank) {
    World readable = world;
    for (auto& id : readable.wide[rank]) id = id < -1 || id >= world.experts ? -1 : id;
    readable.narrow[rank].assign(readable.wide[rank].begin(), readable.wide[rank].end());
    const auto rows = plan::analyse(readable.map(rank), world.topology, rank, world.options).rowsOfKey;
    sum.resize(rows.size(), 0);
    exchanged.push_back({sum, {}});
    for (std::size_t key = 0; key < rows.size(); ++key) sum[key] += rows[key];
  }
  for (plan::Exchanged& each : exchanged) each.total = sum;
  return exchanged;
}

std::vector<Arena> hostPlans(const World& world) {
  const std::vector<plan::Exchanged> exchanged = exchange(world);
  std::vector<Arena> arenas;
  for (int rank = 0; rank < world.topology.ranks(); ++rank) {
    const plan::RoutingMap map = world.map(rank);
    const plan::Analysis analysis = plan::analyse(map, world.topology, rank, world.options);
    arenas.emplace_back(plan::arenaBytes(map, world.topology, rank, world.options));
    plan::makePlan(map, world.topology, rank, world.options, analysis, exchanged[rank], arenas.back().get());
  }
  return arenas;
}

World makeWorld(std::mt19937& random, int size, const World* like) {
  World world;
  if (like != nullptr) {
    world = *like;
    world.wide.clear();
    world.narrow.clear();
    world.weights.clear();
    for (auto& tokens : world.tokens)
      tokens = pick(random, 0, 3) == 0 ? tokens : pick(random, 0, static_cast<int>(tokens));
  } else {
    const int ranks = pick(random, 0, 3) == 0 ? pick(random, 17, 40) : pick(random, 1, 16);
    std::vector<int> nodeOf(ranks);
    const int labels = pick(random, 0, 2) == 0 ? pick(random, 2, 40) : pick(random, 1, 3);
    const bool inOrder = pick(random, 0, 1) != 0;
    for (int rank = 0; rank < ranks; ++rank)
      nodeOf[rank] = inOrder ? rank * labels / ranks : pick(random, 0, labels - 1);
    world.topology = plan::Topology(nodeOf, pick(random, 1, 3));
    for (int source = 0; source < ranks && pick(random, 0, 2) != 0; ++source) {
      const int node = pick(random, 0, world.topology.nodes() - 1);
      if (node == world.topology.nodeOf(source)) continue;
      const auto members = world.topology.ranksOf(node);
      const auto member = [&] { return members[pick(random, 0, static_cast<int>(members.size()) - 1)]; };
      const auto share = static_cast<std::uint32_t>(pick(random, 0, 65536));
      world.topology.setFlows(source, node, {{member(), 0, share}, {member(), 0, 65536 - share}});
    }
    world.topk = pick(random, 0, 1) != 0 ? pick(random, 1, 8) : pick(random, 1, 32);
    switch (pick(random, 0, 5)) {
      case 0:
        world.experts = pick(random, 1, ranks);
        break;
      case 1:
        world.experts = pick(random, 1, size > 10000 ? 4096 : 600);
        break;
      default:
        world.experts = pick(random, 1, 8) * ranks;
        break;
    }
    world.idBytes = pick(random, 0, 1) != 0 ? 8 : 4;
    world.weighted = pick(random, 0, 3) != 0;
    world.options.layout = static_cast<plan::Layout>(pick(random, 0, 2));
    world.options.dedup = static_cast<plan::Dedup>(pick(random, 0, 2));
    const int most = pick(random, 0, std::max(1, size / world.topk));
    for (int rank = 0; rank < ranks; ++rank) {
      world.tokens.push_back(pick(random, 0, 4) == 0 ? 0 : pick(random, 0, 3) == 0 ? most : pick(random, 0, most));
    }
    const std::int64_t largest = *std::max_element(world.tokens.begin(), world.tokens.end());
    if (world.options.layout == plan::Layout::slotted) world.options.maxTokens = largest + pick(random, 0, 3);
    if (world.options.layout == plan::Layout::expertOrder && pick(random, 0, 1) != 0) {
      world.options.alignment = pick(random, 1, 130);
    }
    if (pick(random, 0, 2) == 0) {
      world.options.capacityRows = pick(random, 1, 1 + static_cast<int>(largest) * world.topk);
    }
  }
  const bool repeats = pick(random, 0, 1) != 0;
  const int nonePercent = pick(random, 0, 3) * 15;
  const int hot = pick(random, 0, 7) == 0 ? pick(random, 0, world.experts - 1) : -1;  // all to one expert
  std::vector<std::int64_t> lastToken(world.experts, -1);
  std::int64_t stamp = 0;
  for (const std::int64_t tokens : world.tokens) {
    std::vector<std::int64_t> ids;
    ids.reserve(tokens * world.topk);
    for (std::int64_t token = 0; token < tokens; ++token, ++stamp) {
      for (int slot = 0; slot < world.topk; ++slot) {
        std::int64_t id = hot >= 0 ? hot : pick(random, 0, world.experts - 1);
        if (pick(random, 1, 100) <= nonePercent || (!repeats && hot < 0 && lastToken[id] == stamp)) id = -1;
        if (id >= 0) lastToken[id] = stamp;
        ids.push_back(id);
      }
    }
    world.narrow.emplace_back(ids.begin(), ids.end());
    world.weights.emplace_back(ids.size());
    for (float& weight : world.weights.back()) weight = static_cast<float>(pick(random, 1, 1000)) / 1000;
    world.wide.push_back(std::move(ids));
  }
  return world;
}

bool hasGpu() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  if (!found) cudaGetLastError();
  return found;
}

}  // namespace fusco::kernels::testing
