#include "transport/verbs/choice.h"

#include <arpa/inet.h>

#include <algorithm>
#include <charconv>
#include <tuple>

#include "base/status.h"

namespace fusco::transport {

// ---- devices

HcaFilter::HcaFilter(std::string_view text) {
  for (; !text.empty() && (text.front() == '^' || text.front() == '='); text.remove_prefix(1)) {
    (text.front() == '^' ? exclude_ : exact_) = true;
  }
  while (!text.empty()) {
    const std::size_t comma = std::min(text.find(','), text.size());
    std::string_view name = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    int port = -1;
    if (const std::size_t colon = name.find(':'); colon != std::string_view::npos) {
      const std::string_view number = name.substr(colon + 1);
      const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), port);
      if (error != std::errc() || end != number.data() + number.size()) port = -1;
      name = name.substr(0, colon);
    }
    if (!name.empty()) items_.push_back({std::string(name), port});
  }
}

bool HcaFilter::matches(const Item& item, std::string_view device, int port) const {
  const bool named = exact_ ? device == item.name : device.starts_with(item.name);
  return named && (item.port < 0 || item.port == port);
}

bool HcaFilter::takes(std::string_view device, int port) const {
  if (items_.empty()) return true;
  const bool listed =
      std::any_of(items_.begin(), items_.end(), [&](const Item& item) { return matches(item, device, port); });
  return listed != exclude_;
}

int HcaFilter::rankOf(std::string_view device, int port) const {
  if (exclude_) return 0;
  for (std::size_t i = 0; i < items_.size(); ++i) {
    if (matches(items_[i], device, port)) return static_cast<int>(i);
  }
  return static_cast<int>(items_.size());
}

// ---- addresses

bool GidEntry::empty() const {
  return std::all_of(gid.begin() + 8, gid.end(), [](std::uint8_t byte) { return byte == 0; });
}

bool GidEntry::ipv4() const {
  return std::all_of(gid.begin(), gid.begin() + 10, [](std::uint8_t byte) { return byte == 0; }) && gid[10] == 0xff &&
         gid[11] == 0xff;
}

bool GidEntry::linkLocal() const { return gid[0] == 0xfe && (gid[1] & 0xc0) == 0x80; }

std::string textOfGid(const GidBytes& gid) {
  char text[INET6_ADDRSTRLEN] = "";
  const bool mapped = GidEntry{0, gid, 0, {}}.ipv4();
  if (mapped) {
    ::inet_ntop(AF_INET, gid.data() + 12, text, sizeof(text));
  } else {
    ::inet_ntop(AF_INET6, gid.data(), text, sizeof(text));
  }
  return text;
}

std::string GidEntry::describe() const {
  std::string text = std::to_string(index) + ": " + textOfGid(gid);
  if (roceVersion > 0) text += " RoCE v" + std::to_string(roceVersion);
  if (!interface.empty()) text += " on " + interface;
  return text;
}

bool gidInRange(const GidEntry& entry, const std::string& range) {
  const std::size_t slash = range.find('/');
  const std::string prefix = range.substr(0, slash);
  std::uint8_t bytes[16] = {};
  const bool four = ::inet_pton(AF_INET, prefix.c_str(), bytes) == 1;
  const bool six = !four && ::inet_pton(AF_INET6, prefix.c_str(), bytes) == 1;
  const int all = four ? 32 : 128;
  int length = all;
  if (slash != std::string::npos) {
    const char* begin = range.data() + slash + 1;
    const auto [end, error] = std::from_chars(begin, range.data() + range.size(), length);
    if (error != std::errc() || end != range.data() + range.size()) length = -1;
  }
  if ((!four && !six) || length < 0 || length > all) {
    fail(Code::invalidArgument,
         "FUSCO_IB_ADDR_RANGE=" + range + " is no range of addresses; write it as 10.1.0.0/16 or fd00::/8");
  }
  if (entry.ipv4() != four) return false;
  const std::uint8_t* address = entry.gid.data() + (four ? 12 : 0);
  for (int bit = 0; bit < length; ++bit) {
    const int mask = 0x80 >> (bit % 8);
    if ((address[bit / 8] & mask) != (bytes[bit / 8] & mask)) return false;
  }
  return true;
}

GidChoice chooseGid(std::span<const GidEntry> entries, const GidWish& wish, bool roce) {
  std::string list;
  for (const GidEntry& entry : entries) {
    if (!entry.empty()) list += (list.empty() ? "" : ", ") + entry.describe();
  }
  if (list.empty()) list = "none that is set";
  if (wish.index >= 0) {
    for (const GidEntry& entry : entries) {
      if (entry.index == wish.index && !entry.empty()) {
        return {entry.index, "GID " + entry.describe() + ", as FUSCO_IB_GID_INDEX says"};
      }
    }
    return {-1, "FUSCO_IB_GID_INDEX=" + std::to_string(wish.index) + " names no GID that is set; there are: " + list};
  }
  const GidEntry* best = nullptr;
  const auto score = [&](const GidEntry& entry) {
    return std::tuple(!roce || entry.roceVersion == wish.roceVersion, entry.ipv4() == (wish.family == 4),
                      !entry.linkLocal());
  };
  for (const GidEntry& entry : entries) {
    if (entry.empty() || (roce && !wish.range.empty() && !gidInRange(entry, wish.range))) continue;
    if (best == nullptr || (roce && score(entry) > score(*best))) best = &entry;
  }
  if (best == nullptr) {
    return {-1, "no GID of it can be used" + (wish.range.empty() ? "" : " in FUSCO_IB_ADDR_RANGE=" + wish.range) +
                    "; there are: " + list};
  }
  return {best->index, "GID " + best->describe() + ", of: " + list};
}

}  // namespace fusco::transport
