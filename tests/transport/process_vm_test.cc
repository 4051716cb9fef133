// Row lists between processes.
#include "transport/local/process_vm.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "base/status.h"

namespace fusco::transport {
namespace {

// A process that has private copies of everything that this one has had, at the same addresses.
class Double {
 public:
  Double() : pid_(fork()) {
    if (pid_ == 0) {
      for (;;) pause();
    }
  }
  ~Double() { end(); }
  pid_t pid() const { return pid_; }
  void end() {
    if (ended_) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    ended_ = true;
  }

 private:
  pid_t pid_;
  bool ended_ = false;
};

// Cuts `total` bytes into pieces of at most `most`, some of them empty, in random order within [base, base + total).
std::vector<Segment> cut(std::byte* base, std::size_t total, std::size_t most, std::mt19937& random) {
  std::vector<Segment> pieces;
  for (std::size_t at = 0; at < total;) {
    const std::size_t step = std::min<std::size_t>(total - at, random() % (most + 1));
    pieces.push_back({base + at, step});
    at += step;
  }
  std::shuffle(pieces.begin(), pieces.end(), random);
  return pieces;
}

std::vector<std::byte> flat(const std::vector<Segment>& pieces) {
  std::vector<std::byte> bytes;
  for (const Segment& piece : pieces) {
    const auto* at = static_cast<const std::byte*>(piece.address);
    bytes.insert(bytes.end(), at, at + piece.bytes);
  }
  return bytes;
}

bool available() {
  static std::uint64_t word = 0x1234;
  Double other;
  return probeVm(other.pid(), reinterpret_cast<std::uint64_t>(&word), 0x1234);
}

TEST(ProcessVm, ListsWithDifferentBordersMeet) {
  if (!available()) GTEST_SKIP() << "process_vm_readv is not allowed here";
  constexpr std::size_t kBytes = 300000;
  std::vector<std::byte> here(kBytes), there(kBytes), back(kBytes);
  Double other;
  for (unsigned seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    for (std::byte& byte : here) byte = static_cast<std::byte>(random());
    const std::size_t most = seed % 3 == 0 ? 40 : seed % 3 == 1 ? 3000 : kBytes;
    const auto local = cut(here.data(), kBytes, most, random);
    const auto remote = cut(there.data(), kBytes, seed % 2 ? 100 : 50000, random);
    moveVm(VmDirection::write, other.pid(), "the double", local, remote);
    std::vector<Segment> whole{{back.data(), kBytes}};
    moveVm(VmDirection::read, other.pid(), "the double", whole, remote);
    EXPECT_EQ(back, flat(local)) << "seed " << seed;
    EXPECT_EQ(there, std::vector<std::byte>(kBytes)) << "this process's own copy was written";
    // And the same within a process.
    moveLocal(VmDirection::write, local, remote);
    EXPECT_EQ(flat(remote), flat(local)) << "seed " << seed;
    std::fill(there.begin(), there.end(), std::byte{0});
  }
}

TEST(ProcessVm, EmptyAndUnequalLists) {
  char byte = 0;
  std::vector<Segment> none, empty{{&byte, 0}}, one{{&byte, 1}};
  moveVm(VmDirection::write, getpid(), "nobody", none, none);
  moveVm(VmDirection::write, getpid(), "nobody", none, empty);
  EXPECT_THROW(moveVm(VmDirection::write, getpid(), "nobody", one, none), Error);
}

Code codeOf(const std::function<void()>& action, const char* words) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("rank 3 (here:1)"), std::string::npos) << error.what();
    return error.code();
  }
  return Code::success;
}

TEST(ProcessVm, FailuresAreNamed) {
  if (!available()) GTEST_SKIP() << "process_vm_readv is not allowed here";
  std::vector<std::byte> here(4096 * 4);
  Double other;
  // The peer has no memory there, in the middle of the list.
  void* hole = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::vector<Segment> local{{here.data(), 8192}}, remote{{here.data(), 4096}, {hole, 4096}};
  auto move = [&] { moveVm(VmDirection::write, other.pid(), "rank 3 (here:1)", local, remote); };
  EXPECT_EQ(codeOf(move, "mapped"), Code::invalidArgument);
  munmap(hole, 4096);
  other.end();
  EXPECT_EQ(codeOf(move, "ended"), Code::remoteError);
}

TEST(ProcessVm, TheProbeWantsTheRightWord) {
  static std::uint64_t word = 77;
  if (!available()) GTEST_SKIP() << "process_vm_readv is not allowed here";
  Double other;
  const auto address = reinterpret_cast<std::uint64_t>(&word);
  EXPECT_TRUE(probeVm(other.pid(), address, 77));
  EXPECT_FALSE(probeVm(other.pid(), address, 78));
  EXPECT_FALSE(probeVm(other.pid(), 8, 77));
  EXPECT_FALSE(probeVm(0, address, 77));
}

}  // namespace
}  // namespace fusco::transport
