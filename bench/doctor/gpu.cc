// GPUs as the driver shows them. Everything runs in processes of their own: a driver that has been started cannot be
// used after a fork.
#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "doctor/report.h"
#include "fusco/fusco.h"

namespace fusco::bench::doctor {

namespace {

// The few calls of the driver that are needed, by their documented signatures.
struct Handle {
  char bytes[64];
};
struct Driver {
  int (*init)(unsigned);
  int (*version)(int*);
  int (*count)(int*);
  int (*get)(int*, int);
  int (*name)(char*, int, int);
  int (*memory)(std::size_t*, int);
  int (*attribute)(int*, int, int);
  int (*retain)(void**, int);
  int (*makeCurrent)(void*);
  int (*allocate)(std::uint64_t*, std::size_t);
  int (*toDevice)(std::uint64_t, const void*, std::size_t);
  int (*toHost)(void*, std::uint64_t, std::size_t);
  int (*getHandle)(Handle*, std::uint64_t);
  int (*openHandle)(std::uint64_t*, Handle, unsigned);
  int (*pathAttribute)(int*, int, int, int);
  std::string missing;

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      missing = dlerror();
      return;
    }
    const auto find = [&](auto& function, const char* symbol) {
      void* const found = dlsym(library, symbol);
      std::memcpy(&function, &found, sizeof found);
      if (found == nullptr) missing = std::string("libcuda has no ") + symbol;
    };
    find(init, "cuInit");
    find(version, "cuDriverGetVersion");
    find(count, "cuDeviceGetCount");
    find(get, "cuDeviceGet");
    find(name, "cuDeviceGetName");
    find(memory, "cuDeviceTotalMem_v2");
    find(attribute, "cuDeviceGetAttribute");
    find(retain, "cuDevicePrimaryCtxRetain");
    find(makeCurrent, "cuCtxSetCurrent");
    find(allocate, "cuMemAlloc_v2");
    find(toDevice, "cuMemcpyHtoD_v2");
    find(toHost, "cuMemcpyDtoH_v2");
    find(getHandle, "cuIpcGetMemHandle");
    find(openHandle, "cuIpcOpenMemHandle_v2");
    find(pathAttribute, "cuDeviceGetP2PAttribute");
  }
  // The first GPU's context on this thread.
  std::string use() const {
    int device = 0;
    void* context = nullptr;
    if (int error = init(0)) return fmt::format("cuInit: error {}", error);
    if (get(&device, 0) != 0 || retain(&context, device) != 0 || makeCurrent(context) != 0) return "no context";
    return "";
  }
};

// One line for each GPU.
std::string listGpus() {
  const Driver driver;
  if (!driver.missing.empty()) return "-" + driver.missing;
  if (int error = driver.init(0)) return fmt::format("-cuInit: error {}", error);
  int version = 0, count = 0;
  driver.version(&version);
  driver.count(&count);
  if (count == 0) return "-the driver sees no GPU";
  std::string text;
  for (int i = 0; i < count; ++i) {
    constexpr int kMajor = 75, kMinor = 76, kDmaBuf = 124, kComputeMode = 20;
    int device = 0, major = 0, minor = 0, dmaBuf = 0, mode = 0;
    std::size_t bytes = 0;
    char name[128] = "";
    driver.get(&device, i);
    driver.name(name, sizeof name, device);
    driver.memory(&bytes, device);
    driver.attribute(&major, kMajor, device);
    driver.attribute(&minor, kMinor, device);
    driver.attribute(&dmaBuf, kDmaBuf, device);
    driver.attribute(&mode, kComputeMode, device);
    text += fmt::format("{}: {}, {:.0f} GiB, compute capability {}.{}, driver for CUDA {}.{}, dmabuf {}{}\n", i, name,
                        static_cast<double>(bytes) / (1 << 30), major, minor, version / 1000, version % 1000 / 10,
                        dmaBuf != 0 ? "yes" : "no", mode == 3 ? ", exclusive to one process" : "");
  }
  return text;
}

// By what each two GPUs reach each other's memory, both ways, and which nodes ranks on them make; begins with '!' if
// more than one.
std::string listPaths(bool disabled) {
  const Driver driver;
  int count = 0;
  if (!driver.missing.empty() || driver.init(0) != 0 || driver.count(&count) != 0) return "!" + driver.missing;
  if (count < 2) return "one GPU: its ranks share it";
  constexpr int kAccess = 2, kAtomics = 3;
  std::vector<int> devices(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) driver.get(&devices[static_cast<std::size_t>(i)], i);
  const auto both = [&](int attribute, int a, int b) {
    const int one = devices[static_cast<std::size_t>(a)], other = devices[static_cast<std::size_t>(b)];
    int to = 0, from = 0;
    return driver.pathAttribute(&to, attribute, one, other) == 0 &&
           driver.pathAttribute(&from, attribute, other, one) == 0 && to != 0 && from != 0;
  };
  std::map<std::string, std::string> pairs;  // by medium
  std::vector<std::vector<int>> nodes;       // the library's rule for ranks in the order of GPUs
  for (int gpu = 0; gpu < count; ++gpu) {
    for (int other = gpu + 1; other < count; ++other) {
      const char* const medium = !both(kAccess, gpu, other) ? "none" : both(kAtomics, gpu, other) ? "NVLink" : "PCIe";
      pairs[medium] += fmt::format(" {}-{}", gpu, other);
    }
    const auto takes = [&](const std::vector<int>& node) {
      return !disabled && std::all_of(node.begin(), node.end(), [&](int one) { return both(kAccess, one, gpu); });
    };
    auto node = std::find_if(nodes.begin(), nodes.end(), takes);
    if (node == nodes.end()) node = nodes.insert(nodes.end(), std::vector<int>());
    node->push_back(gpu);
  }
  std::string text = fmt::format("{} GPUs, ", count);
  if (pairs.size() == 1) {
    text += pairs.begin()->first == "none" ? "no path between any" : "all pairs by " + pairs.begin()->first;
  } else {
    for (const auto& [medium, list] : pairs)
      text += (&list == &pairs.begin()->second ? "" : "; ") + medium + ":" + list;
  }
  if (nodes.size() == 1) return text + ": one node";
  text += fmt::format("{}: {} nodes", disabled ? "; none is used (FUSCO_P2P_DISABLE)" : "", nodes.size());
  for (const std::vector<int>& node : nodes) text += fmt::format(" ({})", fmt::join(node, " "));
  return "!" + text;
}

constexpr std::uint64_t kWord = 0x46757363'6f446f63;

// A word in this process's GPU memory, read by a process that opened its handle. "" if it was right.
std::string tryIpc() {
  int handles[2], answers[2];
  if (pipe(handles) != 0 || pipe(answers) != 0) return "no pipe";
  // Forked before the driver is started.
  const pid_t reader = fork();
  if (reader == 0) {
    close(handles[1]);
    Handle handle{};
    if (read(handles[0], &handle, sizeof handle) != sizeof handle) _exit(3);
    const Driver driver;
    std::uint64_t opened = 0, word = 0;
    if (!driver.missing.empty() || !driver.use().empty()) _exit(3);
    if (driver.openHandle(&opened, handle, 1) != 0) _exit(1);
    if (driver.toHost(&word, opened, sizeof word) != 0 || word != kWord) _exit(2);
    _exit(0);
  }
  close(handles[0]);
  const Driver driver;
  std::uint64_t memory = 0;
  Handle handle{};
  std::string wrong = driver.missing.empty() ? driver.use() : driver.missing;
  if (wrong.empty() && driver.allocate(&memory, 1 << 21) != 0) wrong = "no memory";
  if (wrong.empty() && driver.toDevice(memory, &kWord, sizeof kWord) != 0) wrong = "no copy";
  if (wrong.empty() && driver.getHandle(&handle, memory) != 0) wrong = "memory cannot be exported";
  if (wrong.empty() && write(handles[1], &handle, sizeof handle) != sizeof handle) wrong = "no pipe";
  close(handles[1]);
  int status = 0;
  waitpid(reader, &status, 0);
  if (!wrong.empty()) return wrong;
  return status == 0                ? ""
         : WEXITSTATUS(status) == 1 ? "another process cannot open it"
                                    : "another process reads it wrongly";
}

}  // namespace

void checkGpus(Report& report) {
  const std::string gpus = apart(60, listGpus);
  if (gpus.empty() || gpus[0] == '-' || gpus.find(": ") == std::string::npos) {
    const std::string why = gpus.empty() ? "no answer" : gpus[0] == '-' ? gpus.substr(1) : gpus;
    if (!report.line("/proc/driver/nvidia/version").empty()) {
      return report.fail("GPU", "the kernel has NVIDIA's driver, but: " + why,
                         "install the driver's libcuda.so.1; start the container with --gpus all");
    }
    return report.pass("GPU", "none (" + why + "): host memory only");
  }
  std::size_t begin = 0;
  for (std::size_t end; (end = gpus.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string gpu = gpus.substr(begin, end - begin);
    if (gpu.find("exclusive") != std::string::npos) {
      report.warn("GPU", gpu, "nvidia-smi -c DEFAULT, where several ranks are to share it");
    } else {
      report.pass("GPU", gpu);
    }
  }
  const bool disabled = setting("FUSCO_P2P_DISABLE") == "1";
  const std::string paths = apart(60, [&] { return listPaths(disabled); });
  if (paths.empty() || paths[0] == '!') {
    report.warn(
        "GPU, paths", paths.size() < 2 ? "no answer" : paths.substr(1),
        disabled ? "unset FUSCO_P2P_DISABLE and NCCL_P2P_DISABLE: the host carries rows between nodes, paths are faster"
                 : "it works: the host carries rows between nodes. nvidia-smi topo -p2p r says why; look at "
                   "IOMMU and ACS, which often forbid paths by PCIe");
  } else {
    report.pass("GPU, paths", paths);
  }
  const std::string ipc = apart(60, tryIpc);
  if (ipc.empty()) {
    report.pass("GPU memory, IPC", "processes can open each other's");
  } else {
    report.fail("GPU memory, IPC", ipc,
                "start the container with --ipc=host; else ranks must be threads of one process");
  }
  // Asked in a process of its own too: the answer starts the driver.
  const std::string kernels = apart(60, []() -> std::string {
    fuscoDevice_t device = fuscoDeviceHost;
    const char* why = "";
    if (fuscoGetAutoDevice(&device, &why) != fuscoSuccess) return fuscoGetLastError(nullptr);
    return device == fuscoDeviceCuda ? "" : why;
  });
  if (kernels.empty()) return report.pass("GPU, library", "communicators are made on the GPU");
  report.warn("GPU, library", "communicators are made on the host: " + kernels, "build FUSCO where nvcc is found");
}

}  // namespace fusco::bench::doctor
