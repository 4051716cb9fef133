#include "shuffle/machine.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <fusco/fusco.h>
#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdlib>
#include <ctime>
#include <fstream>

#include "shuffle/stream.h"

namespace fusco::bench {
namespace {

// The value of the first line "key<separator>value" of a file.
std::string valueIn(const char* file, const std::string& key, char separator) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    if (line.rfind(key, 0) != 0) continue;
    std::size_t at = line.find(separator);
    if (at == std::string::npos) continue;
    std::size_t first = line.find_first_not_of(" \t\"", at + 1), last = line.find_last_not_of(" \t\"");
    return first == std::string::npos ? "" : line.substr(first, last - first + 1);
  }
  return "";
}

}  // namespace

Machine thisMachine() {
  Machine machine;
  utsname name{};
  uname(&name);
  machine.cpu = valueIn("/proc/cpuinfo", "model name", ':');
  if (machine.cpu.empty()) machine.cpu = name.machine;
  machine.kernel = fmt::format("{} {}", name.sysname, name.release);
  machine.host = name.nodename;
  machine.os = valueIn("/etc/os-release", "PRETTY_NAME", '=');
  cpu_set_t set;
  machine.cores =
      sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  machine.memoryGb = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e9;
  double load = 0;
  if (getloadavg(&load, 1) == 1) machine.load = load;
  machine.stores = storeName();
  return machine;
}

Versions versionsOf(const std::string& mpi) {
  int version = 0;
  fuscoGetVersion(&version);
#if defined(__clang__)
  std::string compiler = "clang " __clang_version__;
#else
  std::string compiler = "g++ " __VERSION__;
#endif
  return {fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100), compiler, mpi, ""};
}

std::string utcNow() { return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))); }

std::string commandLine(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : words) {
    bool plain = !word.empty() && word.find_first_of(" \t\"'$#*?|&;<>()") == std::string::npos;
    line += (line.empty() ? "" : " ") + (plain ? word : "'" + word + "'");
  }
  return line;
}

}  // namespace fusco::bench
