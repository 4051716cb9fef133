// Which ranks form a node. Pure: all ranks compute the same from the same records.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "comm/record.h"

namespace fusco::comm {

// Ranks share a node if they have a domain and a nodeId in common and their GPUs reach each other's memory. In rank
// order each joins the first node of its domain and nodeId all of whose GPUs reach its GPU and are reached by it, as
// either rank sees it, else it begins a new one. Nodes are numbered as they begin. Some of a node's ranks, and no
// others, form a node again, in whatever order.
std::vector<int> nodesOf(const std::vector<Record>& records);

// In words what GPUs have to do with the nodes of a domain: which of them reach each other, or which make which nodes
// and why; "" where there is nothing to say.
std::string describeGpus(const std::vector<Record>& records, const std::vector<int>& nodeOf, std::uint64_t domain);

}  // namespace fusco::comm
