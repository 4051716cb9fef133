#include <arpa/inet.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>

#include <cstring>
#include <map>

#include "doctor/report.h"

namespace fusco::bench::doctor {

namespace {

std::string textOf(const sockaddr* address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address->sa_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, text, sizeof text);
  } else if (address->sa_family == AF_INET6) {
    const auto& six = reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr;
    if (!IN6_IS_ADDR_LINKLOCAL(&six)) inet_ntop(AF_INET6, &six, text, sizeof text);
  }
  return text;
}

}  // namespace

void checkNetwork(Report& report) {
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) {
    return report.fail("network", fmt::format("the interfaces cannot be listed: {}", std::strerror(errno)),
                       "allow netlink sockets in the container");
  }
  std::map<std::string, std::string> up;
  for (const ifaddrs* one = all; one != nullptr; one = one->ifa_next) {
    const unsigned wanted = IFF_UP | IFF_RUNNING;
    if (one->ifa_addr == nullptr || (one->ifa_flags & wanted) != wanted || (one->ifa_flags & IFF_LOOPBACK) != 0)
      continue;
    const std::string address = textOf(one->ifa_addr);
    if (!address.empty()) up[one->ifa_name] += " " + address;
  }
  freeifaddrs(all);
  if (up.empty()) {
    return report.warn("network", "no interface but loopback is up: no ranks of other machines",
                       "ip link set dev NAME up, and give it an address");
  }
  std::string found;
  for (const auto& [name, addresses] : up) {
    const std::string speed = report.line("/sys/class/net/" + name + "/speed");
    found += (found.empty() ? "" : ", ") + name + addresses;
    if (!speed.empty() && speed[0] != '-') found += " (" + speed + " Mb/s)";
  }
  const std::string chosen = setting("FUSCO_SOCKET_IFNAME");
  report.pass("network", found + (chosen.empty() ? "" : "; FUSCO_SOCKET_IFNAME=" + chosen));
}

}  // namespace fusco::bench::doctor
