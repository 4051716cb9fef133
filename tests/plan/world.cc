#include "world.h"

#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <tuple>

namespace fusco::plan::testing {

namespace {

int pick(std::mt19937& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

void randomFlows(std::mt19937& random, Topology& topology) {
  for (int source = 0; source < topology.ranks(); ++source) {
    for (int node = 0; node < topology.nodes(); ++node) {
      if (node == topology.nodeOf(source) || pick(random, 0, 1) == 0) continue;
      std::vector<FlowShare> flows(pick(random, 1, 3));
      std::uint32_t left = 65536;
      for (FlowShare& flow : flows) {
        const auto members = topology.ranksOf(node);
        flow.forwarder = members[pick(random, 0, static_cast<int>(members.size()) - 1)];
        flow.lane = pick(random, 0, topology.lanesPerNode() - 1);
        flow.share = &flow == &flows.back() ? left : pick(random, 0, static_cast<int>(left));
        left -= flow.share;
      }
      topology.setFlows(source, node, flows);
    }
  }
}

}  // namespace

RoutingMap World::map(int rank) const {
  RoutingMap map;
  map.ids = idBytes == 4 ? static_cast<const void*>(narrow[rank].data()) : wide[rank].data();
  map.idBytes = idBytes;
  map.weights = weighted ? weights[rank].data() : nullptr;
  map.tokens = tokens[rank];
  map.topk = topk;
  map.experts = experts;
  return map;
}

World randomWorld(std::mt19937& random) {
  World world;
  const int ranks = pick(random, 1, 9);
  std::vector<int> nodeOf(ranks);
  const int labels = pick(random, 1, 4);
  for (int& node : nodeOf) node = 7 * pick(random, 0, labels - 1);
  world.topology = Topology(nodeOf, pick(random, 1, 3));
  if (pick(random, 0, 1) != 0) randomFlows(random, world.topology);
  world.topk = pick(random, 1, 6);
  world.experts = pick(random, 0, 2) == 0 ? pick(random, 1, ranks) : pick(random, 1, 4 * ranks);
  world.idBytes = pick(random, 0, 1) != 0 ? 8 : 4;
  world.weighted = pick(random, 0, 3) != 0;
  world.options.layout = static_cast<Layout>(pick(random, 0, 2));
  world.options.dedup = static_cast<Dedup>(pick(random, 0, 2));

  const int most = pick(random, 0, 20);
  const bool repeats = pick(random, 0, 1) != 0;
  const int nonePercent = pick(random, 0, 2) * 25;
  const int hot = pick(random, 0, 5) == 0 ? pick(random, 0, world.experts - 1) : -1;  // all to one expert
  std::int64_t largest = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    const int tokens = pick(random, 0, 4) == 0 ? 0 : pick(random, 0, most);
    largest = std::max<std::int64_t>(largest, tokens);
    world.tokens.push_back(tokens);
    std::vector<std::int64_t> ids;
    for (int token = 0; token < tokens; ++token) {
      std::set<std::int64_t> seen;
      for (int slot = 0; slot < world.topk; ++slot) {
        std::int64_t id = hot >= 0 ? hot : pick(random, 0, world.experts - 1);
        if (pick(random, 1, 100) <= nonePercent || (!repeats && hot < 0 && !seen.insert(id).second)) id = -1;
        ids.push_back(id);
      }
    }
    world.narrow.emplace_back(ids.begin(), ids.end());
    world.weights.emplace_back(ids.size());
    for (float& weight : world.weights.back()) weight = static_cast<float>(pick(random, 1, 1000)) / 1000;
    world.wide.push_back(std::move(ids));
  }
  if (world.options.layout == Layout::slotted) world.options.maxTokens = largest + pick(random, 0, 3);
  if (world.options.layout == Layout::expertOrder && pick(random, 0, 1) != 0)
    world.options.alignment = pick(random, 1, 17);
  if (pick(random, 0, 2) == 0) world.options.capacityRows = pick(random, 1, 60);
  return world;
}

std::string describe(const World& world) {
  std::ostringstream text;
  text << world.topology.ranks() << " ranks, " << world.topology.nodes() << " nodes, " << world.experts
       << " experts, top-" << world.topk << ", ids of " << world.idBytes << " bytes, layout "
       << static_cast<unsigned>(world.options.layout) << ", dedup " << static_cast<unsigned>(world.options.dedup)
       << ", alignment " << world.options.alignment << ", most tokens " << world.options.maxTokens << ", capacity "
       << world.options.capacityRows;
  return text.str();
}

Expected naive(const World& world) {
  const Topology& topology = world.topology;
  const Options& options = world.options;
  const int ranks = topology.ranks();
  const bool byRank = options.layout == Layout::rankOrder;
  const int keys = byRank ? ranks : world.experts;
  Expected expected;
  expected.rowsOfKey.assign(ranks, std::vector<std::int32_t>(keys, 0));
  expected.dropped.assign(ranks, 0);
  expected.expertRows.resize(ranks);
  expected.expertStart.resize(ranks);

  // Everything that wants to go somewhere, by destination in the order that the layout defines.
  using Wish = std::tuple<int, int, std::int64_t, int>;  // local expert (0 in rank order), source, token, slot
  std::vector<std::vector<Wish>> wishes(ranks);
  for (int source = 0; source < ranks; ++source) {
    for (std::int64_t token = 0; token < world.tokens[source]; ++token) {
      std::set<int> reached;
      for (int slot = 0; slot < world.topk; ++slot) {
        const auto expert = static_cast<int>(world.id(source, token, slot));
        if (expert < 0) continue;
        int owner = 0;
        while (expert >= topology.firstExpert(owner, world.experts) + topology.expertsOf(owner, world.experts)) ++owner;
        if (byRank && !reached.insert(owner).second) continue;
        wishes[owner].push_back(
            {byRank ? 0 : expert - topology.firstExpert(owner, world.experts), source, token, slot});
        ++expected.rowsOfKey[source][byRank ? owner : expert];
      }
    }
  }

  const std::int64_t capacity = options.capacityRows > 0 ? options.capacityRows : INT64_MAX;
  for (int rank = 0; rank < ranks; ++rank) {
    std::sort(wishes[rank].begin(), wishes[rank].end());
    const int mine = topology.expertsOf(rank, world.experts);
    std::map<std::pair<int, int>, std::int64_t> seenOfBlock;  // slotted: rows of (expert, source) so far
    std::vector<std::int64_t> rowsOf(mine, 0), startOf(mine + 1, 0);
    std::int64_t next = 0;
    std::size_t at = 0;
    const auto deliver = [&](const Wish& wish, std::int64_t row, bool fits) {
      const auto [expert, source, token, slot] = wish;
      if (fits && row < capacity) {
        expected.rows.push_back({rank, row, source, token, slot});
        if (!byRank) ++rowsOf[expert];
      } else {
        ++expected.dropped[source];
      }
    };
    if (byRank) {
      for (const Wish& wish : wishes[rank]) deliver(wish, next++, true);
    } else {
      for (int expert = 0; expert < mine; ++expert) {
        startOf[expert] = std::min(next, capacity);
        for (; at < wishes[rank].size() && std::get<0>(wishes[rank][at]) == expert; ++at) {
          const Wish& wish = wishes[rank][at];
          if (options.layout == Layout::slotted) {
            const int source = std::get<1>(wish);
            const std::int64_t n = seenOfBlock[{expert, source}]++;
            deliver(wish, (static_cast<std::int64_t>(expert) * ranks + source) * options.maxTokens + n,
                    n < options.maxTokens);
          } else {
            deliver(wish, next++, true);
          }
        }
        if (options.layout == Layout::slotted) {
          next = static_cast<std::int64_t>(expert + 1) * ranks * options.maxTokens;
          rowsOf[expert] = std::max<std::int64_t>(0, std::min(capacity, next) - startOf[expert]);
        }
        while (next % options.alignment != 0) ++next;
      }
    }
    expected.receiveRows.push_back(std::min(next, capacity));
    if (!byRank) startOf[mine] = expected.receiveRows.back();
    expected.expertRows[rank] = rowsOf;
    expected.expertStart[rank] = startOf;
  }
  std::sort(expected.rows.begin(), expected.rows.end());

  std::vector<std::int32_t> sum(keys, 0);
  for (int rank = 0; rank < ranks; ++rank) {
    expected.exchanged.push_back({sum, {}});
    for (int key = 0; key < keys; ++key) sum[key] += expected.rowsOfKey[rank][key];
  }
  for (Exchanged& exchanged : expected.exchanged) exchanged.total = sum;
  if (options.layout == Layout::slotted) expected.exchanged.assign(ranks, {});
  return expected;
}

std::vector<Arena> planAll(const World& world, const Expected& expected) {
  std::vector<Arena> arenas;
  for (int rank = 0; rank < world.topology.ranks(); ++rank) {
    const RoutingMap map = world.map(rank);
    const Analysis analysis = analyse(map, world.topology, rank, world.options);
    arenas.emplace_back(arenaBytes(map, world.topology, rank, world.options));
    makePlan(map, world.topology, rank, world.options, analysis, expected.exchanged[rank], arenas.back().get());
  }
  return arenas;
}

}  // namespace fusco::plan::testing
