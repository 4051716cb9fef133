#include "region.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>

namespace fusco::bench {
namespace {

constexpr int kMadviseCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; Debian 12's C library has no name for it
constexpr std::size_t kHuge = std::size_t{2} << 20;

double nowMs() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Maps at a multiple of the huge page size, without which no huge page fits.
void* mapAligned(std::size_t bytes, int fd) {
  void* reserved = mmap(nullptr, bytes + kHuge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) return reserved;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(reserved);
  const std::uintptr_t at = (begin + kHuge - 1) & ~(kHuge - 1);
  if (at != begin) munmap(reserved, at - begin);
  munmap(reinterpret_cast<void*>(at + bytes), begin + kHuge - at);
  const int flags = (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | MAP_FIXED;
  return mmap(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
}

// What the kernel says of the mapping that begins at `address`.
std::size_t hugeBytesOf(const void* address) {
  std::ifstream maps("/proc/self/smaps");
  std::string line;
  bool here = false;
  std::size_t kilobytes = 0;
  while (std::getline(maps, line)) {
    const std::size_t dash = line.find('-');
    if (dash != std::string::npos && line.find(' ') > dash)
      here = std::stoull(line.substr(0, dash), nullptr, 16) == reinterpret_cast<std::uintptr_t>(address);
    if (!here) continue;
    for (const char* field : {"AnonHugePages:", "ShmemPmdMapped:", "Shared_Hugetlb:", "Private_Hugetlb:"})
      if (line.rfind(field, 0) == 0) kilobytes += std::stoull(line.substr(std::strlen(field)));
  }
  return kilobytes << 10;
}

}  // namespace

std::vector<std::string> memoryKinds() {
  return {"private", "private-huge", "memfd", "memfd-huge", "memfd-collapsed", "memfd-hugetlb"};
}

Region makeRegion(const std::string& kind, std::size_t bytes) {
  Region region;
  region.bytes = (bytes + kHuge - 1) & ~(kHuge - 1);
  const double begin = nowMs();
  int fd = -1;
  if (kind.rfind("memfd", 0) == 0) {
    fd = memfd_create("exec_perf", MFD_CLOEXEC | (kind == "memfd-hugetlb" ? MFD_HUGETLB : 0u));
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(region.bytes)) != 0) {
      region.error = std::string("memfd_create: ") + std::strerror(errno);
      if (fd >= 0) close(fd);
      return region;
    }
  }
  void* at = mapAligned(region.bytes, fd);
  const int mapError = errno;
  if (fd >= 0) close(fd);
  if (at == MAP_FAILED) {
    region.error = std::string("mmap: ") + std::strerror(mapError);
    return region;
  }
  region.data = static_cast<std::byte*>(at);
  if (kind != "memfd-hugetlb") {
    const bool huge = kind.find("-huge") != std::string::npos || kind == "memfd-collapsed";
    if (madvise(at, region.bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) != 0 && huge)
      region.error = std::string("madvise: ") + std::strerror(errno);
  }
  for (std::size_t i = 0; i < region.bytes; i += 4096) region.data[i] = std::byte{1};
  if (kind == "memfd-collapsed" && madvise(at, region.bytes, kMadviseCollapse) != 0)
    region.error = std::string("madvise(MADV_COLLAPSE): ") + std::strerror(errno);
  region.touchMs = nowMs() - begin;
  region.hugeBytes = hugeBytesOf(at);
  return region;
}

void freeRegion(Region& region) {
  if (region.data != nullptr) munmap(region.data, region.bytes);
  region.data = nullptr;
}

}  // namespace fusco::bench
