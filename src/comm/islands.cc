#include "comm/islands.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "base/bus_id.h"

namespace fusco::comm {

namespace {

struct Island {
  int node;
  std::vector<GpuPlace> places;  // of its ranks, each once
};

bool shareMemory(const GpuPlace& a, const GpuPlace& b) { return a.reaches(b) && b.reaches(a); }

std::string list(const std::set<std::uint32_t>& gpus) {
  std::string text;
  for (const std::uint32_t gpu : gpus) text += (text.empty() ? "" : " ") + busIdText(gpu);
  return text;
}

// Why two ranks do not share a node.
std::string whyApart(const GpuPlace& a, const GpuPlace& b) {
  for (const GpuPlace& one : {a, b}) {
    if (one.without[0] == GpuPlace::kAllOthers)
      return busIdText(one.gpu) + " has no path to any other, or is to use none (FUSCO_P2P_DISABLE)";
  }
  return "there is no path between the memory of " + busIdText(a.gpu) + " and that of " + busIdText(b.gpu);
}

}  // namespace

std::vector<int> nodesOf(const std::vector<Record>& records) {
  std::map<std::pair<std::uint64_t, int>, std::vector<Island>> all;
  std::vector<int> nodeOf;
  int nodes = 0;
  for (const Record& record : records) {
    std::vector<Island>& islands = all[{record.domain, record.nodeId}];
    auto island = std::find_if(islands.begin(), islands.end(), [&](const Island& one) {
      return std::all_of(one.places.begin(), one.places.end(),
                         [&](const GpuPlace& place) { return shareMemory(place, record.gpu); });
    });
    if (island == islands.end()) island = islands.insert(islands.end(), Island{nodes++, {}});
    std::vector<GpuPlace>& places = island->places;
    if (std::find(places.begin(), places.end(), record.gpu) == places.end()) places.push_back(record.gpu);
    nodeOf.push_back(island->node);
  }
  return nodeOf;
}

std::string describeGpus(const std::vector<Record>& records, const std::vector<int>& nodeOf, std::uint64_t domain) {
  std::set<std::uint32_t> gpus;
  std::map<int, std::set<std::uint32_t>> gpusOf;  // by node
  std::map<int, std::size_t> begins;              // the first rank of a nodeId
  std::string why;
  for (std::size_t rank = 0; rank < records.size(); ++rank) {
    const Record& record = records[rank];
    if (record.domain != domain || record.gpu.gpu == 0) continue;
    gpus.insert(record.gpu.gpu);
    gpusOf[nodeOf[rank]].insert(record.gpu.gpu);
    begins.emplace(record.nodeId, rank);
    for (std::size_t other = 0; other < rank && why.empty(); ++other) {
      const Record& before = records[other];
      if (before.domain == domain && before.nodeId == record.nodeId && !shareMemory(before.gpu, record.gpu))
        why = whyApart(before.gpu, record.gpu);
    }
  }
  if (why.empty()) {
    // Given nodes are nobody's finding.
    if (gpus.size() < 2 || begins.size() > 1) return "";
    return "GPUs " + list(gpus) + " reach each other's memory: one node";
  }
  std::string text = "GPUs make " + std::to_string(gpusOf.size()) + " nodes of this machine (";
  bool first = true;
  for (const auto& [node, its] : gpusOf) {
    text += (std::exchange(first, false) ? "node " : "; node ") + std::to_string(node) + ": " + list(its);
  }
  return text + "): " + why + "; the host carries rows between nodes";
}

}  // namespace fusco::comm
