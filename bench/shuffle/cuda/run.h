// shuffle_perf --device cuda with all ranks in this process, on one GPU or several.
#pragma once

#include <string>
#include <vector>

#include "shuffle/options.h"

namespace fusco::bench::gpu {

// The program's exit code.
int run(const Options& options, const std::vector<std::string>& words);

}  // namespace fusco::bench::gpu
