// Send, receive and lists of rows between ranks on GPUs of several nodes, with the stand-in for the GPU: the random
// cases of the host, every byte checked.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "api/transfer_case.h"
#include "device/stand_in.h"
#include "exec/cuda.h"

namespace fusco::test {
namespace {

constexpr std::uint8_t kPoison = 0x5a;

// Poisoned, with a byte behind it.
class Tensor {
 public:
  Tensor(StandInSpace& space, std::size_t bytes) : space_(space), bytes_(bytes + 1) {
    data_ = space.allocate(bytes_, true);
    set(std::vector<std::uint8_t>(bytes_, kPoison));
  }
  ~Tensor() { space_.release(data_, true); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  void* data() const { return data_; }
  void set(const std::vector<std::uint8_t>& bytes) {
    if (!bytes.empty()) space_.write(data_, bytes.data(), bytes.size());
  }
  std::vector<std::uint8_t> get() {
    std::vector<std::uint8_t> bytes(bytes_);
    space_.read(bytes.data(), data_, bytes_);
    return bytes;
  }

 private:
  StandInSpace& space_;
  std::size_t bytes_;
  void* data_;
};

std::vector<std::uint8_t> sentBytes(const Planned& t) {
  std::vector<std::uint8_t> bytes(t.sendSpan());
  fillRow(t.seed, 0, 0, 0, bytes.data(), bytes.size());
  return bytes;
}

struct End {
  const Planned* planned;
  bool send;
  std::unique_ptr<Tensor> rows, list;

  End(const Planned& t, bool sends, StandInSpace& space) : planned(&t), send(sends) {
    rows = std::make_unique<Tensor>(space, send ? t.sendSpan() : t.receiveSpan());
    if (send) rows->set(sentBytes(t));
    const std::vector<std::int64_t>& wide = send ? t.sendList : t.receiveList;
    const std::vector<std::int32_t> narrow(wide.begin(), wide.end());
    std::vector<std::uint8_t> bytes(wide.size() * (t.int32 ? 4 : 8));
    if (!bytes.empty())
      std::memcpy(bytes.data(), t.int32 ? static_cast<const void*>(narrow.data()) : wide.data(), bytes.size());
    list = std::make_unique<Tensor>(space, bytes.size());
    list->set(bytes);
  }

  void post(fuscoComm_t comm, cudaStream_t stream) const {
    const Planned& t = *planned;
    const bool listed = send ? t.sendListed : t.receiveListed;
    const void* const indices = listed ? list->data() : nullptr;
    const fuscoDataType_t type = t.int32 ? fuscoInt32 : fuscoInt64;
    if (send) {
      FUSCO_OK(fuscoGatherSend(rows->data(), t.sendRows, t.sendRowBytes, indices, type, t.to, comm, stream));
    } else {
      FUSCO_OK(fuscoScatterRecv(rows->data(), t.receiveRows, t.receiveRowBytes, indices, type, t.from, comm, stream));
    }
  }

  std::string wrong(std::uint64_t seed) const {
    const Planned& t = *planned;
    const std::vector<std::uint8_t> sent = sentBytes(t), got = rows->get();
    std::vector<std::uint8_t> expected(t.receiveSpan() + 1, kPoison);
    for (std::size_t at = 0; at < t.bytes(); ++at) expected[t.receiveAt(at)] = sent[t.sendAt(at)];
    if (got == expected) return "";
    return "seed " + std::to_string(seed) + ": " + std::to_string(t.bytes()) + " bytes from " + std::to_string(t.from) +
           " to " + std::to_string(t.to);
  }
};

std::string randomGroup(fuscoComm_t comm, int rank, int ranks, std::uint64_t seed, StandInSpace& space) {
  std::mt19937_64 random(seed);
  std::vector<Planned> transfers;
  const std::size_t count = 1 + random() % 14;
  for (std::size_t i = 0; i < count; ++i) transfers.push_back(randomTransfer(random, ranks));
  std::vector<End> ends;
  for (const Planned& t : transfers) {
    if (t.from == rank) ends.emplace_back(t, true, space);
    if (t.to == rank) ends.emplace_back(t, false, space);
  }
  FUSCO_OK(fuscoGroupStart());
  for (const End& end : ends) end.post(comm, space.stream());
  FUSCO_OK(fuscoGroupEnd());
  for (const End& end : ends) {
    const std::string text = end.send ? "" : end.wrong(seed);
    if (!text.empty()) return text;
  }
  return "";
}

TEST(DeviceTransfersAcrossNodes, randomGroups) {
  const std::vector<int> nodes = {0, 0, 1, 2};
  const int ranks = static_cast<int>(nodes.size());
  const char* const wanted = std::getenv("FUSCO_TEST_GROUPS");
  const std::uint64_t groups = wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : 60;
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess) << fuscoGetLastError(nullptr);
  std::vector<std::string> wrong(nodes.size());
  runThreads(ranks, [&](int rank) {
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    config.nodeId = nodes[static_cast<std::size_t>(rank)];
    config.sliceBytes = 4096;
    config.operationTimeoutMs = 20000;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, ranks, id, rank, &config));
    std::string& text = wrong[static_cast<std::size_t>(rank)];
    try {
      StandInSpace space;
      for (std::uint64_t seed = 1; seed <= groups && text.empty(); ++seed)
        text = randomGroup(comm, rank, ranks, seed, space);
    } catch (const std::exception& e) {
      text = e.what();
    }
    if (!text.empty()) {
      fuscoCommAbort(comm);
      return;
    }
    FUSCO_OK(fuscoCommFinalize(comm));
    FUSCO_OK(fuscoCommDestroy(comm));
  });
  for (const std::string& text : wrong) EXPECT_EQ(text, "");
}

// A small send is over before its receiver comes. When that expects another size the sender is told, though it calls
// nothing more.
TEST(DeviceTransfersInANode, whoHasSentHearsOfAnotherSize) {
  fuscoUniqueId id;
  ASSERT_EQ(fuscoGetUniqueId(&id), fuscoSuccess) << fuscoGetLastError(nullptr);
  fuscoResult_t before = fuscoInternalError, told = fuscoSuccess, got = fuscoSuccess;
  std::string text;
  std::atomic<bool> sent{false}, over{false}, gone{false};
  const auto until = [](const auto& condition) {
    for (int i = 0; i < 2000 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  runThreads(2, [&](int rank) {
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    config.operationTimeoutMs = 20000;
    fuscoComm_t comm = nullptr;
    FUSCO_OK(fuscoCommInitRankConfig(&comm, 2, id, rank, &config));
    // The stand-in follows waits between streams, so that these have to live as long as who waits.
    StandInSpace space;
    {
      const Tensor tensor(space, 64);
      if (rank == 0) {
        FUSCO_OK(fuscoSend(tensor.data(), 8, fuscoInt8, 1, comm, space.stream()));
        FUSCO_OK(fuscoSend(tensor.data(), 40, fuscoInt8, 1, comm, space.stream()));
        FUSCO_OK(fuscoCommGetAsyncError(comm, &before));
        sent = true;
        until([&] { return fuscoCommGetAsyncError(comm, &told) != fuscoSuccess || told != fuscoSuccess; });
        text = fuscoGetLastError(comm);
        over = true;
      } else {
        until([&] { return sent.load(); });
        FUSCO_OK(fuscoRecv(tensor.data(), 8, fuscoInt8, 0, comm, space.stream()));
        got = fuscoRecv(tensor.data(), 20, fuscoInt8, 0, comm, space.stream());
        until([&] { return over.load(); });
      }
    }
    if (rank == 0) until([&] { return gone.load(); });
    fuscoCommAbort(comm);
    if (rank == 1) gone = true;
  });
  EXPECT_EQ(before, fuscoSuccess);
  EXPECT_EQ(got, fuscoInvalidUsage);
  EXPECT_EQ(told, fuscoInvalidUsage);
  EXPECT_NE(text.find("rank 0 sends 40 bytes, rank 1 expects 20"), std::string::npos) << text;
}

}  // namespace
}  // namespace fusco::test
