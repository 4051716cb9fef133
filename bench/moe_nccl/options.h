// What the user asked for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fusco::bench::moe {

struct Options {
  std::string device = "host";
  int ranks = 2;
  std::int64_t tokens = 1024;  // of each rank
  std::int64_t hidden = 2048;
  int topk = 8, experts = 64;
  bool topkGiven = false, expertsGiven = false;
  int inner = 32;  // of an expert; 0: an expert only scales its rows
  std::string routing = "uniform";
  std::vector<std::string> states{"unchanged", "indexed", "shuffle"};
  std::uint64_t seed = 1;
  int warmup = 2, iterations = 5, rounds = 5;
  int timeoutSeconds = 120;
  std::string corrupt;  // tests only: the state whose output gets one wrong byte
};

// Prints help and errors by itself. True: go on; else leave with *exitCode.
bool parseOptions(int count, char** arguments, Options& options, int* exitCode);

}  // namespace fusco::bench::moe
