// Who may include whom: the table of docs/design.md, and a checker for it.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace fusco::house {

// One #include "..." or <...> of a file.
struct Include {
  std::string target;
  bool quoted;
  int line;
};
std::vector<Include> includesOf(const std::string& source);

// The room of a file, by its path from the root: "plan" for src/plan/x.cc, "kernels", "plugin", "bench"; "" for none.
std::string roomOf(const std::string& path);

// What is wrong with the includes of a file, a line for each: "path:line: ...".
std::vector<std::string> checkIncludes(const std::string& path, const std::string& source);

// The same for every C, C++ and CUDA file below src, kernels, plugin, bench and include. `files` tells how many were
// read.
std::vector<std::string> checkTree(const std::filesystem::path& root, int& files);

std::string readFile(const std::filesystem::path& path);
// Every file of the repository (build folders and version control left out), by path from the root.
std::vector<std::string> repositoryFiles(const std::filesystem::path& root);

}  // namespace fusco::house
