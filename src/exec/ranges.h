// Named ranges of time for NVIDIA's profilers (NVTX), in a domain "FUSCO". They cost a look at a pointer while no
// profiler is attached, and nothing in a build where the toolkit's nvtx3 was not found.
#pragma once

namespace fusco::exec {

// Whether this build has them.
bool rangesBuilt();

// What this thread does in a scope. The name must outlive it.
class Range {
 public:
  explicit Range(const char* name);
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace fusco::exec
