// What a user reads.
#pragma once

#include <string>
#include <vector>

#include "shuffle/machine.h"
#include "shuffle/measure.h"

namespace fusco::bench {

struct Header {
  Machine machine;
  Versions versions;
  std::string command, date, peerCommand;
  std::string routingRemark;
  int topk = 0, experts = 0;         // of the routing, which may come from a file
  std::vector<std::string> missing;  // "impl: reason"
};

void printHeader(const Options& options, const Header& header);
void printRows(const Options& options, const CaseResult& result);
// Counts rows that were wrong; true if all is well.
void printEnd(const Options& options, std::size_t rows, std::uint64_t wrongRows, bool failed);

}  // namespace fusco::bench
