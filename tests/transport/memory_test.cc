// Shared memory and windows.
#include "transport/local/memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <thread>
#include <vector>

#include "base/status.h"
#include "transport/local/window.h"

namespace fusco::transport {
namespace {

TEST(SharedMemory, IsZeroedSealedAndSharedWithWhoAttaches) {
  for (std::size_t bytes : {std::size_t{1}, std::size_t{4096}, std::size_t{100000}, (std::size_t{4} << 20) + 4096}) {
    SharedMemory memory = SharedMemory::create("test", bytes);
    ASSERT_GE(memory.bytes(), bytes);
    for (std::size_t i = 0; i < bytes; i += 511) ASSERT_EQ(memory.data()[i], std::byte{0});
    EXPECT_NE(::ftruncate(memory.descriptor(), 0), 0) << "it could be cut";
    SharedMemory other = SharedMemory::attach(memory.descriptor(), bytes);
    other.populate();
    ASSERT_NE(other.data(), memory.data());
    memory.data()[bytes - 1] = std::byte{7};
    EXPECT_EQ(other.data()[bytes - 1], std::byte{7});
    if (bytes >= (std::size_t{2} << 20)) {
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % (std::size_t{2} << 20), 0u);
    }
    // What is given back reads as zero and never kills whoever still maps it.
    memory.discard();
    EXPECT_EQ(other.data()[bytes - 1], std::byte{0});
  }
}

TEST(SharedMemory, RefusesWhatIsTooShortOrNotSealed) {
  SharedMemory memory = SharedMemory::create("test", 4096);
  EXPECT_THROW(SharedMemory::attach(memory.descriptor(), 8192), Error);
  UniqueFd open(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::ftruncate(open.get(), 4096), 0);
  EXPECT_THROW(SharedMemory::attach(open.get(), 4096), Error);
}

TEST(SharedMemory, TooMuchIsAnErrorThatSaysHowMuchThereIs) {
  try {
    SharedMemory::create("a test", std::size_t{1} << 46);
    FAIL() << "64 TiB were given";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::systemError);
    EXPECT_NE(std::string(error.what()).find("67108864 MiB"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("are available"), std::string::npos) << error.what();
  }
}

TEST(Window, IsFoundByAnyAddressInIt) {
  auto* start = static_cast<std::byte*>(allocateWindow(10000));
  auto window = findWindow(start, 1);
  ASSERT_TRUE(window);
  const std::size_t bytes = window->memory.bytes();
  EXPECT_EQ(findWindow(start + 9999, 1), window);
  EXPECT_EQ(findWindow(start, bytes), window);
  EXPECT_EQ(findWindow(start + 1, bytes - 1), window);
  EXPECT_FALSE(findWindow(start + 1, bytes));
  EXPECT_FALSE(findWindow(start, SIZE_MAX));
  int elsewhere;
  EXPECT_FALSE(findWindow(&elsewhere, 1));
  EXPECT_FALSE(removeWindow(start + 1)) << "not its start";
  EXPECT_EQ(removeWindow(start), window);
  EXPECT_FALSE(findWindow(start, 1));
}

TEST(Window, IdsAreNeverGivenTwiceAlsoAtTheSameAddress) {
  std::uint32_t last = 0;
  for (int i = 0; i < 200; ++i) {
    void* start = allocateWindow(4096);
    const std::uint32_t id = findWindow(start, 1)->id;
    EXPECT_GT(id, last);
    last = id;
    removeWindow(start);
  }
}

TEST(Window, ThreadsMayAllocateAndFreeAtOnce) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 100; ++i) {
        void* start = allocateWindow(static_cast<std::size_t>(i) * 100);
        EXPECT_TRUE(findWindow(start, 1));
        EXPECT_TRUE(removeWindow(start));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace fusco::transport
