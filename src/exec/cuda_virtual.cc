#include "exec/cuda_virtual.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "base/handle.h"
#include "base/log.h"
#include "base/status.h"
#include "exec/cuda_calls.h"

namespace fusco::exec::cuda {

namespace {

constexpr std::size_t kMostExports = 4096;  // that a process answers for; the oldest are forgotten
constexpr int kOfMessage = 64;              // descriptors
constexpr int kSeconds = 10;                // that either end waits for the other

// The bytes of a handle.
struct VirtualHandle {
  char magic[8];
  unsigned char key[16];  // of the process: names its socket
  std::uint64_t number;   // of the export
  std::uint64_t bytes;
  std::uint64_t reserved[3];
};
static_assert(sizeof(VirtualHandle) == sizeof(Handle));

// What is sent with up to kOfMessage descriptors.
struct Message {
  std::uint32_t all, these;
  std::uint64_t bytes[kOfMessage];
};

// A piece as it was mapped. `block`: the driver's number of the memory behind it.
struct Piece {
  std::uint64_t start, bytes, block;
  bool operator==(const Piece&) const = default;
};

template <typename Function>
Function* driver(const char* name) {
  return reinterpret_cast<Function*>(findDriverFunction(name));
}

struct Driver {
  decltype(cuPointerGetAttribute)* attribute = driver<decltype(cuPointerGetAttribute)>("cuPointerGetAttribute");
  decltype(cuMemRetainAllocationHandle)* retain =
      driver<decltype(cuMemRetainAllocationHandle)>("cuMemRetainAllocationHandle");
  decltype(cuMemRelease)* release = driver<decltype(cuMemRelease)>("cuMemRelease");
  decltype(cuMemExportToShareableHandle)* exportHandle =
      driver<decltype(cuMemExportToShareableHandle)>("cuMemExportToShareableHandle");
  decltype(cuMemImportFromShareableHandle)* importHandle =
      driver<decltype(cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle");
  decltype(cuMemAddressReserve)* reserve = driver<decltype(cuMemAddressReserve)>("cuMemAddressReserve");
  decltype(cuMemAddressFree)* unreserve = driver<decltype(cuMemAddressFree)>("cuMemAddressFree");
  decltype(cuMemMap)* map = driver<decltype(cuMemMap)>("cuMemMap");
  decltype(cuMemUnmap)* unmap = driver<decltype(cuMemUnmap)>("cuMemUnmap");
  decltype(cuMemSetAccess)* setAccess = driver<decltype(cuMemSetAccess)>("cuMemSetAccess");

  bool complete() const {
    return attribute != nullptr && retain != nullptr && release != nullptr && exportHandle != nullptr &&
           importHandle != nullptr && reserve != nullptr && unreserve != nullptr && map != nullptr &&
           unmap != nullptr && setAccess != nullptr;
  }
  static const Driver& get() {
    static const Driver one;
    return one;
  }
};

// The piece that an address lies in; bytes 0: none.
Piece pieceAt(std::uint64_t address) {
  const Driver& d = Driver::get();
  Piece piece{};
  CUdeviceptr start = 0;
  std::size_t bytes = 0;
  unsigned long long block = 0;
  if (d.attribute(&start, CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, address) != CUDA_SUCCESS ||
      d.attribute(&bytes, CU_POINTER_ATTRIBUTE_MAPPING_SIZE, address) != CUDA_SUCCESS ||
      d.attribute(&block, CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID, address) != CUDA_SUCCESS)
    return piece;
  if (start > address || address >= start + bytes) return piece;
  return {start, bytes, block};
}

using Descriptors = std::vector<UniqueFd>;

bool openPieces(const std::vector<Piece>& pieces, Descriptors& descriptors) {
  const Driver& d = Driver::get();
  for (const Piece& piece : pieces) {
    if (!(pieceAt(piece.start) == piece)) return false;  // something else lies there by now
    CUmemGenericAllocationHandle handle = 0;
    if (d.retain(&handle, reinterpret_cast<void*>(piece.start)) != CUDA_SUCCESS) return false;
    int descriptor = -1;
    const CUresult told = d.exportHandle(&descriptor, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    d.release(handle);
    if (told != CUDA_SUCCESS) return false;
    descriptors.emplace_back(descriptor);
  }
  return true;
}

sockaddr_un addressOf(const unsigned char* key, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::string name = "fusco-gpu-";
  for (int i = 0; i < 16; ++i) {
    name += "0123456789abcdef"[key[i] >> 4];
    name += "0123456789abcdef"[key[i] & 15];
  }
  std::memcpy(address.sun_path + 1, name.data(), name.size());  // abstract: begins with a zero
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

void waitAtMost(int socket) {
  const timeval limit{kSeconds, 0};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

bool sendDescriptors(int socket, const std::vector<Piece>& pieces, const Descriptors& descriptors) {
  std::size_t at = 0;
  do {
    Message message{};
    message.all = static_cast<std::uint32_t>(descriptors.size());
    message.these = static_cast<std::uint32_t>(std::min<std::size_t>(descriptors.size() - at, kOfMessage));
    for (std::uint32_t i = 0; i < message.these; ++i) message.bytes[i] = pieces[at + i].bytes;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kOfMessage)] = {};
    iovec bytes{&message, sizeof message};
    msghdr header{};
    header.msg_iov = &bytes;
    header.msg_iovlen = 1;
    if (message.these > 0) {
      header.msg_control = control;
      header.msg_controllen = CMSG_SPACE(sizeof(int) * message.these);
      cmsghdr* const rights = CMSG_FIRSTHDR(&header);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(sizeof(int) * message.these);
      for (std::uint32_t i = 0; i < message.these; ++i) {
        const int one = descriptors[at + i].get();
        std::memcpy(CMSG_DATA(rights) + sizeof(int) * i, &one, sizeof one);
      }
    }
    if (sendmsg(socket, &header, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof message)) return false;
    at += message.these;
  } while (at < descriptors.size());
  return true;
}

// What this process answers for. Never destroyed: its thread outlives main.
class Exporter {
 public:
  static Exporter& ofProcess() {
    static auto& one = *new Exporter;
    return one;
  }

  // Its number; the thread answers for it from here on.
  std::uint64_t numberOf(const std::vector<Piece>& pieces, unsigned char* key) {
    const std::lock_guard lock(mutex_);
    if (!socket_) begin();
    std::memcpy(key, key_, sizeof key_);
    for (const Known& known : known_)
      if (known.pieces == pieces) return known.number;
    known_.push_back({next_, pieces});
    if (known_.size() > kMostExports) known_.pop_front();
    return next_++;
  }

 private:
  struct Known {
    std::uint64_t number;
    std::vector<Piece> pieces;
  };

  void begin() {
    if (getrandom(key_, sizeof key_, 0) != static_cast<ssize_t>(sizeof key_))
      fail(Code::systemError, "getrandom: " + std::generic_category().message(errno));
    UniqueFd listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    socklen_t length = 0;
    const sockaddr_un address = addressOf(key_, length);
    if (!listener || bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
        listen(listener.get(), 128) != 0) {
      failErrno("the Unix socket that passes GPU memory to other processes");
    }
    int device = 0;
    cudaGetDevice(&device);
    std::thread([this, listening = listener.get(), device] { serve(listening, device); }).detach();
    // Not before somebody serves it.
    socket_ = std::move(listener);
  }

  void serve(int listener, int device) {
    cudaSetDevice(device);
    for (;;) {
      const UniqueFd peer(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
      if (!peer) {
        if (errno == EINTR || errno == ECONNABORTED) continue;
        // No descriptors are left, say: whoever asks waits for its time, and is told.
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        continue;
      }
      waitAtMost(peer.get());
      answer(peer.get());
    }
  }

  void answer(int peer) {
    ucred who{};
    socklen_t length = sizeof who;
    if (getsockopt(peer, SOL_SOCKET, SO_PEERCRED, &who, &length) != 0 || (who.uid != geteuid() && who.uid != 0)) return;
    std::uint64_t number = 0;
    if (recv(peer, &number, sizeof number, 0) != static_cast<ssize_t>(sizeof number)) return;
    std::vector<Piece> pieces;
    {
      const std::lock_guard lock(mutex_);
      for (const Known& known : known_)
        if (known.number == number) pieces = known.pieces;
    }
    Descriptors descriptors;
    if (!openPieces(pieces, descriptors)) {
      pieces.clear();
      sendDescriptors(peer, pieces, {});
      return;
    }
    sendDescriptors(peer, pieces, descriptors);
  }

  std::mutex mutex_;
  UniqueFd socket_;
  unsigned char key_[16] = {};
  std::uint64_t next_ = 1;
  std::deque<Known> known_;
};

// Asks the process that has exported it.
void fetch(const VirtualHandle& handle, Descriptors& descriptors, std::vector<std::uint64_t>& bytes) {
  const UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  const int peer = socket.get();
  const auto failed = [](const char* what) {
    fail(Code::systemError,
         std::string("GPU memory of another process (virtual memory management) cannot be mapped: ") + what + ": " +
             std::generic_category().message(errno));
  };
  if (peer < 0) failed("socket");
  waitAtMost(peer);
  socklen_t length = 0;
  const sockaddr_un address = addressOf(handle.key, length);
  if (connect(peer, reinterpret_cast<const sockaddr*>(&address), length) != 0) failed("connect to its process");
  if (send(peer, &handle.number, sizeof handle.number, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof handle.number))
    failed("send to its process");
  std::uint32_t all = 0;
  do {
    Message message{};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kOfMessage)] = {};
    iovec into{&message, sizeof message};
    msghdr header{};
    header.msg_iov = &into;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    const ssize_t got = recvmsg(peer, &header, MSG_CMSG_CLOEXEC);
    if (got < 0) failed("no answer from its process");
    std::size_t came = 0;
    for (cmsghdr* rights = CMSG_FIRSTHDR(&header); rights != nullptr; rights = CMSG_NXTHDR(&header, rights)) {
      if (rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS) continue;
      const std::size_t count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < count; ++i) {
        int one = -1;
        std::memcpy(&one, CMSG_DATA(rights) + sizeof(int) * i, sizeof one);
        descriptors.emplace_back(one);
      }
      came += count;
    }
    all = message.all;
    if (got != static_cast<ssize_t>(sizeof message) || message.these != came || came == 0) {
      fail(Code::invalidUsage,
           "GPU memory of another process (virtual memory management) is not there any more, or was not made to be "
           "shared by file descriptors");
    }
    bytes.insert(bytes.end(), message.bytes, message.bytes + came);
  } while (bytes.size() < all);
}

}  // namespace

bool exportVirtual(const void* pointer, std::size_t bytes, Exported& out) {
  const Driver& d = Driver::get();
  if (!d.complete()) return false;
  const auto begin = reinterpret_cast<std::uintptr_t>(pointer);
  std::vector<Piece> pieces;
  for (std::uint64_t at = begin; at < begin + std::max<std::size_t>(bytes, 1);) {
    const Piece piece = pieceAt(at);
    if (piece.bytes == 0 || (!pieces.empty() && piece.start != at)) return false;
    CUmemGenericAllocationHandle handle = 0;
    if (d.retain(&handle, reinterpret_cast<void*>(piece.start)) != CUDA_SUCCESS) return false;
    d.release(handle);
    pieces.push_back(piece);
    at = piece.start + piece.bytes;
  }
  int types = 0;
  if (d.attribute(&types, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, begin) != CUDA_SUCCESS ||
      (types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) == 0)
    return false;
  VirtualHandle handle{};
  std::memcpy(handle.magic, kVirtualMagic, sizeof kVirtualMagic);
  handle.number = Exporter::ofProcess().numberOf(pieces, handle.key);
  handle.bytes = pieces.back().start + pieces.back().bytes - pieces.front().start;
  std::memcpy(out.handle.data(), &handle, sizeof handle);
  out.offset = begin - pieces.front().start;
  out.bytes = handle.bytes;
  return true;
}

VirtualMapping::VirtualMapping(const Handle& bytesOfHandle) {
  const Driver& d = Driver::get();
  if (!d.complete()) fail(Code::unhandledCudaError, "the driver has no virtual memory management");
  VirtualHandle handle;
  std::memcpy(&handle, bytesOfHandle.data(), sizeof handle);
  Descriptors descriptors;
  std::vector<std::uint64_t> bytes;
  fetch(handle, descriptors, bytes);
  const auto require = [&](CUresult result, const char* call) {
    if (result == CUDA_SUCCESS) return;
    if (mapped_ > 0) d.unmap(start_, mapped_);
    if (start_ != 0) d.unreserve(start_, bytes_);
    fail(Code::unhandledCudaError,
         std::string(call) + " of memory of another process: CUresult " + std::to_string(static_cast<int>(result)));
  };
  CUdeviceptr start = 0;
  require(d.reserve(&start, handle.bytes, 0, 0, 0), "cuMemAddressReserve");
  start_ = start;
  bytes_ = handle.bytes;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    CUmemGenericAllocationHandle piece = 0;
    require(d.importHandle(&piece, reinterpret_cast<void*>(static_cast<std::uintptr_t>(descriptors[i].get())),
                           CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
            "cuMemImportFromShareableHandle");
    const CUresult result =
        bytes[i] <= bytes_ - mapped_ ? d.map(start_ + mapped_, bytes[i], 0, piece, 0) : CUDA_ERROR_INVALID_VALUE;
    d.release(piece);  // what is mapped stays
    require(result, "cuMemMap");
    mapped_ += bytes[i];
  }
  if (mapped_ != bytes_) require(CUDA_ERROR_INVALID_VALUE, "cuMemMap");
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = currentDevice();
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  require(d.setAccess(start_, bytes_, &access, 1), "cuMemSetAccess");
}

VirtualMapping::~VirtualMapping() {
  const Driver& d = Driver::get();
  if (d.unmap(start_, bytes_) != CUDA_SUCCESS || d.unreserve(start_, bytes_) != CUDA_SUCCESS)
    FUSCO_WARN("{} bytes of another process's GPU memory could not be unmapped", bytes_);
}

}  // namespace fusco::exec::cuda
