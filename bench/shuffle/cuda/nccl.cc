// NCCL as it is installed, opened at run time: the best permute in front, grouped send and receive, the best sort
// behind.
#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <stdexcept>

#include "shuffle/cuda/staged.h"

namespace fusco::bench::gpu {

namespace {

// NCCL's C interface, as far as it is used; its header need not be there.
struct UniqueId {
  char internal[128];
};
using Comm = void*;
constexpr int kUint8 = 1;

struct Functions {
  int (*getVersion)(int*);
  int (*getUniqueId)(UniqueId*);
  int (*commInitRank)(Comm*, int, UniqueId, int);
  int (*commDestroy)(Comm);
  int (*groupStart)();
  int (*groupEnd)();
  int (*send)(const void*, std::size_t, int, int, Comm, cudaStream_t);
  int (*recv)(void*, std::size_t, int, int, Comm, cudaStream_t);
  const char* (*getErrorString)(int);
  const char* (*getLastError)(Comm);
};

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(fmt::format("this NCCL has no {}", name));
}

}  // namespace

class Nccl {
 public:
  explicit Nccl(World& world) {
    // Multicast is left alone unless the user asks for it: it cannot help point-to-point.
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    if (world.gpus() < world.ranks()) setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
    const char* path = std::getenv("FUSCO_NCCL_LIB");
    const std::string name = path != nullptr && *path != 0 ? path : "libnccl.so.2";
    library_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw std::runtime_error(fmt::format("{} (FUSCO_NCCL_LIB names another)", dlerror()));
    find(library_, "ncclGetVersion", f_.getVersion);
    find(library_, "ncclGetUniqueId", f_.getUniqueId);
    find(library_, "ncclCommInitRank", f_.commInitRank);
    find(library_, "ncclCommDestroy", f_.commDestroy);
    find(library_, "ncclGroupStart", f_.groupStart);
    find(library_, "ncclGroupEnd", f_.groupEnd);
    find(library_, "ncclSend", f_.send);
    find(library_, "ncclRecv", f_.recv);
    find(library_, "ncclGetErrorString", f_.getErrorString);
    find(library_, "ncclGetLastError", f_.getLastError);
    int number = 0;
    require(f_.getVersion(&number), "ncclGetVersion");
    version_ = fmt::format("{}.{}.{}", number / 10000, number / 100 % 100, number % 100);
    if (world.gpus() < world.ranks() && number < 23000)
      throw std::runtime_error(fmt::format("NCCL {} takes one rank a GPU; 2.30 and later take several", version_));
    UniqueId id;
    require(f_.getUniqueId(&id), "ncclGetUniqueId");
    comms_.assign(static_cast<std::size_t>(world.ranks()), nullptr);
    world.workers().each([&](int rank) {
      const OnGpu on(world.gpuOf(rank));
      require(f_.commInitRank(&comms_[static_cast<std::size_t>(rank)], world.ranks(), id, rank), "ncclCommInitRank");
    });
  }
  // A communicator that has failed may hang when it is destroyed, and the program ends soon: they are left.
  ~Nccl() = default;
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  const std::string& version() const { return version_; }
  // Everything that goes from a rank and comes to it, as one group.
  void exchange(const World& world, const Stages& stages, int rank) const {
    const Comm comm = comms_[static_cast<std::size_t>(rank)];
    const cudaStream_t stream = world.ofRank(rank).get();
    require(f_.groupStart(), "ncclGroupStart");
    for (int peer = 0; peer < world.ranks(); ++peer) {
      const Segment out = stages.piece(rank, peer), in = stages.piece(peer, rank);
      if (out.bytes > 0) require(f_.send(out.from, out.bytes, kUint8, peer, comm, stream), "ncclSend");
      if (in.bytes > 0) require(f_.recv(in.to, in.bytes, kUint8, peer, comm, stream), "ncclRecv");
    }
    require(f_.groupEnd(), "ncclGroupEnd");
  }

 private:
  void require(int result, const char* call) const {
    if (result == 0) return;
    const char* detail = f_.getLastError != nullptr ? f_.getLastError(nullptr) : "";
    throw std::runtime_error(
        fmt::format("{}: {}: {}", call, f_.getErrorString(result), detail != nullptr ? detail : ""));
  }

  void* library_ = nullptr;
  Functions f_{};
  std::string version_;
  std::vector<Comm> comms_;
};

std::shared_ptr<Nccl> openNccl(World& world) { return std::make_shared<Nccl>(world); }
std::string ncclVersion(const Nccl& nccl) { return nccl.version(); }

namespace {

class NcclShuffle : public Shuffle {
 public:
  NcclShuffle(World& world, Tensors& tensors, const Options& options, std::shared_ptr<Nccl> nccl)
      : world_(world), stages_(world, tensors, options), nccl_(std::move(nccl)) {}

  void enqueue(int times) override {
    onRanks(times, [&](int rank) {
      stages_.beforeOfRank(rank);
      nccl_->exchange(world_, stages_, rank);
      stages_.afterOfRank(rank);
    });
  }
  bool capturable() const override { return false; }
  Parts parts() override {
    const auto time = [&](const std::function<void(int)>& body) {
      return quickTimeOf(world_, [&](int times) { onRanks(times, body); });
    };
    return {{"before", time([&](int rank) { stages_.beforeOfRank(rank); })},
            {"nccl", time([&](int rank) { nccl_->exchange(world_, stages_, rank); })},
            {"after", time([&](int rank) { stages_.afterOfRank(rank); })}};
  }
  std::string remark() const override { return fmt::format("NCCL {}; {}", nccl_->version(), stages_.remark()); }

 private:
  void onRanks(int times, const std::function<void(int)>& body) {
    world_.forkRanks();
    world_.workers().each([&](int rank) {
      const OnGpu on(world_.gpuOf(rank));
      for (int i = 0; i < times; ++i) body(rank);
    });
    world_.joinRanks();
  }

  World& world_;
  Stages stages_;
  std::shared_ptr<Nccl> nccl_;
};

}  // namespace

std::unique_ptr<Shuffle> makeNccl(World& world, Tensors& tensors, const Options& options, std::shared_ptr<Nccl> nccl) {
  return std::make_unique<NcclShuffle>(world, tensors, options, std::move(nccl));
}

}  // namespace fusco::bench::gpu
