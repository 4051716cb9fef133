// A plan in words, for people, and in JSON, for programs.
#pragma once

#include <cstdint>
#include <string>

namespace fusco::plan {

const char* layoutName(std::uint32_t layout);  // "expert order", "rank order", "slotted"
const char* dedupName(std::uint32_t dedup);    // "none", "node", "full"

// A summary, the flows, and the first `mostCopies` copies of each flow with their entries.
std::string printText(const void* arena, std::int64_t mostCopies = 4);

// All of it. An entry is [local rank, slot, row, weight, duplicate].
std::string printJson(const void* arena);

}  // namespace fusco::plan
