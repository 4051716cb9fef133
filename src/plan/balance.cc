#include "plan/balance.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "base/status.h"

namespace fusco::plan {

namespace {

// A part of a load and where it goes: a lane or a forwarder.
struct Part {
  int target;
  std::int64_t amount;
};

// Splits a load over targets, home first. Both sides of the full balancer fill their targets in this way: every load
// goes to its home as far as there is room, then what is left over goes where there still is room.
class Filling {
 public:
  explicit Filling(std::vector<std::int64_t> room) : room_(std::move(room)), slack_(room_) {
    for (std::int64_t& slack : slack_) slack /= 64;
  }

  std::int64_t takeAtHome(int home, std::int64_t load) {
    const std::int64_t taken = std::min(load, room_[home] + slack_[home]);
    slack_[home] -= std::max(std::int64_t{0}, taken - room_[home]);
    room_[home] -= std::min(taken, room_[home]);
    return taken;
  }
  // Never runs out: the rooms add up to the loads or more.
  void spill(std::int64_t load, std::vector<Part>& parts) {
    while (load > 0) {
      while (room_[next_] == 0) ++next_;
      const std::int64_t taken = std::min(load, room_[next_]);
      room_[next_] -= taken;
      load -= taken;
      parts.push_back({next_, taken});
    }
  }

 private:
  std::vector<std::int64_t> room_, slack_;
  int next_ = 0;
};

// `total` in `count` parts that differ by at most 1.
std::int64_t evenPart(std::int64_t total, int count, int i) { return total * (i + 1) / count - total * i / count; }

// `total` in parts by weight.
std::vector<std::int64_t> weightedParts(std::int64_t total, std::span<const std::int32_t> weights) {
  const std::int64_t sum = std::accumulate(weights.begin(), weights.end(), std::int64_t{0});
  std::vector<std::int64_t> parts;
  std::int64_t cumulated = 0, done = 0;
  for (const std::int32_t weight : weights) {
    cumulated += weight;
    const std::int64_t end = total * cumulated / sum;
    parts.push_back(end - done);
    done = end;
  }
  return parts;
}

class FullBalancer {
 public:
  FullBalancer(Topology& topology, std::span<const std::int32_t> copies, const LaneSpeeds* speeds)
      : topology_(topology), copies_(copies) {
    const int lanes = topology.lanesPerNode();
    speeds_ = speeds != nullptr ? speeds->speeds() : LaneSpeeds(topology.nodes(), lanes).speeds();
  }

  void run() {
    forwarderParts_.resize(static_cast<std::size_t>(topology_.ranks()) * topology_.nodes());
    for (int node = 0; node < topology_.nodes(); ++node) chooseForwarders(node);
    for (int node = 0; node < topology_.nodes(); ++node) chooseLanes(node);
  }

 private:
  // A range of pool_.
  struct Parts {
    std::uint32_t begin = 0;
    std::uint32_t count = 0;
  };

  std::int64_t load(int source, int node) const {
    return topology_.nodeOf(source) == node ? 0 : copies_[static_cast<std::size_t>(source) * topology_.nodes() + node];
  }

  std::span<const std::int32_t> speedsOf(int node, int lanes) const {
    const auto all = static_cast<std::size_t>(topology_.lanesPerNode());
    return {speeds_.data() + static_cast<std::size_t>(node) * all, static_cast<std::size_t>(lanes)};
  }

  // The receiving side of a node: each reachable lane takes in as much as its speed allows, each forwarder of a lane as
  // much as the others.
  void chooseForwarders(int node) {
    const auto members = topology_.ranksOf(node);
    const int size = static_cast<int>(members.size());
    const int lanes = std::min(topology_.lanesPerNode(), size);
    std::int64_t total = 0;
    for (int source = 0; source < topology_.ranks(); ++source) total += load(source, node);
    const std::vector<std::int64_t> ofLane = weightedParts(total, speedsOf(node, lanes));
    std::vector<std::int64_t> room(size);
    for (int i = 0; i < size; ++i) {
      const int lane = i % lanes;
      room[i] = evenPart(ofLane[lane], (size - lane + lanes - 1) / lanes, i / lanes);
    }
    Filling filling(std::move(room));
    std::vector<std::int64_t> atHome(topology_.ranks());
    for (int source = 0; source < topology_.ranks(); ++source) {
      atHome[source] = filling.takeAtHome(topology_.localIndex(source) % size, load(source, node));
    }
    for (int source = 0; source < topology_.ranks(); ++source) {
      Parts& parts = forwarderParts_[static_cast<std::size_t>(source) * topology_.nodes() + node];
      parts.begin = static_cast<std::uint32_t>(pool_.size());
      if (atHome[source] > 0) pool_.push_back({topology_.localIndex(source) % size, atHome[source]});
      filling.spill(load(source, node) - atHome[source], pool_);
      parts.count = static_cast<std::uint32_t>(pool_.size()) - parts.begin;
    }
  }

  // The sending side of a node: each lane takes as much as its speed allows. A rank fills its own lanes first (its
  // local index modulo lanes; with more lanes than ranks it has several), then those of ranks that have less to send.
  void chooseLanes(int node) {
    const auto members = topology_.ranksOf(node);
    const int size = static_cast<int>(members.size()), lanes = topology_.lanesPerNode();
    std::vector<std::int64_t> out(size, 0);
    for (int i = 0; i < size; ++i) {
      for (int to = 0; to < topology_.nodes(); ++to) out[i] += load(members[i], to);
    }
    const std::int64_t total = std::accumulate(out.begin(), out.end(), std::int64_t{0});
    Filling filling(weightedParts(total, speedsOf(node, lanes)));
    std::vector<std::vector<Part>> parts(size);
    for (int i = 0; i < size; ++i) {
      for (int lane = i % lanes; lane < lanes; lane += size) {
        const std::int64_t taken = filling.takeAtHome(lane, out[i]);
        out[i] -= taken;
        if (taken > 0) parts[i].push_back({lane, taken});
      }
    }
    for (int i = 0; i < size; ++i) {
      filling.spill(out[i], parts[i]);
      enterFlows(members[i], parts[i]);
    }
  }

  // A source's loads, node after node, lie along its lanes, part after part; each load is also cut by forwarders. Where
  // both cuts are known, the flows are.
  void enterFlows(int source, const std::vector<Part>& lanes) {
    std::size_t lane = 0;
    std::int64_t leftOfLane = lanes.empty() ? 0 : lanes[0].amount;
    for (int node = 0; node < topology_.nodes(); ++node) {
      const std::int64_t whole = load(source, node);
      if (whole == 0) continue;
      const auto members = topology_.ranksOf(node);
      const Parts parts = forwarderParts_[static_cast<std::size_t>(source) * topology_.nodes() + node];
      flows_.clear();
      std::int64_t done = 0;
      std::uint32_t shared = 0;
      for (std::uint32_t i = parts.begin; i < parts.begin + parts.count; ++i) {
        for (std::int64_t left = pool_[i].amount; left > 0;) {
          if (leftOfLane == 0) leftOfLane = lanes[++lane].amount;
          const std::int64_t taken = std::min(left, leftOfLane);
          done += taken;
          const auto cumulated = static_cast<std::uint32_t>(done * 65536 / whole);
          if (cumulated > shared) flows_.push_back({members[pool_[i].target], lanes[lane].target, cumulated - shared});
          shared = cumulated;
          left -= taken;
          leftOfLane -= taken;
        }
      }
      topology_.setFlows(source, node, flows_);
    }
  }

  Topology& topology_;
  std::span<const std::int32_t> copies_;
  std::vector<std::int32_t> speeds_;  // [node * lanes + lane]
  std::vector<Part> pool_;
  std::vector<Parts> forwarderParts_;  // [source * nodes + node]
  std::vector<FlowShare> flows_;       // of the pair in hand
};

// Position p in node n and position (p - n + m) in node m are of one group: the p-th busiest rank of one node meets the
// (p + 1)-th of the next, so that no forwarder collects the busy senders of all nodes.
void balanceByGroups(Topology& topology, std::span<const std::int32_t> copies) {
  const int nodes = topology.nodes();
  std::vector<std::vector<int>> sorted(nodes);
  std::vector<int> position(topology.ranks());
  std::vector<std::int64_t> out(topology.ranks(), 0);
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    for (int node = 0; node < nodes; ++node) {
      if (node != topology.nodeOf(rank)) out[rank] += copies[static_cast<std::size_t>(rank) * nodes + node];
    }
  }
  for (int node = 0; node < nodes; ++node) {
    const auto members = topology.ranksOf(node);
    sorted[node].assign(members.begin(), members.end());
    std::stable_sort(sorted[node].begin(), sorted[node].end(), [&](int a, int b) { return out[a] > out[b]; });
    for (int i = 0; i < static_cast<int>(members.size()); ++i) position[sorted[node][i]] = i;
  }
  std::vector<FlowShare> flow(1);
  for (int source = 0; source < topology.ranks(); ++source) {
    const int from = topology.nodeOf(source);
    const int lane = topology.localIndex(source) % topology.lanesPerNode();
    for (int node = 0; node < nodes; ++node) {
      if (node == from) continue;
      const int size = static_cast<int>(sorted[node].size());
      const int place = ((position[source] - from + node) % size + size) % size;
      flow[0] = {sorted[node][place], lane, 65536};
      topology.setFlows(source, node, flow);
    }
  }
}

}  // namespace

const char* balanceName(Balance balance) {
  switch (balance) {
    case Balance::none:
      return "none";
    case Balance::paper:
      return "paper";
    case Balance::full:
      return "full";
  }
  return "unknown";
}

Balance parseBalance(std::string_view text) {
  for (const Balance balance : {Balance::none, Balance::paper, Balance::full}) {
    if (text == balanceName(balance)) return balance;
  }
  fail(Code::invalidArgument, "balance '" + std::string(text) + "'; give none, paper or full");
}

void balanceFlows(Topology& topology, std::span<const std::int32_t> copies, Balance balance, const LaneSpeeds* speeds) {
  const std::size_t pairs = static_cast<std::size_t>(topology.ranks()) * topology.nodes();
  if (copies.size() != pairs) {
    fail(Code::invalidArgument, "balance: " + std::to_string(copies.size()) + " loads for " + std::to_string(pairs) +
                                    " pairs of source and node");
  }
  for (std::size_t i = 0; i < pairs; ++i) {
    if (copies[i] < 0) {
      fail(Code::invalidArgument, "balance: rank " + std::to_string(i / topology.nodes()) + " has " +
                                      std::to_string(copies[i]) + " copies for node " +
                                      std::to_string(i % topology.nodes()));
    }
  }
  topology.resetFlows();
  if (balance == Balance::paper) balanceByGroups(topology, copies);
  if (balance == Balance::full) FullBalancer(topology, copies, speeds).run();
  topology.setVersion(topology.version() + 1);
}

int laneInto(const Topology& topology, int forwarder) {
  return topology.localIndex(forwarder) % topology.lanesPerNode();
}

LaneLoads::LaneLoads(const Topology& topology)
    : out(static_cast<std::size_t>(topology.nodes()) * topology.lanesPerNode(), 0), in(out) {}

void LaneLoads::add(const Topology& topology, const View& plan) {
  const int lanes = topology.lanesPerNode();
  const int own = plan.header->node;
  for (int i = 0; i < plan.header->flows; ++i) {
    const Flow& flow = plan.flows[i];
    if (flow.node == own) continue;
    const std::int64_t copies = flow.copyEnd - flow.copyBegin;
    out[static_cast<std::size_t>(own) * lanes + flow.lane] += copies;
    in[static_cast<std::size_t>(flow.node) * lanes + laneInto(topology, flow.forwarder)] += copies;
  }
}

Spread spreadOf(const Topology& topology, const LaneLoads& loads) {
  const int lanes = topology.lanesPerNode();
  const auto judge = [&](const std::vector<std::int64_t>& load, bool inwards, double& worst, double& cluster) {
    std::int64_t all = 0, most = 0, lanesOfAll = 0;
    for (int node = 0; node < topology.nodes(); ++node) {
      const auto begin = load.begin() + static_cast<std::ptrdiff_t>(node) * lanes;
      const std::int64_t sum = std::accumulate(begin, begin + lanes, std::int64_t{0});
      const std::int64_t busiest = *std::max_element(begin, begin + lanes);
      const int reachable = inwards ? std::min(lanes, static_cast<int>(topology.ranksOf(node).size())) : lanes;
      if (sum > 0) worst = std::max(worst, static_cast<double>(busiest) * reachable / static_cast<double>(sum));
      all += sum;
      most = std::max(most, busiest);
      lanesOfAll += reachable;
    }
    if (all > 0) cluster = static_cast<double>(most) * static_cast<double>(lanesOfAll) / static_cast<double>(all);
  };
  Spread spread;
  judge(loads.out, false, spread.out, spread.clusterOut);
  judge(loads.in, true, spread.in, spread.clusterIn);
  return spread;
}

}  // namespace fusco::plan
