// GPU memory is registered by dmabuf, else by peermem, and nothing is left behind; with stand-ins for the GPU's driver
// and for libibverbs's functions, so that each of them can refuse.
#include "transport/verbs/gpu_region.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

namespace fusco::transport {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

struct FakeGpu final : GpuMemory {
  bool exports = true;
  std::byte* begin = nullptr;
  std::size_t bytes = 0;
  int descriptor = -1;

  std::string name() const override { return "GPU 7"; }
  std::byte* allocate(std::size_t) override { return nullptr; }
  void release(std::byte*) noexcept override {}
  UniqueFd exportPages(std::byte* from, std::size_t count, std::string* why) override {
    begin = from;
    bytes = count;
    if (!exports) {
      *why = "it exports none";
      return {};
    }
    descriptor = ::memfd_create("pages", MFD_CLOEXEC);
    return UniqueFd(descriptor);
  }
  Flush flushing() const override { return Flush::none; }
  void flush() override {}
};

// What libibverbs was asked for last.
struct Asked {
  std::uint64_t offset, address;
  std::size_t bytes;
  int access, descriptor;
  bool open;  // the descriptor was, then
  int dmaBufs, plain;
} asked;
ibv_mr theRegion;

ibv_mr* takeDmaBuf(ibv_pd*, std::uint64_t offset, std::size_t bytes, std::uint64_t address, int descriptor,
                   int access) {
  asked = {offset,     address, bytes, access, descriptor, ::fcntl(descriptor, F_GETFD) >= 0, asked.dmaBufs + 1,
           asked.plain};
  return &theRegion;
}
ibv_mr* refuseDmaBuf(ibv_pd*, std::uint64_t, std::size_t, std::uint64_t, int, int) {
  ++asked.dmaBufs;
  errno = EOPNOTSUPP;
  return nullptr;
}
ibv_mr* takePlain(ibv_pd*, void* address, std::size_t bytes, int access) {
  asked = {0, reinterpret_cast<std::uint64_t>(address), bytes, access, -1, false, asked.dmaBufs, asked.plain + 1};
  return &theRegion;
}
ibv_mr* refusePlain(ibv_pd*, void*, std::size_t, int) {
  ++asked.plain;
  errno = EFAULT;
  return nullptr;
}

class GpuRegionTest : public ::testing::Test {
 protected:
  GpuRegionTest() {
    asked = {};
    verbs.regDmaBufMr = takeDmaBuf;
    verbs.regMr = takePlain;
  }
  GpuRegion make(std::uintptr_t address, std::size_t bytes) {
    return registerGpuMemory(verbs, nullptr, gpu, reinterpret_cast<std::byte*>(address), bytes,
                             IBV_ACCESS_REMOTE_WRITE);
  }
  bool exportedIsClosed() const { return ::fcntl(gpu.descriptor, F_GETFD) < 0 && errno == EBADF; }

  VerbsLibrary verbs{};
  FakeGpu gpu;
  const std::uintptr_t page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
};

TEST_F(GpuRegionTest, aDmabufIsOfWholePages) {
  const std::uintptr_t address = 40 * page + 512;
  const GpuRegion made = make(address, 2 * page);
  EXPECT_EQ(made.region, &theRegion);
  EXPECT_EQ(made.by, "dmabuf");
  EXPECT_EQ(made.why, "");
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(gpu.begin), 40 * page);
  EXPECT_EQ(gpu.bytes, 3 * page);
  // The key is for the addresses that the GPU has.
  EXPECT_EQ(asked.offset, 512u);
  EXPECT_EQ(asked.address, address);
  EXPECT_EQ(asked.bytes, 2 * page);
  EXPECT_EQ(asked.access, IBV_ACCESS_REMOTE_WRITE);
  EXPECT_TRUE(asked.open);
  EXPECT_TRUE(exportedIsClosed());
  EXPECT_EQ(asked.plain, 0);
  make(40 * page, page);
  EXPECT_EQ(asked.offset, 0u);
  EXPECT_EQ(gpu.bytes, page);
}

TEST_F(GpuRegionTest, peermemIsTriedWhereTheNicTakesNoDmabuf) {
  verbs.regDmaBufMr = refuseDmaBuf;
  const GpuRegion made = make(40 * page + 512, page);
  EXPECT_EQ(made.region, &theRegion);
  EXPECT_EQ(made.by, "peermem");
  EXPECT_THAT(made.why, HasSubstr("dmabuf: the NIC's driver refuses: Operation not supported"));
  EXPECT_EQ(asked.address, 40 * page + 512);
  EXPECT_EQ(asked.bytes, page);
  EXPECT_TRUE(exportedIsClosed());
}

TEST_F(GpuRegionTest, peermemIsTriedWhereTheGpuExportsNone) {
  gpu.exports = false;
  const GpuRegion made = make(40 * page, page);
  EXPECT_EQ(made.by, "peermem");
  EXPECT_THAT(made.why, HasSubstr("dmabuf: it exports none"));
  EXPECT_EQ(asked.dmaBufs, 0);
}

TEST_F(GpuRegionTest, anOldLibraryIsAReasonAndNoError) {
  verbs.regDmaBufMr = nullptr;
  const GpuRegion made = make(40 * page, page);
  EXPECT_EQ(made.by, "peermem");
  EXPECT_THAT(made.why, HasSubstr("libibverbs has no ibv_reg_dmabuf_mr"));
  EXPECT_EQ(gpu.begin, nullptr) << "nothing was exported for nobody";
}

TEST_F(GpuRegionTest, withoutEitherBothReasonsAreTold) {
  verbs.regDmaBufMr = refuseDmaBuf;
  verbs.regMr = refusePlain;
  const GpuRegion made = make(40 * page, page);
  EXPECT_EQ(made.region, nullptr);
  EXPECT_EQ(made.by, "");
  EXPECT_THAT(made.why, HasSubstr("dmabuf: the NIC's driver refuses: Operation not supported"));
  EXPECT_THAT(made.why, HasSubstr("peermem: Bad address (is the module nvidia_peermem loaded?)"));
  EXPECT_TRUE(exportedIsClosed());
}

TEST(GpuFlush, OnceForAllThatHaveArrived) {
  ArrivalFlush flush;
  EXPECT_TRUE(flush.wanted(0, 3));
  EXPECT_FALSE(flush.wanted(0, 3)) << "looked at twice";
  EXPECT_FALSE(flush.wanted(1, 4));
  EXPECT_FALSE(flush.wanted(2, 5));
  EXPECT_TRUE(flush.wanted(3, 5)) << "it came after the flush";
  EXPECT_FALSE(flush.wanted(4, 5));
}

TEST(GpuFlush, RuleByWhatTheDriverSays) {
  using Flush = GpuMemory::Flush;
  struct Case {
    int major, ordering, options;
    Flush rule;
  };
  for (const Case& c : {Case{9, 100, 1, Flush::none},
                        {9, 200, 0, Flush::none},
                        {10, 100, 1, Flush::none},
                        {9, 0, 1, Flush::call},
                        {9, 0, 2, Flush::impossible},
                        {8, 100, 1, Flush::call},
                        {8, 200, 0, Flush::impossible}}) {
    EXPECT_EQ(flushRule(c.major, c.ordering, c.options), c.rule) << c.major << " " << c.ordering << " " << c.options;
  }
}

}  // namespace
}  // namespace fusco::transport
