// Runs a command under a shell with a limit on its time. ctest has FUSCO_DEVICE=host for tests; here each says itself,
// and none sees a GPU: the doubles have none.
#pragma once

#include <sys/wait.h>

#include <cstdio>
#include <string>

#include "patience.h"

namespace fusco::test {

struct Result {
  int status = -1;
  std::string output;  // both streams
};

inline Result run(const std::string& settings, const std::string& command, int seconds = kCommandSeconds) {
  Result result;
  const std::string line = "env -u FUSCO_DEVICE CUDA_VISIBLE_DEVICES= " + settings + " timeout -k 2 " +
                           std::to_string(seconds) + " " + command + " 2>&1";
  FILE* const pipe = popen(line.c_str(), "r");
  if (pipe == nullptr) return result;
  char buffer[4096];
  for (std::size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) result.output.append(buffer, n);
  const int status = pclose(pipe);
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 255;
  return result;
}

}  // namespace fusco::test
