// RDMA devices as the kernel shows them in /sys, and whether libibverbs can open them.
#include <dlfcn.h>
#include <fmt/format.h>
#include <sys/resource.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>

#include "doctor/report.h"

namespace fusco::bench::doctor {

namespace {

const std::string kDevices = "/sys/class/infiniband/";

// What libibverbs says of each device that it sees: "" where it can be opened.
std::map<std::string, std::string> openAll(std::string& missing) {
  std::map<std::string, std::string> devices;
  void* const library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    missing = dlerror();
    return devices;
  }
  const auto list = reinterpret_cast<void** (*)(int*)>(dlsym(library, "ibv_get_device_list"));
  const auto freeList = reinterpret_cast<void (*)(void**)>(dlsym(library, "ibv_free_device_list"));
  const auto name = reinterpret_cast<const char* (*)(void*)>(dlsym(library, "ibv_get_device_name"));
  const auto open = reinterpret_cast<void* (*)(void*)>(dlsym(library, "ibv_open_device"));
  const auto close = reinterpret_cast<int (*)(void*)>(dlsym(library, "ibv_close_device"));
  if (list == nullptr || freeList == nullptr || name == nullptr || open == nullptr || close == nullptr) {
    missing = "libibverbs.so.1 lacks functions";
    return devices;
  }
  int count = 0;
  void** const all = list(&count);
  for (int i = 0; all != nullptr && i < count; ++i) {
    errno = 0;
    void* const context = open(all[i]);
    devices[name(all[i])] = context != nullptr ? "" : errno != 0 ? std::strerror(errno) : "no reason given";
    if (context != nullptr) close(context);
  }
  if (all != nullptr) freeList(all);
  return devices;
}

bool isActive(const Report& report, const std::string& port) {
  return report.line(port + "/state").find("ACTIVE") != std::string::npos;
}

int routableAddresses(const Report& report, const std::string& port) {
  int count = 0;
  for (const std::string& index : report.names(port + "/gids")) {
    const std::string gid = report.line(port + "/gids/" + index);
    const bool empty = gid.find_first_not_of("0:") == std::string::npos;
    if (!empty && report.line(port + "/gid_attrs/types/" + index) == "RoCE v2") ++count;
  }
  return count;
}

void checkPort(Report& report, const std::string& device, const std::string& number) {
  const std::string port = kDevices + device + "/ports/" + number;
  const std::string check = "RDMA port", name = device + ":" + number;
  const std::string layer = report.line(port + "/link_layer"), rate = report.line(port + "/rate");
  if (!isActive(report, port)) {
    const std::string net = report.line(port + "/gid_attrs/ndevs/0");
    return report.warn(check, fmt::format("{} is not active: {}", name, report.line(port + "/state")),
                       layer == "Ethernet"
                           ? "ip link set dev " + (net.empty() ? "NAME" : net) + " up; look at the cable"
                           : "look at the cable, and whether a subnet manager runs");
  }
  if (layer != "Ethernet") return report.pass(check, fmt::format("{} is active, {}, {}", name, layer, rate));
  const int routable = routableAddresses(report, port);
  if (routable == 0) {
    return report.warn(
        check, name + " is active, but has no address for RoCE v2",
        "give its network interface an IP address; or FUSCO_IB_ROCE_VERSION_NUM=1 on one switched network");
  }
  report.pass(check, fmt::format("{} is active, RoCE, {}, {} addresses for RoCE v2", name, rate, routable));
}

void checkLockedMemory(Report& report, bool needed) {
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  if (limit.rlim_cur == RLIM_INFINITY) return report.pass("locked memory", "unlimited");
  const std::string found = fmt::format("{} KiB at most", limit.rlim_cur >> 10);
  if (!needed) return report.pass("locked memory", found + "; enough without RDMA");
  report.warn("locked memory", found + ": registered memory counts against it",
              "ulimit -l unlimited; for services LimitMEMLOCK=infinity, for containers --ulimit memlock=-1");
}

}  // namespace

bool hasActivePort(const Report& report) {
  if (setting("FUSCO_IB_DISABLE") == "1") return false;
  for (const std::string& device : report.names(kDevices)) {
    for (const std::string& port : report.names(kDevices + device + "/ports")) {
      if (isActive(report, kDevices + device + "/ports/" + port)) return true;
    }
  }
  return false;
}

void checkRdma(Report& report) {
  const std::vector<std::string> devices = report.names(kDevices);
  checkLockedMemory(report, !devices.empty());
  if (devices.empty()) return report.pass("RDMA", "no devices: between machines TCP is used");
  if (setting("FUSCO_IB_DISABLE") == "1") return report.pass("RDMA", "switched off (FUSCO_IB_DISABLE=1)");
  std::string missing;
  const auto opened = openAll(missing);
  if (!missing.empty()) {
    return report.fail("RDMA", "there are devices, and libibverbs cannot be opened: " + missing,
                       "apt-get install libibverbs1 ibverbs-providers");
  }
  for (const std::string& device : devices) {
    const auto seen = opened.find(device);
    if (seen == opened.end()) {
      report.fail("RDMA device", device + " is not seen by libibverbs",
                  "apt-get install ibverbs-providers; give the container /dev/infiniband");
    } else if (!seen->second.empty()) {
      report.fail("RDMA device", device + " cannot be opened: " + seen->second,
                  "give this user, or the container, /dev/infiniband/uverbs*");
    } else {
      report.pass("RDMA device", device + " can be opened");
    }
    for (const std::string& port : report.names(kDevices + device + "/ports")) checkPort(report, device, port);
  }
  checkGpuMemory(report);
}

}  // namespace fusco::bench::doctor
