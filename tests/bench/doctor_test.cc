// fusco_doctor as its users see it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "bench/json.h"
#include "bench/program.h"

namespace {

using testing::HasSubstr;

const std::string kProgram = FUSCO_DOCTOR;

// Its findings under these settings, and that they are well formed.
Json findingsOf(const std::string& settings, const std::string& arguments = "") {
  const Said said = say(settings + " timeout 100 " + kProgram + " --json " + arguments);
  const Json all = Json::parse(said.text);
  EXPECT_TRUE(all.isArray()) << said.text;
  bool failed = false;
  for (const Json& finding : all.items()) {
    EXPECT_THAT(finding["status"].text(), testing::AnyOf("PASS", "WARN", "FAIL"));
    EXPECT_EQ(finding["mend"].text().empty(), finding["status"] == "PASS") << finding.dump();
    failed = failed || finding["status"] == "FAIL";
  }
  EXPECT_EQ(said.code, failed ? 1 : 0) << said.text;
  return all;
}

// The text of a check that came out so; "" if none did.
std::string found(const Json& all, const std::string& status, const std::string& check) {
  std::string text;
  for (const Json& finding : all.items()) {
    if (finding["status"] == status && finding["check"] == check) text += finding["found"].text() + "\n";
  }
  return text;
}

TEST(Doctor, thisMachineShuffles) {
  const Json all = findingsOf("");
  EXPECT_THAT(found(all, "PASS", "trial"), HasSubstr("in one node's memory"));
  EXPECT_THAT(found(all, "PASS", "trial"), HasSubstr("by shared memory"));
  EXPECT_NE(found(all, "PASS", "settings"), "");
  const Said said = say("timeout 100 " + kProgram);
  EXPECT_THAT(said.text, HasSubstr("PASS  trial"));
  EXPECT_THAT(said.text, HasSubstr(" passed, "));
}

TEST(Doctor, aReportThatCannotBeWrittenIsAFailure) {
  const Said said = say("(timeout 100 " + kProgram + " >/dev/full)");
  EXPECT_EQ(said.code, 1);
  EXPECT_THAT(said.text, HasSubstr("cannot write"));
}

TEST(Doctor, namesWhatIsShort) {
  const Json all = findingsOf("ulimit -n 200; FUSCO_NO_SUCH_THING=1 FUSCO_NCCL_LIB=/nowhere/libnccl.so.2");
  EXPECT_THAT(found(all, "WARN", "open files"), HasSubstr("200"));
  EXPECT_THAT(found(all, "WARN", "settings"), HasSubstr("FUSCO_NO_SUCH_THING"));
  EXPECT_THAT(found(all, "FAIL", "NCCL"), HasSubstr("/nowhere"));
}

TEST(Doctor, trialsAreReal) {
  if (say("unshare -rn true").code != 0) GTEST_SKIP() << "no network namespaces for this user";
  // Nothing is up there, not even loopback.
  const Json all = findingsOf("unshare -rn");
  EXPECT_NE(found(all, "WARN", "network"), "");
  EXPECT_THAT(found(all, "FAIL", "trial"), HasSubstr("by TCP"));
}

// Devices that the kernel shows and libibverbs does not have: one port active, one down, one without an address.
TEST(Doctor, readsPortsOfDevices) {
  const std::filesystem::path root = temporary("doctor_root");
  const auto put = [&](const std::string& file, const std::string& text) {
    const std::filesystem::path path = root / "sys/class/infiniband/nosuch_0/ports" / file;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text << "\n";
  };
  for (const char* port : {"1", "2", "3"}) {
    put(std::string(port) + "/state", port[0] == '2' ? "1: DOWN" : "4: ACTIVE");
    put(std::string(port) + "/link_layer", "Ethernet");
    put(std::string(port) + "/rate", "400 Gb/sec (4X NDR)");
    put(std::string(port) + "/gids/0",
        port[0] == '3' ? "0000:0000:0000:0000:0000:0000:0000:0000" : "0000:0000:0000:0000:0000:ffff:0a00:0001");
    put(std::string(port) + "/gid_attrs/types/0", "RoCE v2");
    put(std::string(port) + "/gid_attrs/ndevs/0", "eth7");
  }
  const Json all = findingsOf("", "--root " + root.string());
  std::filesystem::remove_all(root);
  EXPECT_NE(found(all, "FAIL", "RDMA device") + found(all, "FAIL", "RDMA"), "");
  if (found(all, "FAIL", "RDMA device").empty()) GTEST_SKIP() << "no libibverbs here: ports are not looked at";
  EXPECT_THAT(found(all, "PASS", "RDMA port"), HasSubstr("nosuch_0:1 is active, RoCE, 400 Gb/sec"));
  EXPECT_THAT(found(all, "WARN", "RDMA port"), HasSubstr("nosuch_0:2 is not active"));
  EXPECT_THAT(found(all, "WARN", "RDMA port"), HasSubstr("nosuch_0:3 is active, but has no address"));
}

// A GPU's memory is registered with each device by a trial, with doubles of both libraries.
TEST(Doctor, triesGpuMemory) {
  const std::filesystem::path root = temporary("doctor_gpu");
  std::filesystem::create_directories(root / "proc/driver/nvidia");
  std::filesystem::create_directories(root / "sys/class/infiniband/nosuch_0/ports");
  std::ofstream(root / "proc/driver/nvidia/version") << "NVRM version\n";
  for (const char* name : {"libcuda.so.1", "libibverbs.so.1"})
    std::filesystem::create_symlink(FUSCO_DOCTOR_DOUBLE, root / name);
  const auto memory = [&](const std::string& ways, const std::string& status) {
    const Json all = findingsOf("LD_LIBRARY_PATH=" + root.string() + " " + ways, "--root " + root.string());
    return found(all, status, "GPU memory, RDMA");
  };
  EXPECT_THAT(memory("DOUBLE_DMABUF=1", "PASS"), HasSubstr("nosuch_0 by dmabuf; flushed by the driver"));
  EXPECT_THAT(memory("DOUBLE_PEERMEM=1", "PASS"),
              HasSubstr("nosuch_0 by peermem (dmabuf: the GPU's driver exports none, error 801)"));
  const std::string none = memory("", "WARN");
  EXPECT_THAT(
      none, HasSubstr("nosuch_0 not at all (dmabuf: the GPU's driver exports none, error 801; peermem: Bad address)"));
  EXPECT_THAT(none, HasSubstr("nvidia_peermem is not loaded"));
  std::filesystem::remove_all(root);
}

// GPUs' paths and the nodes that ranks on them make, with a double of libcuda.
TEST(Doctor, tellsOfPathsBetweenGpus) {
  const std::filesystem::path root = temporary("doctor_paths");
  std::filesystem::create_directories(root);
  std::filesystem::create_symlink(FUSCO_DOCTOR_DOUBLE, root / "libcuda.so.1");
  const auto paths = [&](const std::string& letters, const std::string& status, const std::string& more = "") {
    const Json all = findingsOf("LD_LIBRARY_PATH=" + root.string() + " DOUBLE_PATHS=" + letters + " " + more);
    return found(all, status, "GPU, paths");
  };
  EXPECT_EQ(paths("-", "PASS"), "one GPU: its ranks share it\n");
  EXPECT_EQ(paths("-nnn-nnn-", "PASS"), "3 GPUs, all pairs by NVLink: one node\n");
  EXPECT_EQ(paths("-npn-nnn-", "PASS"), "3 GPUs, NVLink: 0-1 1-2; PCIe: 0-2: one node\n");
  EXPECT_EQ(paths("-00n-00n-", "WARN"), "3 GPUs, no path between any: 3 nodes (0) (1) (2)\n");
  EXPECT_EQ(paths("-0n00-0nn0-00n0-", "WARN"), "4 GPUs, NVLink: 0-2 1-3; none: 0-1 0-3 1-2 2-3: 2 nodes (0 2) (1 3)\n");
  EXPECT_EQ(paths("-pp-", "WARN", "NCCL_P2P_DISABLE=1"),
            "2 GPUs, all pairs by PCIe; none is used (FUSCO_P2P_DISABLE): 2 nodes (0) (1)\n");
  std::filesystem::remove_all(root);
}

}  // namespace
