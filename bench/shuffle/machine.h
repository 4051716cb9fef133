// Where and with what a result was taken.
#pragma once

#include <string>
#include <vector>

namespace fusco::bench {

struct Machine {
  std::string cpu, kernel, os, host;
  int cores = 0;  // that this program may use
  double memoryGb = 0;
  double load = 0;     // runnable tasks of the last minute, before the benchmark began
  std::string stores;  // of the limit: avx512, avx2, plain
  // With --device cuda.
  std::string gpu, driver;
  int gpus = 0;
};
Machine thisMachine();

struct Versions {
  std::string library, compiler, mpi;  // mpi: empty if no peer ran
  std::string nccl;                    // empty if it did not run
};
Versions versionsOf(const std::string& mpi);

std::string utcNow();
// Words as one would type them.
std::string commandLine(const std::vector<std::string>& words);

}  // namespace fusco::bench
