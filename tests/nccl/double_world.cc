#include "nccl/double_world.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>

namespace fusco::test {

namespace {
struct Hall {
  std::atomic<int> came;
  std::uint64_t words[64];
};
constexpr int kTicks = 300'000;  // of 100 us

// Names in use: a process that ends while it waits takes them along. Never destroyed, since threads may still wait
// then.
struct Names {
  std::mutex mutex;
  std::set<std::string> open;
};
Names& names() {
  static auto& all = *new Names;
  static const int atExit = std::atexit([] {
    std::lock_guard lock(names().mutex);
    for (const std::string& name : names().open) shm_unlink(name.c_str());
  });
  (void)atExit;
  return all;
}
}  // namespace

std::vector<std::uint64_t> meetAt(std::uint64_t place, int rank, int ranks, std::uint64_t words) {
  const std::string name = "/fusco-double-" + std::to_string(place);
  {
    std::lock_guard lock(names().mutex);
    names().open.insert(name);
  }
  const int file = shm_open(name.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || rank >= 64) return {};
  const bool sized = ftruncate(file, sizeof(Hall)) == 0;
  void* const memory = mmap(nullptr, sizeof(Hall), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (!sized || memory == MAP_FAILED) return {};
  auto& hall = *static_cast<Hall*>(memory);
  hall.words[rank] = words;
  ++hall.came;
  std::vector<std::uint64_t> all;
  for (int tick = 0; tick < kTicks && hall.came < ranks; ++tick) usleep(100);
  if (hall.came == ranks) all.assign(hall.words, hall.words + ranks);
  shm_unlink(name.c_str());
  {
    std::lock_guard lock(names().mutex);
    names().open.erase(name);
  }
  munmap(memory, sizeof(Hall));
  return all;
}

std::uint64_t newPlace() {
  std::uint64_t place = 0;
  return getentropy(&place, sizeof place) == 0 ? place : 0;
}

std::uint64_t mixed(std::uint64_t place, std::uint64_t salt) {
  std::uint64_t x = place + (salt + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  return x ^ (x >> 31);
}

}  // namespace fusco::test
