// Which RDMA ports are near to a rank, on machines that are made up as a folder.
#include "transport/verbs/place.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace fusco::transport {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;

// Two sockets. On the first a switch with two GPUs and a NIC, and another NIC at a port of its own below the same host
// bridge; on the second a switch with a GPU and two NICs behind a second switch.
class Machine : public ::testing::Test {
 protected:
  Machine() {
    char name[] = "/tmp/fusco-sysfs-XXXXXX";
    root_ = ::mkdtemp(name);
    const std::string one = "pci0000:16/0000:16:01.0/0000:17:00.0/";
    device(one + "0000:18:00.0/0000:19:00.0", 0);
    device(one + "0000:18:01.0/0000:1a:00.0", 0);
    nic(one + "0000:18:02.0/0000:1b:00.0", 0, "mlx5_0");
    nic("pci0000:16/0000:16:03.0/0000:1d:00.0", 0, "mlx5_1");
    const std::string two = "pci0000:b0/0000:b0:01.0/0000:b1:00.0/";
    device(two + "0000:b2:00.0/0000:b3:00.0", 1);
    nic(two + "0000:b2:01.0/0000:b4:00.0/0000:b5:00.0/0000:b6:00.0", 1, "mlx5_2");
    nic(two + "0000:b2:01.0/0000:b4:00.0/0000:b5:01.0/0000:b7:00.0", 1, "mlx5_3");
    for (const auto& [node, list] : {std::pair{"node0", "0-15,32-47"}, {"node1", "16-31,48-63"}}) {
      fs::create_directories(root_ + "/devices/system/node/" + node);
      std::ofstream(root_ + "/devices/system/node/" + node + "/cpulist") << list << "\n";
    }
    for (const char* name_ : {"mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"})
      nics_.push_back(placeOfFolder(root_, std::string("/class/infiniband/") + name_ + "/device"));
  }
  ~Machine() override { fs::remove_all(root_); }

  void device(const std::string& way, int numa) {
    const fs::path folder = root_ + "/devices/" + way;
    fs::create_directories(folder);
    std::ofstream(folder / "numa_node") << numa << "\n";
    fs::create_directories(root_ + "/bus/pci/devices");
    fs::create_directory_symlink(folder, root_ + "/bus/pci/devices/" + folder.filename().string());
  }
  void nic(const std::string& way, int numa, const std::string& name) {
    device(way, numa);
    fs::create_directories(root_ + "/class/infiniband/" + name);
    fs::create_directory_symlink(root_ + "/devices/" + way, root_ + "/class/infiniband/" + name + "/device");
  }
  Nearness fromGpu(const char* gpu, int nic) const {
    return nearness(placeOfPci(root_, gpu), nics_[static_cast<std::size_t>(nic)]);
  }

  std::string root_;
  std::vector<Place> nics_;
};

TEST_F(Machine, AWayIsReadFromItsFolder) {
  EXPECT_THAT(nics_[1].way, ElementsAre("pci0000:16", "0000:16:03.0", "0000:1d:00.0"));
  EXPECT_EQ(nics_[1].numa, 0);
  EXPECT_TRUE(placeOfFolder(root_, "/class/infiniband/rxe0/device").way.empty()) << "in software, without a folder";
}

TEST_F(Machine, AGpuTakesTheNicAtItsSwitch) {
  EXPECT_EQ(fromGpu("0000:19:00.0", 0), Nearness::bridge);
  EXPECT_EQ(fromGpu("0000:19:00.0", 1), Nearness::hostBridge);
  EXPECT_EQ(fromGpu("0000:19:00.0", 2), Nearness::system);
  EXPECT_EQ(fromGpu("0000:B3:00.0", 2), Nearness::bridges);
  EXPECT_THAT(nearest(placeOfPci(root_, "0000:19:00.0"), nics_), ElementsAre(0));
  EXPECT_THAT(nearest(placeOfPci(root_, "00000000:1A:00.0"), nics_), ElementsAre(0)) << "as the driver writes it";
  EXPECT_THAT(nearest(placeOfPci(root_, "0000:b3:00.0"), nics_), ElementsAre(2, 3));
}

TEST_F(Machine, CoresTakeTheNicsOfTheirSocket) {
  const int first[] = {3, 40}, second[] = {20}, both[] = {3, 20};
  EXPECT_EQ(placeOfCores(root_, first).numa, 0);
  EXPECT_THAT(nearest(placeOfCores(root_, first), nics_), ElementsAre(0, 1));
  EXPECT_THAT(nearest(placeOfCores(root_, second), nics_), ElementsAre(2, 3));
  EXPECT_THAT(nearest(placeOfCores(root_, both), nics_), ElementsAre(0, 1, 2, 3));
}

TEST_F(Machine, WithoutSysfsAllAreAlike) {
  const int cores[] = {0};
  const std::vector<Place> unknown(3);
  EXPECT_THAT(nearest(placeOfCores(root_ + "/none", cores), unknown), ElementsAre(0, 1, 2));
  EXPECT_THAT(nearest(placeOfPci(root_, "0000:99:00.0"), nics_), ElementsAre(0, 1, 2, 3));
}

}  // namespace
}  // namespace fusco::transport
