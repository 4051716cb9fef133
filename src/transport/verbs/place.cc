#include "transport/verbs/place.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <filesystem>
#include <fstream>

namespace fusco::transport {

namespace {

namespace fs = std::filesystem;

std::string lineOf(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

bool parse(const std::string& text, int* number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *number);
  return error == std::errc() && end == text.data() + text.size();
}

// "0-3,8,10-11"
bool listHas(const std::string& list, int core) {
  for (std::size_t at = 0; at < list.size();) {
    const std::size_t comma = std::min(list.find(',', at), list.size());
    const std::string part = list.substr(at, comma - at);
    const std::size_t dash = part.find('-');
    int first = 0, last = 0;
    if (parse(part.substr(0, dash), &first) && (dash == std::string::npos || parse(part.substr(dash + 1), &last))) {
      if (dash == std::string::npos) last = first;
      if (core >= first && core <= last) return true;
    }
    at = comma + 1;
  }
  return false;
}

}  // namespace

Place placeOfFolder(const std::string& root, const std::string& folder) {
  Place place;
  std::error_code error;
  const fs::path real = fs::canonical(root + folder, error);
  if (error) return place;
  for (const fs::path& part : real) {
    const std::string name = part.string();
    const bool bridge = name.starts_with("pci") && name.find(':') != std::string::npos;
    const bool function = !place.way.empty() && std::count(name.begin(), name.end(), ':') == 2;
    if (bridge || function) place.way.push_back(name);
  }
  if (!parse(lineOf(real / "numa_node"), &place.numa)) place.numa = -1;
  return place;
}

Place placeOfPci(const std::string& root, const std::string& address) {
  std::string lower = address;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  // The CUDA driver writes eight digits of the domain.
  if (lower.find(':') == 8) lower.erase(0, 4);
  return placeOfFolder(root, "/bus/pci/devices/" + lower);
}

Place placeOfCores(const std::string& root, std::span<const int> cores) {
  Place place;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(root + "/devices/system/node", error)) {
    const std::string name = entry.path().filename();
    int node = -1;
    if (!name.starts_with("node") || !parse(name.substr(4), &node)) continue;
    const std::string list = lineOf(entry.path() / "cpulist");
    if (!std::any_of(cores.begin(), cores.end(), [&](int core) { return listHas(list, core); })) continue;
    // On several nodes a thread is near to none of them.
    if (place.numa >= 0) return {};
    place.numa = node;
  }
  return place;
}

Nearness nearness(const Place& a, const Place& b) {
  std::size_t common = 0;
  while (common < std::min(a.way.size(), b.way.size()) && a.way[common] == b.way[common]) ++common;
  // The host bridge and one of its ports lead to a switch; below, a function each.
  if (common >= 2) {
    const bool siblings = common + 1 >= a.way.size() && common + 1 >= b.way.size();
    // A switch is an upward port, and a downward port for each device.
    const bool oneSwitch = common + 2 >= a.way.size() && common + 2 >= b.way.size();
    return siblings || oneSwitch ? Nearness::bridge : Nearness::bridges;
  }
  if (common == 1) return Nearness::hostBridge;
  return a.numa >= 0 && a.numa == b.numa ? Nearness::numaNode : Nearness::system;
}

const char* nameOf(Nearness nearness) {
  switch (nearness) {
    case Nearness::bridge:
      return "PIX";
    case Nearness::bridges:
      return "PXB";
    case Nearness::hostBridge:
      return "PHB";
    case Nearness::numaNode:
      return "NODE";
    case Nearness::system:
      return "SYS";
  }
  return "?";
}

std::vector<int> nearest(const Place& place, std::span<const Place> others) {
  Nearness least = Nearness::system;
  for (const Place& other : others) least = std::min(least, nearness(place, other));
  std::vector<int> best;
  for (std::size_t i = 0; i < others.size(); ++i) {
    if (nearness(place, others[i]) == least) best.push_back(static_cast<int>(i));
  }
  return best;
}

}  // namespace fusco::transport
