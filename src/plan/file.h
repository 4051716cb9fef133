// A plan as a file: not the arena but what it was made of (routing map, topology, options, rank, what was exchanged),
// so that it can be replayed without any peer. Little-endian; a file from anywhere may be read: every length is
// checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iosfwd>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "plan/plan.h"

namespace fusco::plan {

struct PlanFile {
  Topology topology;
  int rank = 0;
  Options options;
  Exchanged exchanged;
  int idBytes = 8;
  std::int64_t tokens = 0;
  int topk = 0;
  int experts = 0;
  std::vector<std::byte> ids;  // tokens * topk * idBytes
  std::vector<float> weights;  // tokens * topk, or empty

  RoutingMap map() const;  // points into this
};

// Copies everything that a plan depends on. Throws Error when the shape makes no sense.
PlanFile record(const RoutingMap& map, const Topology& topology, int rank, const Options& options,
                const Exchanged& exchanged);

std::string encode(const PlanFile& file);
// Throws Error(invalidArgument) that says what is wrong with the bytes, and where.
PlanFile decode(std::string_view bytes);

// To and from a stream that the caller has opened in binary mode. Throw Error(systemError) when the stream fails.
void save(const PlanFile& file, std::ostream& stream);
PlanFile load(std::istream& stream);

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using OwnedArena = std::unique_ptr<void, FreeMemory>;

// Plans again: the arena is planEqual to the one that was recorded.
OwnedArena replay(const PlanFile& file);

}  // namespace fusco::plan
