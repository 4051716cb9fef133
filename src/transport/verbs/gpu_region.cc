#include "transport/verbs/gpu_region.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace fusco::transport {

namespace {

// By a descriptor of the pages that the memory lies in: the region keeps what it needs of it.
ibv_mr* byDmaBuf(const VerbsLibrary& verbs, ibv_pd* domain, GpuMemory& gpu, std::byte* address, std::size_t bytes,
                 int access, std::string* why) {
  if (verbs.regDmaBufMr == nullptr) {
    *why = "libibverbs has no ibv_reg_dmabuf_mr (rdma-core 34)";
    return nullptr;
  }
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const std::size_t offset = at % page;
  const std::size_t whole = (offset + bytes + page - 1) / page * page;
  const UniqueFd pages = gpu.exportPages(address - offset, whole, why);
  if (!pages) return nullptr;
  ibv_mr* const region = verbs.regDmaBufMr(domain, offset, bytes, at, pages.get(), access);
  if (region == nullptr) *why = std::string("the NIC's driver refuses: ") + std::strerror(errno);
  return region;
}

}  // namespace

GpuRegion registerGpuMemory(const VerbsLibrary& verbs, ibv_pd* domain, GpuMemory& gpu, std::byte* address,
                            std::size_t bytes, int access) {
  GpuRegion made;
  std::string why;
  made.region = byDmaBuf(verbs, domain, gpu, address, bytes, access, &why);
  if (made.region != nullptr) {
    made.by = "dmabuf";
    return made;
  }
  made.why = "dmabuf: " + why;
  // The module nvidia_peermem knows the addresses of GPU memory.
  made.region = verbs.regMr(domain, address, bytes, access);
  if (made.region != nullptr) {
    made.by = "peermem";
  } else {
    made.why += std::string("; peermem: ") + std::strerror(errno) + " (is the module nvidia_peermem loaded?)";
  }
  return made;
}

}  // namespace fusco::transport
