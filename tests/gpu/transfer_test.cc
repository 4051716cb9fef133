// Send, receive, all-to-all and lists of rows in GPU memory: the random cases of the host, every byte checked, with
// ranks as threads and as processes that share a GPU; and the order of streams.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "api/transfer_case.h"
#include "shuffle/case.h"
#include "shuffle/ranks.h"

namespace fusco::test {
namespace {

constexpr std::uint8_t kPoison = 0x5a;

void okCuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}
#define CUDA_OK(call) okCuda((call), #call)

// Asked in a process of its own: CUDA does not survive a fork, and ranks are forked.
const char* gpuMissing() {
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    _exit(cudaGetDeviceCount(&count) == cudaSuccess && count > 0 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  return status == 0 ? nullptr : "no GPU: cudaGetDeviceCount finds none";
}

const World kThreads{"2 threads", 2, 2, {}, true, 16384};
const World kManyThreads{"8 threads", 8, 8, {}, true, 16384};
const World kProcesses{"2 processes", 2, 1, {}, true, 16384};
const World kManyProcesses{"4 processes", 4, 1, {}, true, 16384};
const World kMixed{"2 processes of 2 threads", 4, 2, {}, true, 16384};

const World kNodes{"2 nodes of 2 threads", 4, 4, {0, 0, 1, 1}, true, 16384};
const World kNodesOfProcesses{"2 nodes of 2 processes", 4, 1, {0, 0, 1, 1}, true, 16384};

class GpuTransfers : public ::testing::TestWithParam<const World*> {
 protected:
  void SetUp() override {
    static const char* const missing = gpuMissing();
    if (missing != nullptr) GTEST_SKIP() << missing;
  }
  void runWell(const std::function<void(Rank&)>& body) {
    const std::vector<std::string> texts = runRanks(*GetParam(), body, 100);
    for (std::size_t r = 0; r < texts.size(); ++r) EXPECT_EQ(texts[r], "") << GetParam()->name << ", rank " << r;
  }
};

// FUSCO_TEST_CASES asks for fewer, as compute-sanitizer's runs do.
std::uint64_t seeds(std::uint64_t usual) {
  const char* asked = std::getenv("FUSCO_TEST_CASES");
  return asked == nullptr ? usual : std::min<std::uint64_t>(usual, std::strtoull(asked, nullptr, 10));
}

fuscoComm_t connect(Rank& self, int k = 0) {
  fuscoConfig_t config = self.config();
  config.device = fuscoDeviceCuda;
  return self.connect(k, config);
}
void leave(fuscoComm_t comm) {
  FUSCO_OK(fuscoCommFinalize(comm));
  FUSCO_OK(fuscoCommDestroy(comm));
}

class Stream {
 public:
  Stream() { CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void settle() const { CUDA_OK(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

// Poisoned memory of the GPU, or pinned, which other processes cannot reach.
class Tensor {
 public:
  explicit Tensor(std::size_t bytes, bool pinned = false) : bytes_(bytes + 1), pinned_(pinned) {
    CUDA_OK(pinned_ ? cudaHostAlloc(&data_, bytes_, cudaHostAllocPortable) : cudaMalloc(&data_, bytes_));
    CUDA_OK(cudaMemset(data_, kPoison, bytes_));
    settle();
  }
  ~Tensor() { pinned_ ? cudaFreeHost(data_) : cudaFree(data_); }
  Tensor(const Tensor&) = delete;
  std::uint8_t* data() const { return static_cast<std::uint8_t*>(data_); }
  void set(const std::vector<std::uint8_t>& bytes) const {
    if (!bytes.empty()) CUDA_OK(cudaMemcpy(data_, bytes.data(), bytes.size(), cudaMemcpyDefault));
    settle();
  }
  std::vector<std::uint8_t> get() const {
    std::vector<std::uint8_t> bytes(bytes_);
    CUDA_OK(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDefault));
    return bytes;
  }

 private:
  // The streams of these tests do not wait for the one that fills.
  static void settle() { CUDA_OK(cudaStreamSynchronize(nullptr)); }

  std::size_t bytes_;
  bool pinned_;
  void* data_ = nullptr;
};

std::vector<std::uint8_t> sentBytes(const Planned& t) {
  std::vector<std::uint8_t> bytes(t.sendSpan());
  fillRow(t.seed, 0, 0, 0, bytes.data(), bytes.size());
  return bytes;
}

// One end of a transfer, with its tensor and list in GPU memory.
struct End {
  const Planned* planned;
  bool send;
  std::unique_ptr<Tensor> rows, list;

  End(const Planned& t, bool sends) : planned(&t), send(sends) {
    rows = std::make_unique<Tensor>(send ? t.sendSpan() : t.receiveSpan(), !t.window);
    if (send) rows->set(sentBytes(t));
    const std::vector<std::int64_t>& wide = send ? t.sendList : t.receiveList;
    const std::vector<std::int32_t> narrow(wide.begin(), wide.end());
    std::vector<std::uint8_t> bytes(wide.size() * (t.int32 ? 4 : 8));
    if (!bytes.empty())
      std::memcpy(bytes.data(), t.int32 ? static_cast<const void*>(narrow.data()) : wide.data(), bytes.size());
    list = std::make_unique<Tensor>(bytes.size());
    list->set(bytes);
  }

  void post(fuscoComm_t comm, cudaStream_t stream) const {
    const Planned& t = *planned;
    const bool listed = send ? t.sendListed : t.receiveListed;
    const void* const indices = listed ? list->data() : nullptr;
    const fuscoDataType_t type = t.int32 ? fuscoInt32 : fuscoInt64;
    if (t.plain && send) {
      FUSCO_OK(fuscoSend(rows->data(), t.bytes(), fuscoUint8, t.to, comm, stream));
    } else if (t.plain) {
      FUSCO_OK(fuscoRecv(rows->data(), t.bytes(), fuscoUint8, t.from, comm, stream));
    } else if (send) {
      FUSCO_OK(fuscoGatherSend(rows->data(), t.sendRows, t.sendRowBytes, indices, type, t.to, comm, stream));
    } else {
      FUSCO_OK(fuscoScatterRecv(rows->data(), t.receiveRows, t.receiveRowBytes, indices, type, t.from, comm, stream));
    }
  }

  void check(std::uint64_t seed) const {
    const Planned& t = *planned;
    const std::vector<std::uint8_t> sent = sentBytes(t), got = rows->get();
    std::vector<std::uint8_t> expected(t.receiveSpan() + 1, kPoison);
    for (std::size_t at = 0; at < t.bytes(); ++at) expected[t.receiveAt(at)] = sent[t.sendAt(at)];
    require(got == expected, "seed " + std::to_string(seed) + ", transfer from " + std::to_string(t.from) + " to " +
                                 std::to_string(t.to) + " of " + std::to_string(t.bytes()) + " bytes arrived");
  }
};

void randomGroup(Rank& self, fuscoComm_t comm, std::uint64_t seed, const Stream (&streams)[2]) {
  std::mt19937_64 random(seed);
  std::vector<Planned> transfers;
  const std::size_t count = 1 + random() % 14;
  for (std::size_t i = 0; i < count; ++i) transfers.push_back(randomTransfer(random, self.ranks()));
  std::vector<End> ends;
  for (const Planned& t : transfers) {
    if (t.from == self.rank()) ends.emplace_back(t, true);
    if (t.to == self.rank()) ends.emplace_back(t, false);
  }
  // Any order of calls, as long as each ordered pair keeps its own.
  std::mt19937_64 mine(seed * 31 + static_cast<std::uint64_t>(self.rank()));
  std::vector<std::uint64_t> keyOfPair(static_cast<std::size_t>(2 * self.ranks()));
  for (auto& key : keyOfPair) key = mine();
  const auto keyOf = [&](const End& e) {
    return keyOfPair[static_cast<std::size_t>(2 * (e.send ? e.planned->to : e.planned->from) + (e.send ? 1 : 0))];
  };
  std::stable_sort(ends.begin(), ends.end(), [&](const End& a, const End& b) { return keyOf(a) < keyOf(b); });
  FUSCO_OK(fuscoGroupStart());
  for (const End& end : ends) end.post(comm, streams[mine() % 2]);
  FUSCO_OK(fuscoGroupEnd());
  for (const Stream& stream : streams) stream.settle();
  for (const End& end : ends) {
    if (!end.send) end.check(seed);
  }
}

TEST_P(GpuTransfers, randomGroups) {
  runWell([](Rank& self) {
    fuscoComm_t comm = connect(self);
    const Stream streams[2];
    for (std::uint64_t seed = 1; seed <= seeds(120); ++seed)
      randomGroup(self, comm, seed * 100 + static_cast<std::uint64_t>(self.ranks()), streams);
    leave(comm);
  });
}

TEST_P(GpuTransfers, randomAllToAllv) {
  runWell([](Rank& self) {
    fuscoComm_t comm = connect(self);
    const Stream stream;
    const auto n = static_cast<std::size_t>(self.ranks());
    const auto me = static_cast<std::size_t>(self.rank());
    for (std::uint64_t seed = 1; seed <= seeds(40); ++seed) {
      std::mt19937_64 random(seed);
      std::vector<std::size_t> counts(n * n);  // [from][to], in 2-byte elements: any alignment
      for (auto& c : counts) c = random() % 4 == 0 ? 0 : random() % (seed % 10 == 0 ? 3000000 : 2000);
      const bool pinned = random() % 4 == 0;
      std::vector<std::size_t> sends(n), receives(n), sendAt(n), receiveAt(n);
      std::size_t sendEnd = 3, receiveEnd = 5;
      for (std::size_t p = 0; p < n; ++p) {
        sends[p] = counts[me * n + p];
        receives[p] = counts[p * n + me];
        sendAt[p] = sendEnd;
        receiveAt[p] = receiveEnd;
        sendEnd += sends[p] + seed % 3;
        receiveEnd += receives[p] + seed % 2;
      }
      const Tensor in(sendEnd * 2, pinned), out(receiveEnd * 2);
      std::vector<std::uint8_t> bytes(sendEnd * 2), expected(receiveEnd * 2 + 1, kPoison);
      for (std::size_t p = 0; p < n; ++p) {
        fillRow(seed, static_cast<int>(p), self.rank(), 0, bytes.data() + sendAt[p] * 2, sends[p] * 2);
        fillRow(seed, self.rank(), static_cast<int>(p), 0, expected.data() + receiveAt[p] * 2, receives[p] * 2);
      }
      in.set(bytes);
      FUSCO_OK(fuscoAllToAllv(in.data(), sends.data(), sendAt.data(), out.data(), receives.data(), receiveAt.data(),
                              fuscoFloat16, comm, stream));
      stream.settle();
      require(out.get() == expected, "all-to-all of seed " + std::to_string(seed));
    }
    leave(comm);
  });
}

// Work before and behind the calls on the same stream, and no word with the host in between.
TEST_P(GpuTransfers, keepTheOrderOfStreams) {
  runWell([](Rank& self) {
    fuscoComm_t comm = connect(self);
    const Stream stream;
    constexpr std::size_t kBytes = 3 << 20;
    constexpr int kRounds = 100;
    const int n = self.ranks(), next = (self.rank() + 1) % n, before = (self.rank() + n - 1) % n;
    const Tensor out(kBytes), in(kBytes), log(kRounds * 2);
    for (int round = 0; round < kRounds; ++round) {
      CUDA_OK(cudaMemsetAsync(out.data(), (self.rank() + round) % 251, kBytes, stream));
      CUDA_OK(cudaMemsetAsync(in.data(), 0xee, kBytes, stream));
      FUSCO_OK(fuscoGroupStart());
      FUSCO_OK(fuscoSend(out.data(), kBytes, fuscoUint8, next, comm, stream));
      FUSCO_OK(fuscoRecv(in.data(), kBytes, fuscoUint8, before, comm, stream));
      FUSCO_OK(fuscoGroupEnd());
      CUDA_OK(cudaMemsetAsync(out.data(), 0xdd, kBytes, stream));
      CUDA_OK(cudaMemcpyAsync(log.data() + 2 * round, in.data(), 1, cudaMemcpyDefault, stream));
      CUDA_OK(cudaMemcpyAsync(log.data() + 2 * round + 1, in.data() + kBytes - 1, 1, cudaMemcpyDefault, stream));
    }
    stream.settle();
    const std::vector<std::uint8_t> got = log.get();
    for (int i = 0; i < 2 * kRounds; ++i)
      require(got[static_cast<std::size_t>(i)] == (before + i / 2) % 251, "round " + std::to_string(i / 2));
    leave(comm);
  });
}

// Without a group, everybody sends before anybody receives; and a chain.
TEST_P(GpuTransfers, smallSendsDoNotWait) {
  if (GetParam()->multiNode()) GTEST_SKIP() << "within a node";
  runWell([](Rank& self) {
    fuscoComm_t comm = connect(self);
    const Stream stream;
    const int n = self.ranks(), next = (self.rank() + 1) % n, before = (self.rank() + n - 1) % n;
    constexpr std::size_t kBytes = 100000;
    for (int round = 0; round < 20; ++round) {
      const Tensor out(kBytes), in(kBytes), empty(0);
      out.set(std::vector<std::uint8_t>(kBytes, static_cast<std::uint8_t>(self.rank() + round)));
      FUSCO_OK(fuscoSend(out.data(), kBytes, fuscoUint8, next, comm, stream));
      FUSCO_OK(fuscoSend(empty.data(), 0, fuscoUint8, next, comm, stream));
      CUDA_OK(cudaMemsetAsync(out.data(), 0xdd, kBytes, stream));
      self.barrier();
      FUSCO_OK(fuscoRecv(in.data(), kBytes, fuscoUint8, before, comm, stream));
      FUSCO_OK(fuscoRecv(empty.data(), 0, fuscoUint8, before, comm, stream));
      stream.settle();
      std::vector<std::uint8_t> expected(kBytes + 1, static_cast<std::uint8_t>(before + round));
      expected.back() = kPoison;
      require(in.get() == expected, "round " + std::to_string(round));
    }
    leave(comm);
  });
}

// Larger than the window, from memory that other processes cannot reach, in rows that do not fit it evenly.
TEST_P(GpuTransfers, longOnesGoThroughTheWindowInParts) {
  runWell([](Rank& self) {
    fuscoComm_t comm = connect(self);
    const Stream stream;
    const int n = self.ranks(), next = (self.rank() + 1) % n, before = (self.rank() + n - 1) % n;
    constexpr std::size_t kRowBytes = 7001, kRows = 9000;  // 63 MB
    const Tensor out(kRowBytes * kRows, true), in(kRowBytes * kRows), list(kRows * 4);
    std::vector<std::uint8_t> bytes(kRowBytes * kRows), expected(kRowBytes * kRows + 1, kPoison), words(kRows * 4);
    std::vector<std::int32_t> rows(kRows);
    for (std::size_t i = 0; i < kRows; ++i) rows[i] = static_cast<std::int32_t>(kRows - 1 - i);
    std::memcpy(words.data(), rows.data(), words.size());
    list.set(words);
    fillRow(7, 0, self.rank(), 0, bytes.data(), bytes.size());
    out.set(bytes);
    FUSCO_OK(fuscoGroupStart());
    FUSCO_OK(fuscoGatherSend(out.data(), kRows, kRowBytes, list.data(), fuscoInt32, next, comm, stream));
    FUSCO_OK(fuscoRecv(in.data(), kRowBytes * kRows, fuscoUint8, before, comm, stream));
    FUSCO_OK(fuscoGroupEnd());
    stream.settle();
    fillRow(7, 0, before, 0, bytes.data(), bytes.size());
    for (std::size_t i = 0; i < kRows; ++i)
      std::memcpy(expected.data() + i * kRowBytes, bytes.data() + (kRows - 1 - i) * kRowBytes, kRowBytes);
    require(in.get() == expected, "rows in reverse");
    leave(comm);
  });
}

// Sizes that differ: who sees it is told both, and the communicator is broken for both.
TEST_P(GpuTransfers, sizesThatDifferAreTold) {
  if (GetParam()->ranks != 2) GTEST_SKIP() << "for two ranks";
  runWell([](Rank& self) {
    fuscoComm_t comm = connect(self);
    const Stream stream;
    const Tensor memory(30 << 20);
    const std::size_t sent = 20 << 20;
    const fuscoResult_t result = self.rank() == 0 ? fuscoSend(memory.data(), sent, fuscoUint8, 1, comm, stream)
                                                  : fuscoRecv(memory.data(), 64, fuscoUint8, 0, comm, stream);
    const std::string text = fuscoGetLastError(nullptr);
    require(result == fuscoInvalidUsage, "code " + std::to_string(result) + ": " + text);
    requireContains(text, "rank 0 sends " + std::to_string(sent) + " bytes");
    requireContains(text, "rank 1 expects 64");
    self.barrier();
    fuscoCommAbort(comm);
    comm = connect(self, 1);
    leave(comm);
  });
}

// A rank that dies is told to who waits for it, and the others' GPU goes on working.
TEST_P(GpuTransfers, aKilledRankIsTold) {
  if (GetParam()->threadsPerProcess != 1) GTEST_SKIP() << "for ranks in processes of their own";
  const std::vector<std::string> texts = runRanks(*GetParam(), [](Rank& self) {
    fuscoComm_t comm = connect(self);
    const Stream stream;
    const Tensor memory(30 << 20);
    self.barrier();
    if (self.rank() == 1) kill(getpid(), SIGKILL);
    const fuscoResult_t result = fuscoRecv(memory.data(), 30 << 20, fuscoUint8, 1, comm, stream);
    require(result == fuscoRemoteError, "code " + std::to_string(result) + ": " + fuscoGetLastError(nullptr));
    fuscoCommAbort(comm);
    memory.set(std::vector<std::uint8_t>(1000, 7));
    require(memory.get()[999] == 7, "the GPU goes on");
  });
  for (std::size_t r = 0; r < texts.size(); ++r)
    EXPECT_EQ(texts[r], r == 1 ? "killed by signal 9" : "") << GetParam()->name << ", rank " << r;
}

// One thread drives all ranks on one stream; captured once, replayed with new rows.
TEST_P(GpuTransfers, areCapturedWhereOneThreadDrivesAllRanks) {
  if (GetParam() != &kThreads) GTEST_SKIP() << "once is enough";
  const World alone{"one thread", 1, 1, {}, true, 16384};
  const std::vector<std::string> texts = runRanks(alone, [](Rank& self) {
    constexpr int kRanks = 4;
    constexpr std::size_t kBytes = 70001;
    const fuscoUniqueId id = self.id();
    fuscoComm_t comms[kRanks] = {};
    FUSCO_OK(fuscoGroupStart());
    for (int r = 0; r < kRanks; ++r) {
      fuscoConfig_t config = self.config();
      config.device = fuscoDeviceCuda;
      FUSCO_OK(fuscoCommInitRankConfig(&comms[r], kRanks, id, r, &config));
    }
    FUSCO_OK(fuscoGroupEnd());
    const Stream stream;
    std::vector<std::unique_ptr<Tensor>> in, out;
    for (int r = 0; r < kRanks; ++r) {
      in.push_back(std::make_unique<Tensor>(kBytes * kRanks));
      out.push_back(std::make_unique<Tensor>(kBytes * kRanks));
    }
    const std::vector<std::size_t> counts(kRanks, kBytes);
    std::vector<std::size_t> at;
    for (std::size_t r = 0; r < kRanks; ++r) at.push_back(r * kBytes);
    const auto call = [&] {
      FUSCO_OK(fuscoGroupStart());
      for (std::size_t r = 0; r < kRanks; ++r)
        FUSCO_OK(fuscoAllToAllv(in[r]->data(), counts.data(), at.data(), out[r]->data(), counts.data(), at.data(),
                                fuscoUint8, comms[r], stream));
      FUSCO_OK(fuscoGroupEnd());
    };
    call();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    call();
    CUDA_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    for (std::uint64_t round = 0; round < 5; ++round) {
      for (int r = 0; r < kRanks; ++r) {
        std::vector<std::uint8_t> bytes(kBytes * kRanks);
        fillRow(round, r, 0, 0, bytes.data(), bytes.size());
        in[static_cast<std::size_t>(r)]->set(bytes);
      }
      CUDA_OK(cudaGraphLaunch(exec, stream));
      stream.settle();
      for (int r = 0; r < kRanks; ++r) {
        std::vector<std::uint8_t> expected(kBytes * kRanks + 1, kPoison), bytes(kBytes * kRanks);
        for (int from = 0; from < kRanks; ++from) {
          fillRow(round, from, 0, 0, bytes.data(), bytes.size());
          std::memcpy(expected.data() + static_cast<std::size_t>(from) * kBytes,
                      bytes.data() + static_cast<std::size_t>(r) * kBytes, kBytes);
        }
        require(out[static_cast<std::size_t>(r)]->get() == expected, "replay " + std::to_string(round));
      }
    }
    CUDA_OK(cudaGraphExecDestroy(exec));
    CUDA_OK(cudaGraphDestroy(graph));
    call();
    stream.settle();
    for (fuscoComm_t comm : comms) FUSCO_OK(fuscoCommDestroy(comm));
  });
  EXPECT_EQ(texts[0], "");
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuTransfers,
                         ::testing::Values(&kThreads, &kManyThreads, &kProcesses, &kManyProcesses, &kMixed, &kNodes,
                                           &kNodesOfProcesses),
                         [](const auto& given) {
                           std::string name = given.param->name;
                           std::replace(name.begin(), name.end(), ' ', '_');
                           return name;
                         });

}  // namespace
}  // namespace fusco::test
