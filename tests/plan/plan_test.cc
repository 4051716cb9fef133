// Every rank's plan against the naive oracle, on random shuffles. FUSCO_TEST_SEED repeats one failing case,
// FUSCO_TEST_CASES sets how many are tried.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "plan/planner.h"
#include "world.h"

namespace fusco::plan::testing {
namespace {

// What the arenas say, row by row.
std::vector<Row> decode(const World& world, const std::vector<Arena>& arenas) {
  std::vector<Row> rows;
  for (int rank = 0; rank < world.topology.ranks(); ++rank) {
    const View plan = view(arenas[rank].get());
    for (int flow = 0; flow < plan.header->flows; ++flow) {
      for (std::uint32_t copy = plan.flows[flow].copyBegin; copy < plan.flows[flow].copyEnd; ++copy) {
        for (std::uint32_t i = plan.copies[copy].firstEntry; i < plan.copies[copy + 1].firstEntry; ++i) {
          const Entry entry = plan.entries[i];
          rows.push_back({world.topology.ranksOf(plan.flows[flow].node)[entry.rank], entry.row, rank,
                          plan.copies[copy].token, entry.slot & kSlotMask});
        }
      }
    }
  }
  return rows;
}

// Counts, tables and the order of the lists of one rank's plan.
void checkOneRank(const World& world, const Expected& expected, int rank, const View& plan) {
  const Topology& topology = world.topology;
  const ArenaHeader& header = *plan.header;
  ASSERT_EQ(header.flows, topology.flowCount(rank));
  ASSERT_EQ(header.tokensUsed, world.tokens[rank]);
  ASSERT_EQ(header.dropped, expected.dropped[rank]);
  ASSERT_EQ(header.receiveRows, expected.receiveRows[rank]);
  for (std::size_t key = 0; key < expected.rowsOfKey[rank].size(); ++key) {
    ASSERT_EQ(plan.rowsOfExpert[key], expected.rowsOfKey[rank][key]) << "key " << key;
  }
  for (int local = 0; local < header.localExperts; ++local) {
    ASSERT_EQ(plan.localExpertRows[local], expected.expertRows[rank][local]) << "local expert " << local;
  }
  for (int local = 0; local <= header.localExperts; ++local) {
    ASSERT_EQ(plan.localExpertStart[local], expected.expertStart[rank][local]) << "local expert " << local;
  }

  // The flows cover the copies in order, nodes rising; a node's copies are cut by cumulated share.
  std::uint32_t next = 0;
  int flow = 0;
  for (int node = 0; node < topology.nodes(); ++node) {
    const bool own = node == topology.nodeOf(rank);
    const auto shares = topology.flowsTo(rank, node);
    const int count = own ? 1 : static_cast<int>(shares.size());
    const std::uint32_t begin = next;
    const std::uint64_t copies = plan.flows[flow + count - 1].copyEnd - begin;
    std::uint64_t cumulated = 0;
    for (int i = 0; i < count; ++i, ++flow) {
      const Flow& f = plan.flows[flow];
      ASSERT_EQ(f.node, node);
      ASSERT_EQ(f.forwarder, own ? rank : shares[i].forwarder);
      ASSERT_EQ(f.lane, own ? 0 : shares[i].lane);
      cumulated += own ? 65536 : shares[i].share;
      ASSERT_EQ(f.copyBegin, next);
      ASSERT_EQ(f.copyEnd, begin + copies * cumulated / 65536);
      next = f.copyEnd;
    }
    for (std::uint32_t copy = begin; copy + 1 < next; ++copy) {
      if (world.options.dedup == Dedup::none) {
        ASSERT_LE(plan.copies[copy].token, plan.copies[copy + 1].token);
      } else {
        ASSERT_LT(plan.copies[copy].token, plan.copies[copy + 1].token);  // one copy of a token per node
      }
    }
  }
  ASSERT_EQ(flow, header.flows);
  ASSERT_EQ(next, header.copies);
  ASSERT_EQ(header.copies == 0 ? 0u : plan.copies[0].firstEntry, 0u);
  ASSERT_EQ(plan.copies[header.copies].firstEntry, header.entries);

  for (std::int64_t copy = 0; copy < header.copies; ++copy) {
    const std::uint32_t first = plan.copies[copy].firstEntry, end = plan.copies[copy + 1].firstEntry;
    ASSERT_LT(first, end) << "a copy without entries";
    if (world.options.dedup == Dedup::none) {
      ASSERT_EQ(first + 1, end);
    }
    std::set<int> reached;
    int lastSlot = -1;
    for (std::uint32_t i = first; i < end; ++i) {
      const int slot = plan.entries[i].slot & kSlotMask;
      ASSERT_GT(slot, lastSlot);
      lastSlot = slot;
      ASSERT_EQ((plan.entries[i].slot & kDuplicate) != 0, !reached.insert(plan.entries[i].rank).second);
      const std::int64_t place = std::int64_t{plan.copies[copy].token} * world.topk + slot;
      ASSERT_EQ(plan.weights[i], world.weighted ? world.weights[rank][place] : 1.0f);
    }
  }
}

void checkWorld(const World& world) {
  const Expected expected = naive(world);
  const std::vector<Arena> arenas = planAll(world, expected);
  for (int rank = 0; rank < world.topology.ranks(); ++rank) {
    SCOPED_TRACE("rank " + std::to_string(rank));
    checkOneRank(world, expected, rank, view(arenas[rank].get()));
    if (::testing::Test::HasFatalFailure()) return;
  }
  // All ranks together deliver exactly what the oracle does: every row once, none missing, none twice.
  std::vector<Row> rows = decode(world, arenas);
  std::sort(rows.begin(), rows.end());
  ASSERT_EQ(rows.size(), expected.rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    ASSERT_TRUE(rows[i] == expected.rows[i])
        << "delivered row " << i << ": rank " << rows[i].destination << " row " << rows[i].row << " holds token "
        << rows[i].token << " of " << rows[i].source;
    ASSERT_TRUE(i == 0 || rows[i - 1].destination != rows[i].destination || rows[i - 1].row != rows[i].row);
  }
  std::size_t kept = 0, wanted = 0;
  for (int rank = 0; rank < world.topology.ranks(); ++rank) {
    kept += view(arenas[rank].get()).header->entries + view(arenas[rank].get()).header->dropped;
    for (const std::int32_t count : expected.rowsOfKey[rank]) wanted += count;
  }
  ASSERT_EQ(kept, wanted);
}

unsigned setting(const char* name, unsigned fallback) {
  const char* text = std::getenv(name);
  return text == nullptr ? fallback : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
}

TEST(Plan, AgreesWithTheOracleOnRandomShuffles) {
  const bool one = std::getenv("FUSCO_TEST_SEED") != nullptr;
  const unsigned first = setting("FUSCO_TEST_SEED", 1);
  const unsigned cases = one ? 1 : setting("FUSCO_TEST_CASES", 3000);
  for (unsigned seed = first; seed < first + cases; ++seed) {
    std::mt19937 random(seed);
    const World world = randomWorld(random);
    SCOPED_TRACE("FUSCO_TEST_SEED=" + std::to_string(seed) + ": " + describe(world));
    checkWorld(world);
    if (HasFatalFailure()) return;
  }
}

TEST(Plan, RandomShufflesCoverWhatTheyShould) {
  std::map<std::string, int> seen;
  for (unsigned seed = 1; seed <= 3000; ++seed) {
    std::mt19937 random(seed);
    const World world = randomWorld(random);
    const Expected expected = naive(world);
    const int ranks = world.topology.ranks();
    seen["layout " + std::to_string(static_cast<int>(world.options.layout))]++;
    seen["dedup " + std::to_string(static_cast<int>(world.options.dedup))]++;
    seen["experts < ranks"] += world.experts < ranks;
    seen["uneven experts"] += world.experts % ranks != 0;
    seen["several nodes"] += world.topology.nodes() > 1;
    seen["dropped"] += std::any_of(expected.dropped.begin(), expected.dropped.end(), [](auto n) { return n > 0; });
    seen["dropped by a full slot block"] +=
        world.options.capacityRows == 0 &&
        std::any_of(expected.dropped.begin(), expected.dropped.end(), [](auto n) { return n > 0; });
    seen["split flow"] += world.topology.flowCount(0) > world.topology.nodes();
  }
  for (const char* what :
       {"layout 0", "layout 1", "layout 2", "dedup 0", "dedup 1", "dedup 2", "experts < ranks", "uneven experts",
        "several nodes", "dropped", "dropped by a full slot block", "split flow"}) {
    EXPECT_GT(seen[what], 10) << what;
  }
}

TEST(Plan, SameInputSameBytes) {
  for (unsigned seed = 1; seed <= 200; ++seed) {
    std::mt19937 random(seed);
    const World world = randomWorld(random);
    const Expected expected = naive(world);
    for (int rank = 0; rank < world.topology.ranks(); ++rank) {
      const RoutingMap map = world.map(rank);
      Arena first(arenaBytes(map, world.topology, rank, world.options)), second(first.bytes);
      std::memset(first.get(), 0x5a, first.bytes);
      std::memset(second.get(), 0xa5, second.bytes);
      makePlan(map, world.topology, rank, world.options, analyse(map, world.topology, rank, world.options),
               expected.exchanged[rank], first.get());
      // The second by a planner that has planned something else before, with another number of experts.
      Planner planner(world.topology, rank);
      Analysis analysis;
      RoutingMap other = map;
      other.experts += 3;
      planner.analyse(other, world.options, analysis);
      planner.analyse(map, world.options, analysis);
      planner.makePlan(map, world.options, analysis, expected.exchanged[rank], second.get());
      ASSERT_EQ(std::memcmp(first.get(), second.get(), first.bytes), 0) << "seed " << seed << " rank " << rank;
      ASSERT_EQ(view(first.get()).header->bytes, first.bytes);
    }
  }
}

TEST(Plan, NodeTrafficNeedsOneCopyForEachTokenAndNode) {
  World world;
  world.topology = Topology({0, 0, 1, 1, 2, 2});
  world.topk = 4;
  world.experts = 12;
  world.tokens = {1, 0, 0, 0, 0, 0};
  world.wide = {{4, 7, 5, 11}, {}, {}, {}, {}, {}};  // ranks 2, 3, 2 (node 1) and 5 (node 2)
  world.narrow.resize(6);
  world.weights.resize(6);
  world.weights[0] = {1, 2, 3, 4};
  checkWorld(world);
  const std::vector<Arena> arenas = planAll(world, naive(world));
  const View plan = view(arenas[0].get());
  EXPECT_EQ(plan.header->copies, 2);
  EXPECT_EQ(plan.header->entries, 4);
  EXPECT_EQ(plan.flows[0].copyEnd - plan.flows[0].copyBegin, 0u);
  EXPECT_EQ(plan.flows[1].copyEnd - plan.flows[1].copyBegin, 1u);
  EXPECT_EQ(plan.entries[0].rank, 0);
  EXPECT_EQ(plan.entries[1].rank, 1);
  EXPECT_EQ(plan.entries[2].slot, 2 | kDuplicate);
  world.options.dedup = Dedup::none;
  checkWorld(world);
  EXPECT_EQ(view(planAll(world, naive(world))[0].get()).header->copies, 4);
}

TEST(Plan, ManySlots) {
  World world;
  world.topology = Topology({0, 0, 1});
  world.topk = 32767;
  world.experts = 5;
  world.tokens = {2, 1, 0};
  world.wide.resize(3);
  for (int rank = 0; rank < 3; ++rank) {
    for (std::int64_t i = 0; i < world.tokens[rank] * world.topk; ++i) world.wide[rank].push_back(i * i % 6 - 1);
    world.weights.emplace_back(world.wide[rank].size(), 0.5f);
  }
  world.narrow.resize(3);
  checkWorld(world);
}

// What random worlds are too small for: planning has ways of its own for top-8, for more than eight nodes, and where a
// byte counts the tokens of a node.
World largerWorld(std::mt19937& random) {
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  World world;
  const int ranks = pick(1, 24), nodes = pick(0, 1) != 0 ? pick(1, 8) : 24;
  std::vector<int> nodeOf(ranks);
  for (int& node : nodeOf) node = pick(0, nodes - 1);
  world.topology = Topology(nodeOf);
  world.topk = pick(0, 2) != 0 ? 8 : pick(0, 1) != 0 ? pick(7, 9) : 70;
  world.experts = pick(1, 40);
  world.idBytes = pick(0, 1) != 0 ? 8 : 4;
  world.weighted = pick(0, 3) != 0;
  world.options.layout = static_cast<Layout>(pick(0, 2));
  world.options.dedup = static_cast<Dedup>(pick(0, 2));
  const int masked = pick(0, 3) * 33;
  for (int rank = 0; rank < ranks; ++rank) {
    world.tokens.push_back(rank == 0 ? pick(0, 600) : pick(0, 3));
    std::vector<std::int64_t> ids(world.tokens.back() * world.topk);
    for (std::int64_t& id : ids) id = pick(1, 100) <= masked ? -1 : pick(0, world.experts - 1);
    world.narrow.emplace_back(ids.begin(), ids.end());
    world.weights.emplace_back(ids.size());
    for (float& weight : world.weights.back()) weight = static_cast<float>(pick(1, 1000));
    world.wide.push_back(std::move(ids));
  }
  if (world.options.layout == Layout::slotted) world.options.maxTokens = 600;
  if (pick(0, 2) == 0) world.options.capacityRows = pick(1, 400);
  return world;
}

TEST(Plan, AgreesWithTheOracleOnLargerShuffles) {
  std::map<std::string, int> seen;
  for (unsigned seed = 1; seed <= 150; ++seed) {
    std::mt19937 random(seed);
    const World world = largerWorld(random);
    SCOPED_TRACE("seed " + std::to_string(seed) + ": " + describe(world));
    checkWorld(world);
    if (HasFatalFailure()) return;
    const bool many = world.topology.nodes() > 8, tokens = world.tokens[0] > 255;
    seen[std::string(world.topk == 8 ? "top-8" : "another top-k") + (many ? ", many nodes" : ", few nodes")] += tokens;
    seen["capacity"] += world.options.capacityRows > 0;
  }
  EXPECT_EQ(seen.size(), 5u);
  for (const auto& [what, times] : seen) EXPECT_GT(times, 3) << what;
}

}  // namespace
}  // namespace fusco::plan::testing
