#include "transport/local/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "base/environment.h"
#include "base/status.h"

namespace fusco::transport {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// Below this, asking the kernel for what is available costs more than it tells.
constexpr std::size_t kAskFirst = std::size_t{32} << 20;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14

std::string mebibytes(std::size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

[[noreturn]] void failShort(const char* name, std::size_t bytes, int error = 0) {
  rlimit limit{};
  if (error == EFBIG && ::getrlimit(RLIMIT_FSIZE, &limit) == 0) {
    fail(Code::systemError, std::string(name) + " needs " + mebibytes(bytes) +
                                " of shared memory, which counts as a file, and files may have " +
                                std::to_string(limit.rlim_cur) + " bytes here; raise `ulimit -f` (RLIMIT_FSIZE)");
  }
  fail(Code::systemError,
       std::string(name) + " needs " + mebibytes(bytes) + " of shared memory, " + mebibytes(availableMemory()) +
           " are available; use smaller buffers or raise the memory limit of this machine or container");
}

std::size_t pageRounded(std::size_t bytes) {
  const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  if (bytes > std::numeric_limits<std::size_t>::max() / 2) return bytes / page * page;
  return std::max<std::size_t>(1, (bytes + page - 1) / page) * page;
}

// 0, or the error of the kernel. Never a signal.
int populatePages(void* data, std::size_t bytes) {
  while (::madvise(data, bytes, kPopulateWrite) != 0) {
    if (errno != EINTR && errno != EAGAIN) return errno;
  }
  return 0;
}

void makePresent(const char* name, std::byte* data, std::size_t bytes, int descriptor) {
  int error = populatePages(data, bytes);
  if (error == 0) return;
  if (error != EINVAL) failShort(name, bytes);
  // A kernel before 5.14: reserve through the file, which answers with an error and not with SIGBUS, then touch.
  if (descriptor >= 0 && ::posix_fallocate(descriptor, 0, static_cast<off_t>(bytes)) != 0) failShort(name, bytes);
  const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  for (std::size_t at = 0; at < bytes; at += page) *reinterpret_cast<volatile char*>(data + at) = 0;
}

std::uint64_t numberIn(const char* path) {
  std::ifstream file(path);
  std::uint64_t value = 0;
  return file >> value ? value : std::numeric_limits<std::uint64_t>::max();
}

}  // namespace

std::size_t availableMemory() {
  constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t available = kUnknown;
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  std::uint64_t value = 0;
  while (file >> key >> value) {
    if (key == "MemAvailable:") {
      available = value * 1024;
      break;
    }
    std::getline(file, unit);
  }
  const std::uint64_t limit = numberIn("/sys/fs/cgroup/memory.max");
  const std::uint64_t used = numberIn("/sys/fs/cgroup/memory.current");
  if (limit != kUnknown && used != kUnknown) available = std::min(available, limit > used ? limit - used : 0);
  return static_cast<std::size_t>(available);
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      descriptor_(std::move(other.descriptor_)) {}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  if (this != &other) {
    unmap();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    descriptor_ = std::move(other.descriptor_);
  }
  return *this;
}

SharedMemory::~SharedMemory() { unmap(); }

void SharedMemory::unmap() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
  data_ = nullptr;
}

void SharedMemory::map(int descriptor, bool hugeWanted) {
  const int flags = MAP_SHARED | (descriptor < 0 ? MAP_ANONYMOUS : 0);
  void* at = MAP_FAILED;
  if (bytes_ >= kHugePage) {
    // Huge pages need an address on their border: reserve more, map inside, give the rest back.
    const std::size_t reserved = bytes_ + kHugePage;
    void* room = ::mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room != MAP_FAILED) {
      auto begin = reinterpret_cast<std::uintptr_t>(room);
      auto aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
      at = ::mmap(reinterpret_cast<void*>(aligned), bytes_, PROT_READ | PROT_WRITE, flags | MAP_FIXED, descriptor, 0);
      const int error = errno;
      if (at == MAP_FAILED) {
        ::munmap(room, reserved);
      } else {
        if (aligned > begin) ::munmap(room, aligned - begin);
        const std::size_t behind = begin + reserved - (aligned + bytes_);
        if (behind > 0) ::munmap(reinterpret_cast<void*>(aligned + bytes_), behind);
      }
      errno = error;
    }
  } else {
    at = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, descriptor, 0);
  }
  if (at == MAP_FAILED) failErrno("cannot map " + mebibytes(bytes_) + " of shared memory");
  data_ = static_cast<std::byte*>(at);
  if (hugeWanted && bytes_ >= kHugePage && environment().flag(Setting::hugePages))
    ::madvise(data_, bytes_, MADV_HUGEPAGE);
}

SharedMemory SharedMemory::create(const char* name, std::size_t bytes) {
  SharedMemory memory;
  memory.bytes_ = pageRounded(bytes);
  if (memory.bytes_ >= kAskFirst && memory.bytes_ > availableMemory()) failShort(name, memory.bytes_);
  memory.descriptor_ = UniqueFd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.descriptor_) {
    failErrno(std::string(name) + ": memfd_create failed (raise `ulimit -n` if descriptors are short)");
  }
  const int fd = memory.descriptor_.get();
  if (::ftruncate(fd, static_cast<off_t>(memory.bytes_)) != 0) failShort(name, memory.bytes_, errno);
  if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    failErrno(std::string(name) + ": the memory cannot be sealed");
  }
  memory.map(fd, true);
  makePresent(name, memory.data_, memory.bytes_, fd);
  return memory;
}

SharedMemory SharedMemory::anonymous(std::size_t bytes) {
  SharedMemory memory;
  memory.bytes_ = pageRounded(bytes);
  if (memory.bytes_ >= kAskFirst && memory.bytes_ > availableMemory()) failShort("a posted link", memory.bytes_);
  memory.map(-1, true);
  makePresent("a posted link", memory.data_, memory.bytes_, -1);
  return memory;
}

SharedMemory SharedMemory::attach(int descriptor, std::size_t bytes) {
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) failErrno("cannot look at memory that a peer has passed");
  const int seals = ::fcntl(descriptor, F_GET_SEALS);
  SharedMemory memory;
  memory.bytes_ = pageRounded(bytes);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || static_cast<std::size_t>(status.st_size) < memory.bytes_) {
    memory.bytes_ = 0;
    fail(Code::internalError, "a peer has passed memory that is shorter than " + std::to_string(bytes) +
                                  " bytes or not sealed; are all ranks using the same version of the library?");
  }
  memory.map(descriptor, true);
  return memory;
}

void SharedMemory::populate() const { populatePages(data_, bytes_); }

void SharedMemory::discard() const {
  if (descriptor_) {
    ::fallocate(descriptor_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(bytes_));
  }
}

}  // namespace fusco::transport
