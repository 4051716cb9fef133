#include "engine/balancer.h"

#include <algorithm>
#include <string>

#include "base/log.h"

namespace fusco::engine {

namespace {

// A record: copies for each node; then, where lanes are measured, two words for each lane of the node (KiB that left,
// KiB a second) and two for what came in by the rank's own.
std::int32_t inKib(std::int64_t bytes) {
  return static_cast<std::int32_t>(std::min<std::int64_t>((bytes + 1023) / 1024, INT32_MAX));
}

template <class T>
std::string listOf(const std::vector<T>& values) {
  std::string text;
  for (const T value : values) text += (text.empty() ? "" : " ") + std::to_string(value);
  return text;
}

plan::LaneSample sampleAt(const std::int32_t* words) {
  return {words[0] * std::int64_t{1024}, words[1] * std::int64_t{1024}};
}

}  // namespace

Balancer::Balancer(comm::Fabric& fabric, plan::Balance balance)
    : fabric_(fabric),
      balance_(balance),
      active_(balance != plan::Balance::none && fabric.topology().nodes() > 1),
      measures_(active_ && balance == plan::Balance::full && fabric.topology().lanesPerNode() > 1),
      plain_(std::make_shared<Routes>(fabric.topology(), fabric.rank())),
      current_(plain_),
      meter_(fabric),
      speeds_(fabric.topology().nodes(), fabric.topology().lanesPerNode()),
      toldSlow_(static_cast<std::size_t>(fabric.topology().lanesPerNode()), 0) {
  if (measures_) meter_.watch(*current_);
}

std::size_t Balancer::recordWords() const {
  if (!active_) return 0;
  const auto nodes = static_cast<std::size_t>(fabric_.topology().nodes());
  return nodes + (measures_ ? 2 * static_cast<std::size_t>(fabric_.topology().lanesPerNode()) + 2 : 0);
}

void Balancer::fillRecord(std::span<const std::int32_t> copiesOfNode, std::int32_t* record) {
  record = std::copy(copiesOfNode.begin(), copiesOfNode.end(), record);
  if (!measures_) return;
  std::vector<plan::LaneSample> samples = meter_.takeOut();
  samples.push_back(meter_.takeIn());
  for (const plan::LaneSample& sample : samples) {
    *record++ = inKib(sample.bytes);
    *record++ = inKib(sample.bytesPerSecond);
  }
}

void Balancer::learn(std::span<const std::int32_t> records) {
  if (measures_) followLanes(records);
  plan::Topology topology = current_->topology;
  const auto nodes = static_cast<std::size_t>(topology.nodes());
  std::vector<std::int32_t> copies;
  copies.reserve(static_cast<std::size_t>(topology.ranks()) * nodes);
  for (std::size_t at = 0; at < records.size(); at += recordWords()) {
    copies.insert(copies.end(), records.begin() + static_cast<std::ptrdiff_t>(at),
                  records.begin() + static_cast<std::ptrdiff_t>(at + nodes));
  }
  plan::balanceFlows(topology, copies, balance_, &speeds_);
  current_ = std::make_shared<Routes>(std::move(topology), fabric_.rank());
  if (measures_) meter_.watch(*current_);
}

void Balancer::followLanes(std::span<const std::int32_t> records) {
  const plan::Topology& topology = fabric_.topology();
  const int lanes = topology.lanesPerNode();
  std::vector<std::int64_t> out, in;
  std::vector<plan::LaneSample> waysOut, waysIn;
  for (int node = 0; node < topology.nodes(); ++node) {
    for (int lane = 0; lane < lanes; ++lane) {
      waysOut.clear();
      waysIn.clear();
      for (const int rank : topology.ranksOf(node)) {
        const std::int32_t* words = records.data() + recordWords() * static_cast<std::size_t>(rank) +
                                    static_cast<std::size_t>(topology.nodes());
        waysOut.push_back(sampleAt(words + 2 * lane));
        if (topology.localIndex(rank) % lanes == lane) waysIn.push_back(sampleAt(words + 2 * lanes));
      }
      out.push_back(plan::together(waysOut).bytesPerSecond);
      in.push_back(plan::together(waysIn).bytesPerSecond);
    }
  }
  speeds_.follow(out, in);
  FUSCO_INFO(kLogTuning, "topology {}: lanes by node show {} bytes/s out, {} in; their speeds are {} of {}",
             current_->topology.version() + 1, listOf(out), listOf(in), listOf(speeds_.speeds()), plan::kFullSpeed);
  tellOfSlowLanes();
}

// One rank of a node speaks for all, once until the lane has recovered.
void Balancer::tellOfSlowLanes() {
  const plan::Topology& topology = fabric_.topology();
  if (topology.localIndex(fabric_.rank()) != 0) return;
  const int node = topology.nodeOf(fabric_.rank());
  for (int lane = 0; lane < speeds_.lanes(); ++lane) {
    const std::int32_t speed = speeds_.of(node, lane);
    char& told = toldSlow_[static_cast<std::size_t>(lane)];
    if (told == 0 && speed < plan::kFullSpeed / 2) {
      told = 1;
      FUSCO_WARN("{}: lane {} of this node is slow, at {} % of the others; the balancer moves traffic off it",
                 fabric_.describeRank(fabric_.rank()), lane, speed * 100 / plan::kFullSpeed);
    } else if (told == 1 && speed >= plan::kFullSpeed * 3 / 4) {
      told = 0;
      FUSCO_INFO(kLogNet, "{}: lane {} of this node has recovered", fabric_.describeRank(fabric_.rank()), lane);
    }
  }
}

}  // namespace fusco::engine
