// Which RDMA ports are near to a rank: pure functions of what sysfs says, under a root that tests make up.
#pragma once

#include <span>
#include <string>
#include <vector>

namespace fusco::transport {

// Where something is attached: its way down from the host bridge, "pci0000:16", "0000:16:01.0", ..., empty for what has
// none (cores, devices in software), and the processors' NUMA node, -1 where there is none or more than one.
struct Place {
  std::vector<std::string> way;
  int numa = -1;
};

// Of a device's folder in sysfs ("/class/infiniband/mlx5_0/device" under the root), or of a PCI address.
Place placeOfFolder(const std::string& root, const std::string& folder);
Place placeOfPci(const std::string& root, const std::string& address);
// Of the processors that a thread may run on.
Place placeOfCores(const std::string& root, std::span<const int> cores);

// The worse, the larger. As NCCL tells them apart: PIX, PXB, PHB, NODE, SYS.
enum class Nearness { bridge, bridges, hostBridge, numaNode, system };
Nearness nearness(const Place& a, const Place& b);
const char* nameOf(Nearness nearness);

// The nearest of `others`, as numbers; all of them where none is nearer than another one.
std::vector<int> nearest(const Place& place, std::span<const Place> others);

}  // namespace fusco::transport
