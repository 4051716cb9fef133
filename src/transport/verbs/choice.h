// Which ports and which of a port's addresses (GIDs) are used: pure functions of the settings and of what a host has,
// so that they can be tested without a device.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fusco::transport {

// FUSCO_IB_HCA: a list of names with an optional port, "mlx5_0:1,mlx5_2". Names are prefixes; with = in front, whole
// names; with ^, all but these.
class HcaFilter {
 public:
  explicit HcaFilter(std::string_view text);
  bool takes(std::string_view device, int port) const;
  // By the list's order, so that lanes can be given out by it; by the order of the devices where there is no list.
  int rankOf(std::string_view device, int port) const;

 private:
  struct Item {
    std::string name;
    int port;  // -1: any
  };
  bool matches(const Item& item, std::string_view device, int port) const;
  std::vector<Item> items_;
  bool exact_ = false;
  bool exclude_ = false;
};

using GidBytes = std::array<std::uint8_t, 16>;

struct GidEntry {
  int index = 0;
  GidBytes gid{};
  int roceVersion = 0;  // 1 or 2; 0: no RoCE
  std::string interface;

  bool empty() const;
  bool ipv4() const;       // an IPv4 address within
  bool linkLocal() const;  // not routable
  std::string describe() const;
};

struct GidWish {
  int index = -1;  // -1: choose
  int roceVersion = 2;
  int family = 4;     // 4 or 6
  std::string range;  // "10.1.0.0/16"; empty: any
};

struct GidChoice {
  int index = -1;   // -1: there is none
  std::string why;  // how it came about, or what was looked at
};

// Of a port's readable entries. Without a wish for an index: in the range, of the wanted version and family, routable;
// what is lacking of these is given up in the opposite order, but for the range.
GidChoice chooseGid(std::span<const GidEntry> entries, const GidWish& wish, bool roce);

// Whether an address lies in a range as settings write it. Throws Error(invalidArgument) for what is no range.
bool gidInRange(const GidEntry& entry, const std::string& range);

std::string textOfGid(const GidBytes& gid);

}  // namespace fusco::transport
