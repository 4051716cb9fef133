#include "transport/tcp/address.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstring>
#include <memory>

#include "base/environment.h"
#include "base/log.h"
#include "base/status.h"

namespace fusco::transport {

namespace {

// The choices of FUSCO_SOCKET_FAMILY in the order of the table: any, AF_INET, AF_INET6.
constexpr int kFamilies[] = {0, 4, 6};

bool isLinkLocal(const Address& address) {
  if (address.family == 4) return address.bytes[0] == 169 && address.bytes[1] == 254;
  return address.bytes[0] == 0xfe && (address.bytes[1] & 0xc0) == 0x80;
}

int preference(const Interface& one) {
  if (one.loopback) return 2;
  for (const char* prefix : {"docker", "virbr", "br-", "veth", "cni", "flannel"}) {
    if (one.name.starts_with(prefix)) return 1;
  }
  return 0;
}

}  // namespace

std::string textOf(const Address& address) {
  if (!address) return "no address";
  char text[INET6_ADDRSTRLEN] = {};
  ::inet_ntop(address.family == 4 ? AF_INET : AF_INET6, address.bytes, text, sizeof(text));
  const std::string host = address.family == 4 ? text : "[" + std::string(text) + "]";
  return host + ":" + std::to_string(address.port);
}

socklen_t toSocketAddress(const Address& address, sockaddr_storage* storage) {
  std::memset(storage, 0, sizeof(*storage));
  if (address.family == 4) {
    auto* v4 = reinterpret_cast<sockaddr_in*>(storage);
    v4->sin_family = AF_INET;
    v4->sin_port = htons(address.port);
    std::memcpy(&v4->sin_addr, address.bytes, 4);
    return sizeof(*v4);
  }
  auto* v6 = reinterpret_cast<sockaddr_in6*>(storage);
  v6->sin6_family = AF_INET6;
  v6->sin6_port = htons(address.port);
  std::memcpy(&v6->sin6_addr, address.bytes, 16);
  return sizeof(*v6);
}

Address fromSocketAddress(const sockaddr* address) {
  Address result;
  if (address == nullptr) return result;
  if (address->sa_family == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(address);
    result.family = 4;
    result.port = ntohs(v4->sin_port);
    std::memcpy(result.bytes, &v4->sin_addr, 4);
  } else if (address->sa_family == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(address);
    result.family = 6;
    result.port = ntohs(v6->sin6_port);
    std::memcpy(result.bytes, &v6->sin6_addr, 16);
  }
  return result;
}

Address resolve(const std::string& hostAndPort, int family) {
  const auto refuse = [&](const std::string& why) {
    fail(Code::invalidArgument, "'" + hostAndPort + "' is no address: " + why + "; give host:port or [IPv6]:port");
  };
  const std::size_t colon = hostAndPort.rfind(':');
  if (colon == std::string::npos || colon == 0) refuse("it has no port");
  std::string host = hostAndPort.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  std::uint16_t port = 0;
  const char* end = hostAndPort.data() + hostAndPort.size();
  const auto [last, error] = std::from_chars(hostAndPort.data() + colon + 1, end, port);
  if (error != std::errc() || last != end || port == 0) refuse("its port is no number from 1 to 65535");
  addrinfo hints{};
  hints.ai_family = family == 4 ? AF_INET : family == 6 ? AF_INET6 : AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int problem = ::getaddrinfo(host.c_str(), nullptr, &hints, &found); problem != 0) {
    refuse(::gai_strerror(problem));
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, &::freeaddrinfo);
  Address address;
  bool linkLocal = false;
  for (const addrinfo* one = found; one != nullptr && !address; one = one->ai_next) {
    address = fromSocketAddress(one->ai_addr);
    if (address.family != 6 || !isLinkLocal(address)) continue;
    linkLocal = true;
    address = {};
  }
  if (linkLocal && !address) refuse("a link-local address means something else on each interface of each host");
  if (!address) refuse("it is neither IPv4 nor IPv6");
  address.port = port;
  return address;
}

bool meansOnlyItself(const std::string& hostAndPort, const Address& resolved) {
  static constexpr std::uint8_t kLoopback[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
  const bool itself =
      resolved.family == 4 ? resolved.bytes[0] == 127 : std::memcmp(resolved.bytes, kLoopback, sizeof(kLoopback)) == 0;
  const std::string host = hostAndPort.substr(0, hostAndPort.rfind(':'));
  in6_addr number;
  return itself && host.find("localhost") == std::string::npos && host.find("loopback") == std::string::npos &&
         host.find(':') == std::string::npos && ::inet_pton(AF_INET, host.c_str(), &number) != 1;
}

std::vector<Interface> listInterfaces(int family) {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) failErrno("cannot list the network interfaces");
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(list, &::freeifaddrs);
  std::vector<Interface> interfaces;
  // IPv4 first, unless only the other is wanted.
  for (const int wanted : {4, 6}) {
    if (family != 0 && family != wanted) continue;
    for (const ifaddrs* one = list; one != nullptr; one = one->ifa_next) {
      const Address address = fromSocketAddress(one->ifa_addr);
      if (address.family != wanted || (one->ifa_flags & IFF_UP) == 0 || isLinkLocal(address)) continue;
      const auto same = [&](const Interface& other) { return other.name == one->ifa_name; };
      if (std::any_of(interfaces.begin(), interfaces.end(), same)) continue;
      interfaces.push_back({one->ifa_name, address, (one->ifa_flags & IFF_LOOPBACK) != 0});
    }
  }
  return interfaces;
}

std::vector<Interface> chooseInterfaces(const std::vector<Interface>& all, const std::string& names) {
  std::vector<Interface> chosen;
  if (names.empty()) {
    chosen = all;
    std::stable_sort(chosen.begin(), chosen.end(),
                     [](const Interface& a, const Interface& b) { return preference(a) < preference(b); });
    return chosen;
  }
  std::string list = names;
  const bool allBut = list.front() == '^';
  if (allBut) list.erase(0, 1);
  const bool exactly = !list.empty() && list.front() == '=';
  if (exactly) list.erase(0, 1);
  std::vector<std::string> patterns;
  for (std::size_t at = 0; at <= list.size();) {
    const std::size_t comma = std::min(list.find(',', at), list.size());
    if (comma > at) patterns.push_back(list.substr(at, comma - at));
    at = comma + 1;
  }
  const auto matches = [&](const Interface& one, const std::string& pattern) {
    return exactly ? one.name == pattern : one.name.starts_with(pattern);
  };
  if (allBut) {
    for (const Interface& one : all) {
      const auto named = [&](const std::string& pattern) { return matches(one, pattern); };
      if (std::none_of(patterns.begin(), patterns.end(), named)) chosen.push_back(one);
    }
    return chooseInterfaces(chosen, "");
  }
  for (const std::string& pattern : patterns) {
    for (const Interface& one : all) {
      const auto same = [&](const Interface& other) { return other.name == one.name; };
      if (matches(one, pattern) && std::none_of(chosen.begin(), chosen.end(), same)) chosen.push_back(one);
    }
  }
  return chosen;
}

std::vector<Interface> usableInterfaces() {
  const Environment& settings = environment();
  const std::string& names = settings.text(Setting::socketInterfaces);
  const std::vector<Interface> all = listInterfaces(kFamilies[settings.number(Setting::socketFamily)]);
  std::vector<Interface> chosen = chooseInterfaces(all, names);
  if (!chosen.empty()) return chosen;
  std::string there;
  for (const Interface& one : all) there += (there.empty() ? "" : ", ") + one.name;
  const std::string text =
      (names.empty() ? "no network interface is up" : "FUSCO_SOCKET_IFNAME=" + names + " names no interface") +
      " with an address of FUSCO_SOCKET_FAMILY=" + settings.text(Setting::socketFamily) + "; there " +
      (there.empty() ? "is none" : "are " + there);
  // Who asks may do without a network, and does. A name that fits nothing is a mistake all the same.
  static std::atomic<bool> told{false};
  if (!names.empty() && !told.exchange(true)) FUSCO_WARN("{}", text);
  fail(Code::invalidUsage, text);
}

}  // namespace fusco::transport
