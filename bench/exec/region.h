// Memory of the kinds that ranks use, touched once so that no page fault falls into a timing.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fusco::bench {

struct Region {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  double touchMs = 0;         // what mapping and touching it cost
  std::size_t hugeBytes = 0;  // of it in huge pages
  std::string error;          // why there is none
};

// private: anonymous without huge pages; private-huge: with MADV_HUGEPAGE; memfd: MAP_SHARED; memfd-huge: with
// MADV_HUGEPAGE; memfd-collapsed: touched, then MADV_COLLAPSE; memfd-hugetlb: of reserved huge pages.
std::vector<std::string> memoryKinds();
Region makeRegion(const std::string& kind, std::size_t bytes);
void freeRegion(Region& region);

}  // namespace fusco::bench
