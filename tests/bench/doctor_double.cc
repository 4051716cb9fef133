// libcuda and libibverbs as the doctor calls them, in one file under both names: a GPU and a NIC that do what
// DOUBLE_DMABUF and DOUBLE_PEERMEM (1 or 0) say, and notice what they are asked wrongly. DOUBLE_PATHS makes it more
// GPUs: a row for each, a letter for each other one that it reaches: n by NVLink, p by PCIe, 0 not at all.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {
bool is(const char* name) {
  const char* const text = std::getenv(name);
  return text != nullptr && text[0] == '1';
}
constexpr std::uint64_t kMemory = 0x7f0000001000;  // no page of a GPU begins here
constexpr std::uint64_t kPage = 65536;
int something = 0;
int exported = -1;
int gpus() {
  const char* const text = std::getenv("DOUBLE_PATHS");
  int count = 1;
  while (text != nullptr && static_cast<std::size_t>(count) * static_cast<std::size_t>(count) < std::strlen(text))
    ++count;
  return count;
}
bool lies(std::uint64_t address, std::size_t bytes) {
  return address % kPage == 0 && address >= kMemory && address + bytes <= kMemory + 2 * kPage;
}
}  // namespace

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = gpus();
  return 0;
}
// Devices are no numbers of GPUs.
int cuDeviceGet(int* device, int number) {
  *device = 100 + number;
  return number < gpus() ? 0 : 101;
}
int cuDeviceGetName(char* name, int bytes, int) {
  std::strncpy(name, "double", static_cast<std::size_t>(bytes));
  return 0;
}
int cuDeviceTotalMem_v2(std::size_t* bytes, int) {
  *bytes = std::size_t{8} << 30;
  return 0;
}
int cuDeviceGetP2PAttribute(int* value, int attribute, int from, int to) {
  constexpr int kAccess = 2, kAtomics = 3;
  if (from == to) return 1;
  const char path = std::getenv("DOUBLE_PATHS")[(from - 100) * gpus() + to - 100];
  *value = attribute == kAccess ? path != '0' : attribute == kAtomics && path == 'n';
  return 0;
}
int cuMemcpyHtoD_v2(std::uint64_t, const void*, std::size_t) { return 0; }
int cuMemcpyDtoH_v2(void*, std::uint64_t, std::size_t) { return 801; }
int cuIpcGetMemHandle(void*, std::uint64_t) { return 801; }
int cuIpcOpenMemHandle_v2(std::uint64_t*, void*, unsigned) { return 801; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMajor = 75, kFlushOptions = 117, kOrdering = 118;
  *value = attribute == kMajor ? 8 : attribute == kFlushOptions ? 1 : attribute == kOrdering ? 0 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &something;
  return 0;
}
int cuCtxSetCurrent(void* context) { return context == &something ? 0 : 201; }
int cuMemAlloc_v2(std::uint64_t* address, std::size_t bytes) {
  *address = kMemory;
  return bytes <= 2 * kPage ? 0 : 2;
}
int cuMemGetHandleForAddressRange(int* handle, std::uint64_t address, std::size_t bytes, int type, unsigned long long) {
  if (!is("DOUBLE_DMABUF")) return 801;
  if (type != 1 || !lies(address, bytes)) return 1;
  *handle = exported = memfd_create("double", 0);
  return 0;
}

void** ibv_get_device_list(int* count) {
  static void* devices[] = {&something, nullptr};
  *count = 1;
  return devices;
}
void ibv_free_device_list(void**) {}
const char* ibv_get_device_name(void*) { return "nosuch_0"; }
void* ibv_open_device(void*) { return &something; }
int ibv_close_device(void*) { return 0; }
void* ibv_alloc_pd(void*) { return &something; }
void* ibv_reg_mr(void*, void* address, std::size_t bytes, int access) {
  if (is("DOUBLE_PEERMEM") && lies(reinterpret_cast<std::uint64_t>(address), bytes) && access == 3) return &something;
  errno = EFAULT;
  return nullptr;
}
void* ibv_reg_dmabuf_mr(void*, std::uint64_t offset, std::size_t bytes, std::uint64_t address, int descriptor,
                        int access) {
  if (offset == 0 && lies(address, bytes) && descriptor == exported && access == 3) return &something;
  errno = EINVAL;
  return nullptr;
}
}
