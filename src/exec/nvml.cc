#include "exec/nvml.h"

#include <dlfcn.h>

#include <cstring>
#include <optional>
#include <utility>

#include "base/bus_id.h"
#include "base/log.h"

namespace fusco::exec {

namespace {

// The few things that are needed, by their documented names, values and layouts.
constexpr int kSuccess = 0;
enum Capability : int { kRead = 0, kWrite = 1 };
enum Status : int { kOk = 0, kChipset = 1, kGpu = 2, kTopology = 3, kRegistry = 4, kNotSupported = 5, kUnknown = 6 };
using Device = void*;
struct PciInfo {
  char oldBusId[16];
  unsigned domain;
  unsigned bus;
  unsigned device;
  unsigned deviceId;
  unsigned subsystemId;
  char busId[32];
};
static_assert(sizeof(PciInfo) == 68);

struct Library {
  int (*init)() = nullptr;
  int (*count)(unsigned*) = nullptr;
  int (*get)(unsigned, Device*) = nullptr;
  int (*pciInfo)(Device, PciInfo*) = nullptr;
  int (*pathStatus)(Device, Device, int, int*) = nullptr;
  std::vector<std::pair<std::uint32_t, Device>> gpus;

  Library() {
    const std::string wrong = open();
    if (wrong.empty()) return;
    gpus.clear();
    FUSCO_INFO(kLogInit, "NVML cannot be asked how GPUs reach each other, they count as reaching: {}", wrong);
  }

 private:
  std::string open() {
    // Never closed: other users of the library in this process would not like it.
    void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* const text = dlerror();
      return text != nullptr ? text : "libnvidia-ml.so.1 cannot be opened";
    }
    std::string missing;
    const auto find = [&](auto& function, const char* symbol) {
      void* const found = dlsym(library, symbol);
      std::memcpy(&function, &found, sizeof found);
      if (found == nullptr) missing = std::string("it has no ") + symbol;
    };
    find(init, "nvmlInit_v2");
    find(count, "nvmlDeviceGetCount_v2");
    find(get, "nvmlDeviceGetHandleByIndex_v2");
    find(pciInfo, "nvmlDeviceGetPciInfo_v3");
    find(pathStatus, "nvmlDeviceGetP2PStatus");
    if (!missing.empty()) return missing;
    unsigned gpuCount = 0;
    if (const int error = init(); error != kSuccess) return "nvmlInit_v2 returned " + std::to_string(error);
    if (const int error = count(&gpuCount); error != kSuccess)
      return "nvmlDeviceGetCount_v2 returned " + std::to_string(error);
    for (unsigned i = 0; i < gpuCount; ++i) {
      Device device = nullptr;
      PciInfo pci{};
      // One that may not be looked at is one of somebody else's.
      if (get(i, &device) != kSuccess || pciInfo(device, &pci) != kSuccess) continue;
      gpus.emplace_back(busId(pci.domain, pci.bus, pci.device), device);
    }
    return "";
  }
};

const Library& library() {
  static const Library* const one = new Library;
  return *one;
}

const char* reason(int status) {
  switch (status) {
    case kChipset:
      return "the chipset does not support it";
    case kGpu:
      return "the GPU does not support it";
    case kTopology:
      return "they sit behind different I/O hubs";
    case kRegistry:
      return "the driver's settings forbid it";
    default:
      return "it is not supported";
  }
}

}  // namespace

std::vector<NvmlPath> nvmlPaths(std::uint32_t gpu) {
  const Library& nvml = library();
  Device self = nullptr;
  for (const auto& [id, device] : nvml.gpus) {
    if (id == gpu) self = device;
  }
  std::vector<NvmlPath> paths;
  if (self == nullptr) return paths;
  for (const auto& [id, device] : nvml.gpus) {
    if (id == gpu) continue;
    std::optional<NvmlPath> path;
    for (const bool from : {false, true}) {
      for (const Capability capability : {kRead, kWrite}) {
        int status = kUnknown;
        const int error = from ? nvml.pathStatus(device, self, capability, &status)
                               : nvml.pathStatus(self, device, capability, &status);
        if (error != kSuccess || status == kUnknown) continue;
        if (!path) path = NvmlPath{id, true, false, ""};
        if (status == kOk || !path->there) continue;
        *path = {id, false, from, std::string(capability == kRead ? "reads: " : "writes: ") + reason(status)};
      }
    }
    if (path) paths.push_back(*path);
  }
  return paths;
}

}  // namespace fusco::exec
