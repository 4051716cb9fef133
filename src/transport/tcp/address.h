// IP addresses as plain data, and which of this host's interfaces to use.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace fusco::transport {

// Travels in ids and records by value.
struct Address {
  std::uint8_t family = 0;  // 0: none, 4, 6
  std::uint8_t reserved = 0;
  std::uint16_t port = 0;  // host order
  std::uint8_t bytes[16] = {};

  explicit operator bool() const { return family != 0; }
  bool operator==(const Address&) const = default;
};
static_assert(sizeof(Address) == 20 && std::is_trivially_copyable_v<Address>);

std::string textOf(const Address& address);  // 10.0.0.1:4711, [fd00::1]:4711

socklen_t toSocketAddress(const Address& address, sockaddr_storage* storage);
Address fromSocketAddress(const sockaddr* address);

// "host:port", "10.0.0.1:port", "[fd00::1]:port"; asks the resolver. `family`: 0 for either, 4 or 6. Of IPv6 none that
// is link-local. Throws Error(invalidArgument) that names the text.
Address resolve(const std::string& hostAndPort, int family = 0);

// Whether the name of a host was resolved to an address by which only that host reaches itself, as /etc/hosts often has
// it for its own name; "localhost" and addresses mean what they say.
bool meansOnlyItself(const std::string& hostAndPort, const Address& resolved);

struct Interface {
  std::string name;
  Address address;  // port 0
  bool loopback = false;
};

// This host's interfaces that are up and have an address of the family, one entry each; link-local ones left out.
std::vector<Interface> listInterfaces(int family = 0);

// Those of `all` that `names` takes, in the order of `names`: prefixes "eth,ib"; "=eth0" exactly; "^docker" all but
// these. Empty names: all, the real ones first, then bridges of containers and virtual machines, then loopback.
std::vector<Interface> chooseInterfaces(const std::vector<Interface>& all, const std::string& names);

// The same for this process: its settings, never empty. Throws Error(invalidUsage) that names what there is.
std::vector<Interface> usableInterfaces();

}  // namespace fusco::transport
