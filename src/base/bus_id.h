// Where a device sits on the machine's PCI bus, as one number that is the same in every process of the machine.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace fusco {

// Never 0. Of domains 16 bits are kept: those that firmware numbers have no more.
constexpr std::uint32_t busId(unsigned domain, unsigned bus, unsigned device) {
  constexpr unsigned kSome = 7;  // a function that no GPU has
  return domain << 16 | (bus & 0xff) << 8 | (device & 0x1f) << 3 | kSome;
}

// As lspci and nvidia-smi write it: 0000:1b:00.0.
inline std::string busIdText(std::uint32_t id) {
  char text[16];
  std::snprintf(text, sizeof text, "%04x:%02x:%02x.0", id >> 16, id >> 8 & 0xff, id >> 3 & 0x1f);
  return text;
}

}  // namespace fusco
