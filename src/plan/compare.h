// Are two plans the same, and if not, where do they part?
#pragma once

#include <string>

namespace fusco::plan {

// Header and used ranges byte for byte; what a capacity leaves unused is not looked at. Both are arenas.
bool planEqual(const void* a, const void* b);

// The first difference in words, for a person; empty when planEqual.
std::string firstDifference(const void* a, const void* b);

}  // namespace fusco::plan
