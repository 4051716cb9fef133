// The wire alone: what crosses between nodes, and nothing else, over TCP on the loopback interface.
#pragma once

#include <memory>

#include "shuffle/implementation.h"

namespace fusco::bench {

// Every rank sends as many bytes to every rank of another node as a shuffle with one copy a token and node has for it,
// from one piece of memory into another, and gets as many. Called by all ranks of the group together.
std::unique_ptr<Implementation> makeWire(const CaseContext& context);

}  // namespace fusco::bench
