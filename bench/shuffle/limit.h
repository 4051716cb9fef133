// What this machine's memory allows: the same rows moved in one pass, with nothing to plan and nobody to wait for.
#pragma once

#include <memory>

#include "shuffle/implementation.h"

namespace fusco::bench {

// "limit-nt" and "limit-plain": every row read once in source order and written to all its places (combine: its rows
// read and summed, one written), by non-temporal or plain stores. "fill": as many bytes as the limit writes,
// non-temporal, each rank into its own memory of the same kind.
std::unique_ptr<Implementation> makeLimit(const std::string& name, const CaseContext& context);
bool isLimit(const std::string& name);

}  // namespace fusco::bench
