// Whether RDMA devices can register the memory of a GPU: a page of it is registered with each, by both ways.
#include <dlfcn.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "doctor/report.h"

namespace fusco::bench::doctor {

namespace {

constexpr std::size_t kPage = 65536;  // of a GPU; whole pages of the host, too
constexpr int kWriteHereAndFromAfar = 3;

// Of a library, by documented signatures; what is missing is named.
class Functions {
 public:
  explicit Functions(const char* name) : library_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) missing = dlerror();
  }
  template <typename Function>
  void find(Function& function, const char* symbol, bool needed = true) {
    void* const found = library_ != nullptr ? dlsym(library_, symbol) : nullptr;
    std::memcpy(&function, &found, sizeof found);
    if (found == nullptr && needed && missing.empty()) missing = std::string("there is no ") + symbol;
  }
  std::string missing;

 private:
  void* library_;
};

struct Driver : Functions {
  int (*init)(unsigned);
  int (*device)(int*, int);
  int (*attribute)(int*, int, int);
  int (*retain)(void**, int);
  int (*makeCurrent)(void*);
  int (*allocate)(std::uint64_t*, std::size_t);
  int (*exportRange)(void*, std::uint64_t, std::size_t, int, unsigned long long);

  Driver() : Functions("libcuda.so.1") {
    find(init, "cuInit");
    find(device, "cuDeviceGet");
    find(attribute, "cuDeviceGetAttribute");
    find(retain, "cuDevicePrimaryCtxRetain");
    find(makeCurrent, "cuCtxSetCurrent");
    find(allocate, "cuMemAlloc_v2");
    find(exportRange, "cuMemGetHandleForAddressRange", false);
  }
};

struct Verbs : Functions {
  void** (*list)(int*);
  const char* (*name)(void*);
  void* (*open)(void*);
  void* (*domain)(void*);
  void* (*plain)(void*, void*, std::size_t, int);
  void* (*dmaBuf)(void*, std::uint64_t, std::size_t, std::uint64_t, int, int);

  Verbs() : Functions("libibverbs.so.1") {
    find(list, "ibv_get_device_list");
    find(name, "ibv_get_device_name");
    find(open, "ibv_open_device");
    find(domain, "ibv_alloc_pd");
    find(plain, "ibv_reg_mr");
    find(dmaBuf, "ibv_reg_dmabuf_mr", false);
  }
};

// The way that a device takes, and why not the ones before it; begins with '!' if it takes none. What is made here goes
// with the process.
std::string tryDevice(const Driver& driver, const Verbs& verbs, void* device, std::uint64_t memory) {
  void* const context = verbs.open(device);
  if (context == nullptr) return "!" + std::string(std::strerror(errno));
  void* const domain = verbs.domain(context);
  if (domain == nullptr) return "!no protection domain: " + std::string(std::strerror(errno));
  std::string why;
  constexpr int kDmaBufHandle = 1;
  int descriptor = -1;
  if (verbs.dmaBuf == nullptr) {
    why = "libibverbs is too old, before rdma-core 34";
  } else if (driver.exportRange == nullptr) {
    why = "the GPU's driver is too old";
  } else if (const int error = driver.exportRange(&descriptor, memory, kPage, kDmaBufHandle, 0); error != 0) {
    why = fmt::format("the GPU's driver exports none, error {}", error);
  } else if (verbs.dmaBuf(domain, 0, kPage, memory, descriptor, kWriteHereAndFromAfar) != nullptr) {
    return "by dmabuf";
  } else {
    why = fmt::format("the NIC's driver: {}", std::strerror(errno));
  }
  if (verbs.plain(domain, reinterpret_cast<void*>(memory), kPage, kWriteHereAndFromAfar) != nullptr)
    return fmt::format("by peermem (dmabuf: {})", why);
  return fmt::format("!not at all (dmabuf: {}; peermem: {})", why, std::strerror(errno));
}

// How the first GPU's memory is registered, device by device; begins with '!' if one takes none, with '-' if it could
// not be asked.
std::string tryAll() {
  Driver driver;
  Verbs verbs;
  if (!driver.missing.empty()) return "-" + driver.missing;
  if (!verbs.missing.empty()) return "-" + verbs.missing;
  int device = 0;
  void* context = nullptr;
  std::uint64_t memory = 0;
  if (const int error = driver.init(0)) return fmt::format("-cuInit: error {}", error);
  if (driver.device(&device, 0) != 0 || driver.retain(&context, device) != 0 || driver.makeCurrent(context) != 0 ||
      driver.allocate(&memory, 2 * kPage) != 0)
    return "-the GPU gives no memory";
  memory = (memory + kPage - 1) / kPage * kPage;
  std::string text;
  bool all = true;
  int count = 0;
  void** const devices = verbs.list(&count);
  for (int i = 0; devices != nullptr && i < count; ++i) {
    const std::string said = tryDevice(driver, verbs, devices[i], memory);
    all = all && said[0] != '!';
    text +=
        fmt::format("{}{} {}", text.empty() ? "" : ", ", verbs.name(devices[i]), said.substr(said[0] == '!' ? 1 : 0));
  }
  if (text.empty()) return "-libibverbs sees no device";
  // What the GPU needs before it reads what a NIC wrote.
  constexpr int kMajor = 75, kFlushOptions = 117, kOrdering = 118, kHopper = 9, kForOwner = 100;
  int major = 0, options = 0, ordering = 0;
  driver.attribute(&major, kMajor, device);
  driver.attribute(&options, kFlushOptions, device);
  driver.attribute(&ordering, kOrdering, device);
  const bool inOrder = major >= kHopper && ordering >= kForOwner, flush = (options & 1) != 0;
  text += inOrder ? "; read without a flush"
          : flush ? "; flushed by the driver"
                  : "; it cannot be flushed by the driver";
  return (all && (inOrder || flush) ? "" : "!") + text;
}

}  // namespace

void checkGpuMemory(Report& report) {
  if (report.line("/proc/driver/nvidia/version").empty()) return;
  const std::string check = "GPU memory, RDMA";
  const std::string found = apart(60, tryAll);
  const bool modules = !report.names("/sys/module/nvidia_peermem").empty();
  const std::string module = modules ? "; nvidia_peermem is loaded" : "; nvidia_peermem is not loaded";
  if (found.empty() || found[0] == '-') {
    return report.warn(check, (found.empty() ? "no answer" : found.substr(1)) + module,
                       "see the lines of GPU and RDMA; without it payloads go by way of host memory");
  }
  if (found[0] != '!') return report.pass(check, found + " (used with FUSCO_IB_GPU_MEMORY=1)");
  report.warn(check, found.substr(1) + module,
              "modprobe nvidia_peermem; or for dmabuf the driver's open kernel modules and rdma-core 34; without it "
              "payloads go by way of host memory");
}

}  // namespace fusco::bench::doctor
