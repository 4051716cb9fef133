// Payloads that go from GPU memory to GPU memory, in the soft-RoCE machine. The GPU is the stand-in, whose memory the
// host cannot touch; libibverbs registers it by the stand-in's own way there, as if it had a dmabuf, or a driver that
// knows the addresses. So all is real but the GPU and the registration. This program runs whole shuffles and transfers
// so, too: those of tests/device.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <set>
#include <vector>

#include "base/log.h"
#include "device/stand_in.h"
#include "engine/device/nic_memory.h"
#include "exec/cuda.h"
#include "rdma/pair.h"
#include "transport/verbs/library.h"

namespace fusco::transport {
namespace {

using ::testing::HasSubstr;
using testing::VerbsPair;

// Regions of GPU memory: how often each way was gone, and those that are there.
struct Registered {
  std::mutex mutex;
  bool dmaBuf = true, plain = true;  // which ways there are
  int dmaBufs = 0, plains = 0;
  std::set<ibv_mr*> alive;
};
Registered& registered() {
  static Registered one;
  return one;
}
const VerbsLibrary* real = nullptr;
ibv_mr* (*registerAt)(ibv_pd*, void*, std::size_t, std::uint64_t, int) = nullptr;  // ibv_reg_mr_iova

ibv_mr* registerShadow(ibv_pd* domain, std::uint64_t address, std::size_t bytes, int access) {
  std::byte* const shadow = test::shadowOf(reinterpret_cast<void*>(address));
  ibv_mr* const region = registerAt(domain, shadow, bytes, address, access);
  if (region != nullptr) registered().alive.insert(region);
  return region;
}
ibv_mr* dmaBuf(ibv_pd* domain, std::uint64_t offset, std::size_t bytes, std::uint64_t address, int descriptor,
               int access) {
  std::lock_guard lock(registered().mutex);
  struct stat file {};
  if (!registered().dmaBuf) return real->regDmaBufMr(domain, offset, bytes, address, descriptor, access);
  if (test::shadowOf(reinterpret_cast<void*>(address)) == nullptr || ::fstat(descriptor, &file) != 0) {
    errno = EINVAL;
    return nullptr;
  }
  ++registered().dmaBufs;
  return registerShadow(domain, address, bytes, access);
}
ibv_mr* plain(ibv_pd* domain, void* address, std::size_t bytes, int access) {
  std::lock_guard lock(registered().mutex);
  if (!registered().plain || test::shadowOf(address) == nullptr) return real->regMr(domain, address, bytes, access);
  ++registered().plains;
  return registerShadow(domain, reinterpret_cast<std::uint64_t>(address), bytes, access);
}
int deregister(ibv_mr* region) {
  std::lock_guard lock(registered().mutex);
  registered().alive.erase(region);
  return real->deregMr(region);
}
void ways(bool dmaBuf, bool plain) {
  std::lock_guard lock(registered().mutex);
  registered().dmaBuf = dmaBuf;
  registered().plain = plain;
  registered().dmaBufs = registered().plains = 0;
}
std::size_t left() {
  std::lock_guard lock(registered().mutex);
  return registered().alive.size();
}

class StandInForVerbs : public ::testing::Environment {
 public:
  void SetUp() override {
    setenv("FUSCO_NET", "verbs", 1);
    setenv("FUSCO_IB_HCA", "=rxe0,rxe2", 1);
    setenv("FUSCO_IB_GPU_MEMORY", "1", 0);  // or as is asked for, to compare
    // The machine is slow.
    setenv("FUSCO_TEST_CASES", "2", 0);
    setenv("FUSCO_TEST_GROUPS", "6", 0);
    test::sayOfNicWrites({8, 0, 1});
    std::string why;
    real = verbsLibrary(&why);
    ASSERT_NE(real, nullptr) << why;
    registerAt = reinterpret_cast<decltype(registerAt)>(
        ::dlsym(::dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL), "ibv_reg_mr_iova"));
    ASSERT_NE(registerAt, nullptr);
    static VerbsLibrary functions = *real;
    functions.regDmaBufMr = dmaBuf;
    functions.regMr = plain;
    functions.deregMr = deregister;
    standInForVerbs(&functions);
  }
  void TearDown() override { EXPECT_EQ(left(), 0u) << "regions of GPU memory are left"; }
};
[[maybe_unused]] const auto* const kEnvironment = ::testing::AddGlobalTestEnvironment(new StandInForVerbs);

// After each test of tests/device between nodes: its payloads did come into GPU memory.
class Watch : public ::testing::EmptyTestEventListener {
  static bool betweenNodes(const ::testing::TestInfo& info) {
    return std::string(info.test_suite_name()).find("Nodes") != std::string::npos;
  }
  void OnTestStart(const ::testing::TestInfo& info) override {
    before_ = test::nicWritesFlushed();
    if (betweenNodes(info)) ways(true, false);
  }
  void OnTestEnd(const ::testing::TestInfo& info) override {
    EXPECT_EQ(left(), 0u) << "regions of GPU memory are left";
    if (!betweenNodes(info) || std::string(getenv("FUSCO_IB_GPU_MEMORY")) != "1") return;
    EXPECT_GT(registered().dmaBufs, 0);
    EXPECT_GT(test::nicWritesFlushed(), before_) << "nothing arrived in GPU memory";
  }
  int before_ = 0;
};
[[maybe_unused]] const bool kWatched = [] {
  ::testing::UnitTest::GetInstance()->listeners().Append(new Watch);
  return true;
}();

constexpr std::size_t kHead = 128, kSlot = 16384;

// Which ends have a GPU.
std::unique_ptr<VerbsPair> pairOf(bool first, bool second, std::array<const char*, 2> devices = {"=rxe0", "=rxe2"}) {
  return std::make_unique<VerbsPair>(4, kSlot, devices, [=](int end, VerbsNics& nics) {
    if (!(end == 0 ? first : second)) return;
    std::string how;
    if (!nics.useGpuMemory(engine::nicMemory(0), &how)) throw std::runtime_error(how);
  });
}

std::byte byteOf(int slice, std::size_t at) { return static_cast<std::byte>(slice * 31 + static_cast<int>(at % 251)); }

void fillSlice(VerbsPair& pair, int slice, std::size_t bytes) {
  std::byte* slot = nullptr;
  ASSERT_TRUE(pair.await(0, [&] { return (slot = pair.a().acquire()) != nullptr; })) << pair.link(0).failure();
  std::byte* const mirror = pair.a().mirrorOf(slot + kHead);
  std::vector<std::byte> all(bytes);
  for (std::size_t i = 0; i < bytes; ++i) all[i] = byteOf(slice, i);
  std::memcpy(slot, all.data(), kHead);
  exec::cuda::copyNow(mirror != nullptr ? mirror : slot + kHead, all.data() + kHead, bytes - kHead);
}
void postSlice(VerbsPair& pair, std::size_t bytes) {
  // acquire() gives the same slot until post().
  if (pair.a().mirrorOf(pair.a().acquire()) != nullptr) {
    pair.a().postMirrored(kHead, bytes);
  } else {
    pair.a().post(bytes);
  }
}
void expectSlice(VerbsPair& pair, int slice, std::size_t bytes, bool inMirror) {
  const std::byte* slot = nullptr;
  ASSERT_TRUE(pair.await(1, [&] { return (slot = pair.b().peek()) != nullptr; })) << pair.link(1).failure();
  const std::byte* const mirror = pair.b().arrivedMirror(slot + kHead);
  ASSERT_EQ(mirror != nullptr, inMirror);
  std::vector<std::byte> all(bytes);
  std::memcpy(all.data(), slot, kHead);
  exec::cuda::copyNow(all.data() + kHead, inMirror ? mirror : slot + kHead, bytes - kHead);
  for (std::size_t i = 0; i < bytes; ++i) ASSERT_EQ(all[i], byteOf(slice, i)) << "slice " << slice << " at " << i;
  pair.b().release();
}

struct Ends {
  bool dmaBuf, first, second;
};
void PrintTo(const Ends& ends, std::ostream* out) {
  *out << (ends.dmaBuf ? "dmabuf" : "peermem") << (ends.first ? " sends" : "") << (ends.second ? " receives" : "");
}
class GpuSlots : public ::testing::TestWithParam<Ends> {};

TEST_P(GpuSlots, payloadsArriveWhereTheyBelong) {
  const Ends ends = GetParam();
  ways(ends.dmaBuf, !ends.dmaBuf);
  const auto pair = pairOf(ends.first, ends.second);
  for (int slice = 0; slice < 12; ++slice) {
    const std::size_t bytes = slice % 3 == 0 ? kSlot : kHead + 64 * static_cast<std::size_t>(slice);
    fillSlice(*pair, slice, bytes);
    postSlice(*pair, bytes);
    expectSlice(*pair, slice, bytes, ends.first && ends.second);
  }
  EXPECT_EQ(pair->link(0).counts().bytesMirrored > 0, ends.first);
  EXPECT_EQ(registered().dmaBufs > 0, ends.dmaBuf);
  EXPECT_EQ(registered().plains > 0, !ends.dmaBuf);
}

INSTANTIATE_TEST_SUITE_P(Rdma, GpuSlots,
                         ::testing::Values(Ends{true, true, true}, Ends{true, true, false}, Ends{true, false, true},
                                           Ends{false, true, true}));

// What the host reads stays in the slot, whatever else there is.
TEST(GpuSlotsOf, aSliceForTheHostComesInTheSlot) {
  ways(true, false);
  const auto pair = pairOf(true, true);
  std::byte* slot = nullptr;
  ASSERT_TRUE(pair->await(0, [&] { return (slot = pair->a().acquire()) != nullptr; }));
  std::memset(slot, 9, 4096);
  pair->a().post(4096);
  const std::byte* came = nullptr;
  ASSERT_TRUE(pair->await(1, [&] { return (came = pair->b().peek()) != nullptr; }));
  EXPECT_EQ(pair->b().arrivedMirror(came + kHead), nullptr);
  EXPECT_EQ(came[4095], std::byte{9});
  pair->b().release();
}

TEST(GpuSlotsOf, oneFlushForAllThatHasArrived) {
  ways(true, false);
  const auto pair = pairOf(true, true);
  const int before = test::nicWritesFlushed();
  for (int slice = 0; slice < 4; ++slice) {
    fillSlice(*pair, slice, 4096);
    postSlice(*pair, 4096);
  }
  // All are there before the first is looked at.
  ASSERT_TRUE(pair->await(1, [&] { return pair->link(1).counts().arrivals >= 4; }));
  EXPECT_EQ(test::nicWritesFlushed(), before) << "the host reads heads without one";
  for (int slice = 0; slice < 4; ++slice) expectSlice(*pair, slice, 4096, true);
  EXPECT_EQ(test::nicWritesFlushed(), before + 1);
  EXPECT_EQ(pair->link(1).counts().flushes, 1u);
  fillSlice(*pair, 4, 4096);
  postSlice(*pair, 4096);
  expectSlice(*pair, 4, 4096, true);
  EXPECT_EQ(test::nicWritesFlushed(), before + 2);
}

TEST(GpuSlotsOf, noFlushWhereTheGpuKeepsTheOrder) {
  ways(true, false);
  test::sayOfNicWrites({9, 100, 1});
  const auto pair = pairOf(true, true);
  test::sayOfNicWrites({8, 0, 1});
  const int before = test::nicWritesFlushed();
  fillSlice(*pair, 0, 4096);
  postSlice(*pair, 4096);
  expectSlice(*pair, 0, 4096, true);
  EXPECT_EQ(test::nicWritesFlushed(), before);
}

TEST(GpuSlotsOf, anotherPortTakesThemOver) {
  ways(true, false);
  const auto pair = pairOf(true, true, {"=rxe0,rxe1", "=rxe2,rxe3"});
  fillSlice(*pair, 0, kSlot);
  pair->link(0).breakQueuePair();
  postSlice(*pair, kSlot);
  expectSlice(*pair, 0, kSlot, true);
  EXPECT_EQ(pair->link(0).moves(), 1);
  fillSlice(*pair, 1, kSlot);
  postSlice(*pair, kSlot);
  expectSlice(*pair, 1, kSlot, true);
}

// Soft-RoCE's own answers: it registers neither.
TEST(GpuSlotsOf, whatTheNicRefusesStaysInHostMemory) {
  ways(false, false);
  const auto nics = VerbsNics::open("=rxe0,rxe2");
  std::string how;
  EXPECT_FALSE(nics->useGpuMemory(engine::nicMemory(0), &how));
  EXPECT_THAT(how, HasSubstr("slots in host memory: rxe0 port 1 cannot register memory of GPU 0 (dmabuf: the NIC's "
                             "driver refuses: Operation not supported; peermem: Bad address"));
  EXPECT_THAT(how, HasSubstr("rxe2 port 1"));
  ways(true, false);
  test::sayOfNicWrites({8, 0, 0});
  EXPECT_FALSE(nics->useGpuMemory(engine::nicMemory(0), &how));
  EXPECT_THAT(how, HasSubstr("only after a read by the NIC, which is not built"));
  test::sayOfNicWrites({8, 0, 1});
  EXPECT_TRUE(nics->useGpuMemory(engine::nicMemory(0), &how));
  EXPECT_EQ(how,
            "slots in memory of GPU 0, registered with rxe0 port 1 by dmabuf; rxe2 port 1 by dmabuf; flushed by the "
            "driver before they are read");
}

}  // namespace
}  // namespace fusco::transport
