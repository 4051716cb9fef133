#include "plan/topology.h"

#include <algorithm>
#include <string>
#include <unordered_map>

#include "base/status.h"

namespace fusco::plan {

namespace {

constexpr int kMaxNodes = 65536;  // node numbers and local indices fit 16 bits in the planner's tables and entries
constexpr int kMaxRanksOfNode = 65536;
constexpr std::uint32_t kWholeShare = 65536;
constexpr std::size_t kMaxFlowsOfPair = 65535;

[[noreturn]] void refuse(const std::string& what) { fail(Code::invalidArgument, "topology: " + what); }

}  // namespace

Topology::Topology(std::vector<int> nodeOfRank, int lanesPerNode)
    : nodeOf_(std::move(nodeOfRank)), lanes_(lanesPerNode) {
  if (nodeOf_.empty()) refuse("no ranks; give the node of at least one rank");
  if (lanes_ < 1) refuse(std::to_string(lanes_) + " lanes a node; give at least 1");
  std::unordered_map<int, int> numberOfLabel;
  localIndex_.reserve(nodeOf_.size());
  for (int rank = 0; rank < ranks(); ++rank) {
    const int label = nodeOf_[rank];
    if (label < 0)
      refuse("rank " + std::to_string(rank) + " has node label " + std::to_string(label) + "; labels are 0 or more");
    const int node = numberOfLabel.emplace(label, static_cast<int>(numberOfLabel.size())).first->second;
    if (node == static_cast<int>(ranksOf_.size())) ranksOf_.emplace_back();
    nodeOf_[rank] = node;
    localIndex_.push_back(static_cast<int>(ranksOf_[node].size()));
    ranksOf_[node].push_back(rank);
  }
  if (nodes() > kMaxNodes) refuse(std::to_string(nodes()) + " nodes; at most 65536 are supported");
  std::size_t largest = 0;
  for (const auto& members : ranksOf_) largest = std::max(largest, members.size());
  if (largest > kMaxRanksOfNode) refuse("a node of " + std::to_string(largest) + " ranks; at most 65536 are supported");

  defaults_.reserve(largest * nodes());
  for (int index = 0; index < static_cast<int>(largest); ++index) {
    for (const auto& members : ranksOf_) {
      defaults_.push_back({members[index % members.size()], index % lanes_, kWholeShare});
    }
  }
}

int Topology::firstExpert(int rank, int experts) const {
  const int each = experts / ranks(), more = experts % ranks();
  return rank * each + std::min(rank, more);
}

int Topology::expertsOf(int rank, int experts) const { return experts / ranks() + (rank < experts % ranks() ? 1 : 0); }

int Topology::rankOfExpert(int expert, int experts) const {
  const int each = experts / ranks(), more = experts % ranks();
  const int inLarger = more * (each + 1);
  return expert < inLarger ? expert / (each + 1) : more + (expert - inLarger) / each;
}

void Topology::resetFlows() {
  pairs_.clear();
  pool_.clear();
}

bool Topology::hasOwnFlows(int source, int node) const {
  return !pairs_.empty() && pairs_[static_cast<std::size_t>(source) * nodes() + node].count != 0;
}

std::span<const FlowShare> Topology::flowsTo(int source, int node) const {
  if (nodeOf_[source] == node) return {};
  if (hasOwnFlows(source, node)) {
    const Range& range = pairs_[static_cast<std::size_t>(source) * nodes() + node];
    return {pool_.data() + range.begin, range.count};
  }
  return {&defaults_[static_cast<std::size_t>(localIndex_[source]) * nodes() + node], 1};
}

int Topology::flowCount(int source) const {
  int count = nodes();
  if (pairs_.empty()) return count;
  const Range* ofSource = &pairs_[static_cast<std::size_t>(source) * nodes()];
  for (int node = 0; node < nodes(); ++node) count += std::max<int>(ofSource[node].count, 1) - 1;
  return count;
}

std::vector<Topology::Inflow> Topology::flowsInto(int forwarder) const {
  const int node = nodeOf_[forwarder];
  std::vector<Inflow> inflows;
  for (int source = 0; source < ranks(); ++source) {
    if (nodeOf_[source] == node) continue;
    const auto flows = flowsTo(source, node);
    int index = -1;  // of the first of `flows` among all flows of the source; counted only where it is needed
    for (std::size_t i = 0; i < flows.size(); ++i) {
      if (flows[i].forwarder != forwarder) continue;
      if (index < 0) {
        index = node;
        for (int lower = 0; !pairs_.empty() && lower < node; ++lower) {
          index += std::max<int>(pairs_[static_cast<std::size_t>(source) * nodes() + lower].count, 1) - 1;
        }
      }
      inflows.push_back({source, index + static_cast<std::int32_t>(i)});
    }
  }
  return inflows;
}

void Topology::setFlows(int source, int node, const std::vector<FlowShare>& flows) {
  const auto refusePair = [&](const std::string& what) {
    refuse("flows of rank " + std::to_string(source) + " to node " + std::to_string(node) + ": " + what);
  };
  if (source < 0 || source >= ranks() || node < 0 || node >= nodes()) refusePair("no such rank or node");
  if (nodeOf_[source] == node) refusePair("a rank has no flows to its own node");
  if (flows.empty() || flows.size() > kMaxFlowsOfPair) refusePair("give 1 to 65535 flows");
  std::uint64_t sum = 0;
  for (const FlowShare& flow : flows) {
    if (flow.forwarder < 0 || flow.forwarder >= ranks() || nodeOf_[flow.forwarder] != node) {
      refusePair("forwarder " + std::to_string(flow.forwarder) + " is not a rank of that node");
    }
    if (flow.lane < 0 || flow.lane >= lanes_) {
      refusePair("lane " + std::to_string(flow.lane) + " of " + std::to_string(lanes_));
    }
    sum += flow.share;
  }
  if (sum != kWholeShare) refusePair("the shares add up to " + std::to_string(sum) + ", not 65536");

  if (pairs_.empty()) pairs_.resize(static_cast<std::size_t>(ranks()) * nodes());
  Range& range = pairs_[static_cast<std::size_t>(source) * nodes() + node];
  if (range.room < flows.size()) {
    // The old place is given up; room at least doubles, so that the pool stays within twice what was ever in use at
    // once.
    const std::size_t room = std::min(std::max(flows.size(), std::size_t{2} * range.room), kMaxFlowsOfPair);
    range.begin = static_cast<std::uint32_t>(pool_.size());
    range.room = static_cast<std::uint16_t>(room);
    pool_.resize(pool_.size() + room);
  }
  range.count = static_cast<std::uint16_t>(flows.size());
  std::copy(flows.begin(), flows.end(), pool_.begin() + range.begin);
}

}  // namespace fusco::plan
