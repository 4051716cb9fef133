#include "house/includes.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>

#include "house/pattern.h"

namespace fusco::house {
namespace {

// What a room may include: prefixes of paths relative to src/ (or to include/ for the public header). Its own folder is
// always allowed.
const std::map<std::string, std::vector<std::string>>& allowed() {
  static const std::map<std::string, std::vector<std::string>> table = {
      {"base", {}},
      {"plan", {"base/"}},
      {"kernels", {"plan/layout.h"}},
      // bench/gpu measures kernels on plans that the host makes, and whole calls
      {"gpu", {"kernels/", "plan/", "base/", "fusco/"}},
      {"exec", {"base/", "plan/layout.h"}},
      {"transport", {"base/", "plan/layout.h"}},
      {"comm", {"base/", "plan/topology.h", "transport/"}},
      {"engine", {"base/", "plan/", "exec/", "transport/", "comm/"}},
      {"api", {"base/", "plan/", "exec/", "transport/", "comm/", "engine/", "fusco/"}},
      {"plugin", {"base/clock.h", "base/status.h", "base/thread.h", "fusco/"}},
      {"bench", {"fusco/"}},
      {"include", {"fusco/"}},
  };
  return table;
}

// Allowed in single files only.
const std::map<std::string, std::vector<std::string>>& exceptions() {
  static const std::map<std::string, std::vector<std::string>> table = {
      {"src/exec/cuda.h",
       {"kernels/across.h", "kernels/beside.h", "kernels/convert.h", "kernels/launch.h", "kernels/meet.h",
        "kernels/plan.h"}},
      {"src/exec/cuda_peer.h", {"kernels/transfer.h"}},
  };
  return table;
}

// Every folder that can be reached from src/ or include/ by name.
bool isOurs(const std::string& target) {
  static const char* const roots[] = {"base/",    "plan/",   "exec/",  "transport/", "comm/", "engine/", "api/",
                                      "kernels/", "plugin/", "bench/", "tests/",     "src/",  "fusco/"};
  return std::any_of(std::begin(roots), std::end(roots), [&](const char* root) { return target.starts_with(root); });
}

bool isForeignDevice(const std::string& target) {
  static const Pattern device(
      "(cuda|cuda_runtime|cuda_runtime_api|cuda_fp16|cuda_bf16|cuda_fp8|nccl|mpi|infiniband/.*|nvtx3/.*)"
      "(\\.h|\\.hpp)?");
  return device.isAll(target);
}

// Where headers of CUDA, NCCL, MPI and verbs may be named at all; everything else opens these libraries at run time.
bool mayNameDevices(const std::string& path) {
  return path.starts_with("kernels/") || path.starts_with("plugin/") || path == "src/exec/cuda.cc" ||
         path == "src/exec/cuda_calls.cc" || path == "src/exec/cuda_nic.cc" || path == "src/exec/cuda_peer.cc" ||
         path == "src/exec/cuda_virtual.cc" || path == "src/exec/ranges.cc" ||
         path.starts_with("src/transport/peer/") || path.starts_with("src/transport/verbs/") ||
         path.starts_with("bench/peers/") || path == "bench/shuffle/wire_verbs.cc" || path.starts_with("bench/gpu/") ||
         path.starts_with("bench/shuffle/cuda/") || path == "bench/moe_nccl/device_cuda.cu" ||
         path == "include/fusco/nccl.h";
}

}  // namespace

std::vector<Include> includesOf(const std::string& source) {
  static const Pattern pattern(R"rx(^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"])rx");
  std::vector<Include> found;
  std::istringstream lines(source);
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    const std::vector<std::string> groups = pattern.groupsIn(line);
    if (!groups.empty()) found.push_back({groups[1], groups[0] == "\"", number});
  }
  return found;
}

std::string roomOf(const std::string& path) {
  if (path == "src/api.cc") return "api";
  const std::size_t slash = path.find('/');
  if (slash == std::string::npos) return "";
  const std::string top = path.substr(0, slash);
  if (top != "src") return top;
  const std::size_t next = path.find('/', slash + 1);
  return next == std::string::npos ? "" : path.substr(slash + 1, next - slash - 1);
}

std::vector<std::string> checkIncludes(const std::string& path, const std::string& source) {
  std::vector<std::string> wrong;
  const std::string room = roomOf(path);
  auto rule = allowed().find(room);
  if (room == "bench") {
    // bench/plan, bench/exec and the like measure one room and look inside it as that room does.
    const auto inner = allowed().find(roomOf(path.substr(6)));
    if (inner != allowed().end()) rule = inner;
  }
  if (rule == allowed().end()) return {path + ": lies in no room that the table knows"};
  const auto exception = exceptions().find(path);
  for (const Include& include : includesOf(source)) {
    const auto begins = [&](const std::string& prefix) { return include.target.starts_with(prefix); };
    const auto complain = [&](const std::string& why) {
      wrong.push_back(path + ":" + std::to_string(include.line) + ": " + room + " may not include " + include.target +
                      why);
    };
    if (exception != exceptions().end() && std::any_of(exception->second.begin(), exception->second.end(), begins)) {
      continue;
    }
    if (include.target.find("..") != std::string::npos) {
      complain(": paths begin at src/");
    } else if (isForeignDevice(include.target)) {
      if (!mayNameDevices(path)) complain(": such libraries are opened at run time");
    } else if (isOurs(include.target)) {
      if (!begins(room + "/") && !begins(rule->first + "/") &&
          !std::any_of(rule->second.begin(), rule->second.end(), begins))
        complain("");
    }
  }
  return wrong;
}

std::vector<std::string> checkTree(const std::filesystem::path& root, int& files) {
  std::vector<std::string> wrong;
  files = 0;
  for (const std::string& path : repositoryFiles(root)) {
    static const Pattern ours("(src|kernels|plugin|bench|include)/.*\\.(c|cc|h|hpp|cu|cuh)");
    if (!ours.isAll(path)) continue;
    ++files;
    const auto found = checkIncludes(path, readFile(root / path));
    wrong.insert(wrong.end(), found.begin(), found.end());
  }
  return wrong;
}

std::string readFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> repositoryFiles(const std::filesystem::path& root) {
  std::vector<std::string> files;
  for (auto entry = std::filesystem::recursive_directory_iterator(root);
       entry != std::filesystem::recursive_directory_iterator(); ++entry) {
    const std::string name = entry->path().filename().string();
    if (entry->is_directory()) {
      const bool top = entry.depth() == 0;
      const bool hidden = top && name.starts_with(".") && name != ".ci";
      if (hidden || (top && name.starts_with("build")) || name == "__pycache__") entry.disable_recursion_pending();
    } else if (entry->is_regular_file()) {
      files.push_back(std::filesystem::relative(entry->path(), root).string());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace fusco::house
