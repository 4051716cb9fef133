// What a program has printed is there, or it is told.
#pragma once

#include <cstdio>
#include <stdexcept>

namespace fusco::bench {

// At a program's end. Throws std::runtime_error.
inline void requirePrinted() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    throw std::runtime_error("the rows could not be written to standard output; is the disk full?");
}

}  // namespace fusco::bench
