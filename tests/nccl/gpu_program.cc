// The operations of nccl-tests in its own manner, in GPU memory, by ranks that are processes and may share a GPU:
// all-to-all, unequal all-to-all, send and receive, gather, scatter, all-reduce between them; unaligned, in place,
// aggregated, on several streams and communicators, in registered buffers and those of ncclMemAlloc, captured in
// graphs. What is checked is each byte that arrived, that communicators are carried, how sizes that differ and aborts
// end.
//
// nccl_gpu_program RANKS
// nccl_gpu_program loop PROCESSES THREADS RANKS_OF_A_THREAD [all | registered | graph]
//   the loop of nccl-tests (loop.h), with `all` by ncclCommInitAll
// Prints what was right; the exit status is the number of ranks that failed.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "nccl/gpu.h"

namespace fusco::test {

namespace {

using Clock = std::chrono::steady_clock;
double secondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
using Bytes = std::vector<std::uint8_t>;

enum class Kind { plain, registered, ncclMemory };

class Memory {
 public:
  Memory(Kind kind, std::size_t bytes, ncclComm_t comm) : kind_(kind), comm_(comm), bytes_(bytes) {
    if (kind == Kind::ncclMemory) {
      OK(extra<MemAlloc>("ncclMemAlloc")(&base_, bytes));
    } else {
      CUDA(cudaMalloc(&base_, bytes));
    }
    if (kind == Kind::registered) OK(extra<CommRegister>("ncclCommRegister")(comm, base_, bytes, &handle_));
  }
  ~Memory() {
    if (kind_ == Kind::registered) extra<CommDeregister>("ncclCommDeregister")(comm_, handle_);
    if (kind_ == Kind::ncclMemory) {
      extra<MemFree>("ncclMemFree")(base_);
    } else {
      cudaFree(base_);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::uint8_t* at(std::size_t offset) const { return static_cast<std::uint8_t*>(base_) + offset; }
  std::size_t bytes() const { return bytes_; }

 private:
  const Kind kind_;
  const ncclComm_t comm_;
  const std::size_t bytes_;
  void *base_ = nullptr, *handle_ = nullptr;
};

struct World {
  const Rank& self;
  ncclComm_t comm = nullptr, second = nullptr;  // of the same ranks
  cudaStream_t stream = nullptr, other = nullptr;
  long operations = 0;
};

// What `from` sends `to` in an operation that `salt` tells apart.
Bytes message(int salt, int from, int to, std::size_t bytes) {
  Bytes data(bytes);
  const auto seed = static_cast<std::uint64_t>(salt) * 1'000'003 + static_cast<std::uint64_t>(from * 64 + to);
  for (std::size_t i = 0; i < bytes; ++i) data[i] = byteOf(seed, i);
  return data;
}

void put(World& w, std::uint8_t* to, const Bytes& data) {
  if (!data.empty()) CUDA(cudaMemcpyAsync(to, data.data(), data.size(), cudaMemcpyHostToDevice, w.stream));
  CUDA(cudaStreamSynchronize(w.stream));
}

void expectAt(World& w, const std::uint8_t* from, const Bytes& wanted, const char* what) {
  Bytes got(wanted.size());
  if (!got.empty()) CUDA(cudaMemcpyAsync(got.data(), from, got.size(), cudaMemcpyDeviceToHost, w.stream));
  CUDA(cudaStreamSynchronize(w.stream));
  const auto wrong = std::mismatch(got.begin(), got.end(), wanted.begin()).first - got.begin();
  require(got == wanted, std::string(what) + ", " + std::to_string(wanted.size()) + " bytes: byte " +
                             std::to_string(wrong) + " is wrong");
}

// Send buffer `a`, receive buffer `b`, a part of `bytes` for each rank from `shift` on.
class Shape {
 public:
  Shape(World& world, Kind kind, std::size_t bytes, std::size_t shift)
      : w_(world),
        n_(world.self.ranks),
        me_(world.self.rank),
        bytes_(bytes),
        shift_(shift),
        a_(kind, bytes * static_cast<std::size_t>(n_) + 64, world.comm),
        b_(kind, bytes * static_cast<std::size_t>(n_) + 64, world.comm) {}

  void run() {
    allToAll();
    unequal();
    rings();
    rooted();
    inPlace();
  }

 private:
  std::uint8_t* part(const Memory& memory, int peer) const {
    return memory.at(shift_ + static_cast<std::size_t>(peer) * bytes_);
  }
  void fill() {
    ++salt_;
    for (int peer = 0; peer < n_; ++peer) put(w_, part(a_, peer), message(salt_, me_, peer, bytes_));
    CUDA(cudaMemsetAsync(b_.at(0), 0x11, b_.bytes(), w_.stream));
    CUDA(cudaStreamSynchronize(w_.stream));  // others are used too
    ++w_.operations;
  }
  void expectFrom(const std::uint8_t* at, int from, int to, const char* what) {
    expectAt(w_, at, message(salt_, from, to, bytes_), what);
  }

  void allToAll() {
    fill();
    OK(extra<AllToAll>("ncclAllToAll")(a_.at(shift_), b_.at(shift_), bytes_, ncclInt8, w_.comm, w_.stream));
    for (int peer = 0; peer < n_; ++peer) expectFrom(part(b_, peer), peer, me_, "all-to-all");
    expectAt(w_, part(b_, n_), Bytes(8, 0x11), "behind an all-to-all");
  }

  void unequal() {
    fill();
    std::vector<std::size_t> sends, receives, displacements;
    const auto share = [&](int from, int to) { return bytes_ * static_cast<std::size_t>((from + to) % 3) / 2; };
    for (int peer = 0; peer < n_; ++peer) {
      sends.push_back(share(me_, peer));
      receives.push_back(share(peer, me_));
      displacements.push_back(static_cast<std::size_t>(peer) * bytes_);
    }
    OK(extra<AllToAllv>("ncclAllToAllv")(a_.at(shift_), sends.data(), displacements.data(), b_.at(shift_),
                                         receives.data(), displacements.data(), ncclUint8, w_.comm, w_.stream));
    for (int peer = 0; peer < n_; ++peer) {
      Bytes wanted = message(salt_, peer, me_, bytes_);
      std::fill(wanted.begin() + static_cast<std::ptrdiff_t>(receives[static_cast<std::size_t>(peer)]), wanted.end(),
                std::uint8_t{0x11});
      expectAt(w_, part(b_, peer), wanted, "unequal all-to-all");
    }
  }

  // Several exchanges in one group, on two streams and two communicators; then a sum by NCCL, on what has arrived.
  void rings() {
    fill();
    const int next = (me_ + 1) % n_, previous = (me_ + n_ - 1) % n_;
    OK(ncclGroupStart());
    for (int k = 0; k < std::min(n_, 4); ++k) {
      const cudaStream_t stream = k % 2 == 0 ? w_.stream : w_.other;
      const ncclComm_t comm = k % 2 == 0 ? w_.comm : w_.second;
      OK(ncclSend(part(a_, next), bytes_, ncclInt8, next, comm, stream));
      OK(ncclRecv(part(b_, k), bytes_, ncclInt8, previous, comm, stream));
    }
    OK(ncclGroupEnd());
    CUDA(cudaStreamSynchronize(w_.other));
    for (int k = 0; k < std::min(n_, 4); ++k) expectFrom(part(b_, k), previous, me_, "ring");
    // One after the other, without a group: the lower rank of each pair sends first.
    fill();
    const int peer = me_ ^ 1;
    if (peer >= n_) return;
    for (const bool sends : {me_<peer, me_> peer}) {
      if (sends) {
        OK(ncclSend(part(a_, peer), bytes_, ncclInt8, peer, w_.comm, w_.stream));
      } else {
        OK(ncclRecv(part(b_, peer), bytes_, ncclInt8, peer, w_.comm, w_.stream));
      }
    }
    expectFrom(part(b_, peer), peer, me_, "pair");
    if (shift_ % 4 != 0 || bytes_ < 4) return;
    Bytes ones(bytes_ / 4 * 4);
    for (std::size_t i = 0; i < ones.size(); i += 4) ones[i] = 1;
    put(w_, part(a_, 0), ones);
    OK(ncclAllReduce(part(a_, 0), part(b_, 0), ones.size() / 4, ncclInt32, ncclSum, w_.comm, w_.stream));
    for (std::size_t i = 0; i < ones.size(); i += 4) ones[i] = static_cast<std::uint8_t>(n_);
    expectAt(w_, part(b_, 0), ones, "all-reduce between");
  }

  void rooted() {
    for (const int root : {0, n_ - 1}) {
      fill();
      OK(extra<Rooted>("ncclGather")(part(a_, root), b_.at(shift_), bytes_, ncclInt8, root, w_.comm, w_.stream));
      for (int peer = 0; me_ == root && peer < n_; ++peer) expectFrom(part(b_, peer), peer, root, "gather");
      CUDA(cudaStreamSynchronize(w_.stream));
      OK(extra<Rooted>("ncclScatter")(a_.at(shift_), b_.at(shift_), bytes_, ncclInt8, root, w_.comm, w_.stream));
      expectFrom(b_.at(shift_), root, me_, "scatter");
    }
  }

  // nccl-tests runs it unchecked: it has to end, and to leave the memory beside it alone.
  void inPlace() {
    fill();
    OK(extra<AllToAll>("ncclAllToAll")(a_.at(shift_), a_.at(shift_), bytes_, ncclInt8, w_.comm, w_.stream));
    CUDA(cudaStreamSynchronize(w_.stream));
  }

  World& w_;
  const int n_, me_;
  const std::size_t bytes_, shift_;
  Memory a_, b_;
  int salt_ = 0;
};

void graphs(World& w) {
  const std::size_t bytes = 30'000, all = bytes * static_cast<std::size_t>(w.self.ranks);
  Memory a(Kind::plain, all, w.comm), b(Kind::plain, all, w.comm);
  // NCCL connects at the first call of a kind.
  OK(extra<AllToAll>("ncclAllToAll")(a.at(0), b.at(0), bytes, ncclInt8, w.comm, w.stream));
  CUDA(cudaStreamSynchronize(w.stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  CUDA(cudaStreamBeginCapture(w.stream, cudaStreamCaptureModeThreadLocal));
  OK(extra<AllToAll>("ncclAllToAll")(a.at(0), b.at(0), bytes, ncclInt8, w.comm, w.stream));
  CUDA(cudaStreamEndCapture(w.stream, &graph));
  CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (int replay = 0; replay < 3; ++replay) {
    for (int peer = 0; peer < w.self.ranks; ++peer)
      put(w, a.at(static_cast<std::size_t>(peer) * bytes), message(900 + replay, w.self.rank, peer, bytes));
    CUDA(cudaGraphLaunch(exec, w.stream));
    for (int peer = 0; peer < w.self.ranks; ++peer) {
      expectAt(w, b.at(static_cast<std::size_t>(peer) * bytes), message(900 + replay, peer, w.self.rank, bytes),
               "replayed all-to-all");
    }
    ++w.operations;
  }
  CUDA(cudaGraphExecDestroy(exec));
  CUDA(cudaGraphDestroy(graph));
}

// Made without blocking, and its child: both are carried once NCCL and libfusco say that they are ready.
void nonBlocking(World& w) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t comm = nullptr, child = nullptr;
  const auto ready = [](ncclComm_t made) {
    ncclResult_t state = ncclInProgress;
    for (const auto start = Clock::now(); state == ncclInProgress; usleep(200)) {
      require(secondsSince(start) < 20, "a communicator is not ready in time");
      OK(ncclCommGetAsyncError(made, &state));
    }
    ok(state, "a communicator made without blocking");
  };
  const auto goesOn = [](ncclResult_t result, const char* what) {
    if (result != ncclInProgress) ok(result, what);
  };
  goesOn(ncclCommInitRankConfig(&comm, w.self.ranks, w.self.id(4), w.self.rank, &config), "init");
  ready(comm);
  goesOn(ncclCommSplit(comm, 0, -w.self.rank, &child, &config), "split");
  ready(comm);
  const std::size_t bytes = 1000, all = bytes * static_cast<std::size_t>(w.self.ranks);
  for (const ncclComm_t made : {comm, child}) {
    require(made != nullptr, "no communicator after the parent was ready");
    ready(made);
    void* carrier = nullptr;
    OK(extra<ncclResult_t (*)(ncclComm_t, void**)>("fuscoNcclComm")(made, &carrier));
    int me = 0;
    OK(ncclCommUserRank(made, &me));
    Memory a(Kind::plain, all, made), b(Kind::plain, all, made);
    for (int peer = 0; peer < w.self.ranks; ++peer)
      put(w, a.at(static_cast<std::size_t>(peer) * bytes), message(800, me, peer, bytes));
    OK(extra<AllToAll>("ncclAllToAll")(a.at(0), b.at(0), bytes, ncclInt8, made, w.stream));
    for (int peer = 0; peer < w.self.ranks; ++peer)
      expectAt(w, b.at(static_cast<std::size_t>(peer) * bytes), message(800, peer, me, bytes), "without blocking");
    ++w.operations;
  }
  goesOn(ncclCommDestroy(child), "destroy");
  goesOn(ncclCommDestroy(comm), "destroy");
}

// A rank that has failed does not come: the others do not wait for it for ever.
void waitFor(const std::atomic<int>& word, int value) {
  for (const auto start = Clock::now(); word < value; usleep(200))
    require(secondsSince(start) < 15, "another rank did not come");
}

void expectBothSizes(ncclResult_t result, const std::string& text, const char* whose) {
  require(result == ncclInvalidUsage || result == ncclRemoteError,
          std::string(whose) + " answers " + std::to_string(static_cast<int>(result)));
  require(text.find("40") != std::string::npos && text.find("20") != std::string::npos,
          std::string(whose) + ": the text is " + text);
}

// Sizes that differ: told at both ends, naming both. A small send is over before its receiver comes: that sender hears
// of it when it asks, by ncclCommGetAsyncError, and by its next call.
void mismatch(World& w) {
  const ncclComm_t comm = w.self.connect(2);
  Memory memory(Kind::plain, 64, comm);
  ncclResult_t state = ncclSuccess;
  if (w.self.rank == 0) {
    OK(ncclSend(memory.at(0), 10, ncclInt32, 1, comm, w.stream));
    waitFor(w.self.board->words[0], 1);
    OK(ncclCommGetAsyncError(comm, &state));
    expectBothSizes(state, ncclGetLastError(comm), "who has sent");
    const ncclResult_t result = ncclSend(memory.at(0), 10, ncclInt32, 1, comm, w.stream);
    expectBothSizes(result, ncclGetLastError(nullptr), "the send after it");
  } else if (w.self.rank == 1) {
    const ncclResult_t result = ncclRecv(memory.at(0), 5, ncclInt32, 0, comm, w.stream);
    expectBothSizes(result, ncclGetLastError(nullptr), "the receive");
    ++w.self.board->words[0];
  }
  if (w.self.rank < 2) {
    OK(ncclCommGetAsyncError(comm, &state));
    require(state == ncclInvalidUsage || state == ncclRemoteError, "the error does not stay");
  }
  ++w.self.board->words[1];
  waitFor(w.self.board->words[1], w.self.ranks);
  OK(ncclCommAbort(comm));
  ++w.operations;
}

// Rank 0 waits for what nobody sends, and another thread gives the communicator up.
void abortWhileItWaits(World& w) {
  const ncclComm_t comm = w.self.connect(3);
  if (w.self.rank == 0) {
    Memory memory(Kind::plain, 64, comm);
    ncclResult_t result = ncclSuccess;
    std::thread waits([&] {
      cudaSetDevice(0);
      ncclGroupStart();
      ncclRecv(memory.at(0), 1, ncclInt32, 1, comm, w.stream);
      result = ncclGroupEnd();
    });
    usleep(300000);
    const auto start = Clock::now();
    const ncclResult_t aborted = ncclCommAbort(comm);
    waits.join();
    require(secondsSince(start) < 2, "an abort took " + std::to_string(secondsSince(start)) + " s");
    require(aborted == ncclSuccess && result != ncclSuccess, "the group that waited went well");
  }
  ++w.self.board->words[2];
  waitFor(w.self.board->words[2], w.self.ranks);
  if (w.self.rank != 0) OK(ncclCommAbort(comm));
  ++w.operations;
}

void onGpu(const Rank& self) {
  int gpus = 0;
  CUDA(cudaGetDeviceCount(&gpus));
  CUDA(cudaSetDevice(self.rank % gpus));
  shareGpus(self, 1);
  const auto start = Clock::now();
  World w{self};
  const ncclUniqueId ids[2] = {self.id(0), self.id(1)};
  OK(ncclGroupStart());
  OK(ncclCommInitRank(&w.comm, self.ranks, ids[0], self.rank));
  OK(ncclGroupEnd());
  OK(ncclCommSplit(w.comm, 0, self.rank, &w.second, nullptr));
  CUDA(cudaStreamCreateWithFlags(&w.stream, cudaStreamNonBlocking));
  CUDA(cudaStreamCreateWithFlags(&w.other, cudaStreamNonBlocking));
  void* carrier = nullptr;
  const auto carrierOf = extra<ncclResult_t (*)(ncclComm_t, void**)>("fuscoNcclComm");
  for (const ncclComm_t comm : {w.comm, w.second}) OK(carrierOf(comm, &carrier));
  const double connected = secondsSince(start);
  for (const Kind kind : {Kind::plain, Kind::registered, Kind::ncclMemory}) {
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{4}, std::size_t{1001}, std::size_t{65539}})
      for (const std::size_t shift : {std::size_t{0}, std::size_t{1}, std::size_t{12}})
        Shape(w, kind, bytes, shift).run();
    Shape(w, kind, std::size_t{5} << 20, 4).run();
  }
  graphs(w);
  nonBlocking(w);
  mismatch(w);
  abortWhileItWaits(w);
  OK(ncclCommDestroy(w.second));
  OK(ncclCommDestroy(w.comm));
  std::printf("rank %d of %d: %ld operations right; connected after %.1f s, all in %.1f s\n", self.rank, self.ranks,
              w.operations, connected, secondsSince(start));
}

}  // namespace

}  // namespace fusco::test

int main(int count, char** arguments) {
  using namespace fusco::test;
  const auto number = [&](int i, int otherwise) { return count > i ? std::atoi(arguments[i]) : otherwise; };
  const bool loops = count > 1 && std::strcmp(arguments[1], "loop") == 0;
  const std::string how = loops && count > 5 ? arguments[5] : "";
  const LoopShape shape = loopShape(number(3, 1), number(4, 1), how);
  const int ranksOfProcess = loops ? shape.threads * shape.ranksOfThread : 1;
  // In a process of its own: CUDA does not outlive a fork.
  const auto look = [&](const Rank&) {
    int gpus = 0;
    require(cudaGetDeviceCount(&gpus) == cudaSuccess && gpus > 0, "no GPU is seen");
    const std::string refusal = refusesSeveralRanks(ranksOfProcess);
    require(refusal.empty(), refusal);
  };
  if (runRanks(1, look) != 0) return 77;
  if (!loops) return runRanks(number(1, 2), onGpu, 60);
  return runRanks(
      number(2, 2), [&](const Rank& process) { gpuLoop(process, shape); }, 60);
}
