#include "comm/world.h"

#include <dirent.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <thread>

#include "base/clock.h"
#include "base/status.h"

namespace fusco::comm::testing {

const char* nameOf(Kind kind) { return kind == Kind::threads ? "threads" : "processes"; }

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

void* mapShared(std::size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::runtime_error("mmap");
  return at;
}

void unmapShared(void* at, std::size_t bytes) { munmap(at, bytes); }

Children::Children(int count, const std::function<std::string(int)>& body) {
#if defined(__SANITIZE_ADDRESS__)
  // This sanitizer's allocator stays locked in the child of a fork that another thread's allocation coincides with: let
  // the meeting place's thread fall asleep.
  usleep(50'000);
#endif
  // And nobody begins before all are there: a child that calls the meeting place wakes that thread.
  int go[2];
  if (pipe(go) != 0) throw std::runtime_error("pipe");
  for (int i = 0; i < count; ++i) {
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("pipe");
    const pid_t pid = fork();
    if (pid == 0) {
      close(ends[0]);
      for (int fd : pipes_) close(fd);
      close(go[1]);
      char nothing;
      while (read(go[0], &nothing, 1) < 0 && errno == EINTR) {
      }
      close(go[0]);
      std::string text;
      try {
        text = body(i);
      } catch (const std::exception& error) {
        text = error.what();
      }
      if (write(ends[1], text.data(), text.size()) < 0) _exit(2);
      _exit(0);
    }
    close(ends[1]);
    pids_.push_back(pid);
    pipes_.push_back(ends[0]);
  }
  close(go[0]);
  close(go[1]);
}

std::vector<std::string> Children::join() {
  std::vector<std::string> texts;
  for (std::size_t i = 0; i < pids_.size(); ++i) {
    std::string text;
    char buffer[4096];
    for (;;) {
      const ssize_t got = read(pipes_[i], buffer, sizeof(buffer));
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      text.append(buffer, static_cast<std::size_t>(got));
    }
    close(pipes_[i]);
    int status = 0;
    while (waitpid(pids_[i], &status, 0) < 0 && errno == EINTR) {
    }
    if (WIFSIGNALED(status)) text = "killed";
    if (WIFEXITED(status) && WEXITSTATUS(status) != 0 && text.empty()) {
      text = "exit " + std::to_string(WEXITSTATUS(status));
    }
    texts.push_back(text);
  }
  pids_.clear();
  pipes_.clear();
  return texts;
}

Children::~Children() {
  if (!pids_.empty()) join();
}

namespace {

std::string attempt(const std::function<void()>& action) {
  try {
    action();
    return {};
  } catch (const Error& error) {
    return "code " + std::to_string(static_cast<int>(error.code())) + ": " + error.what();
  } catch (const std::exception& error) {
    return error.what();
  }
}

struct IdPage {
  std::atomic<int> ready{0};
  char id[128] = {};
};

std::vector<std::string> runAll(Kind kind, const std::vector<FabricConfig>& configs, const char* given,
                                const Body& body) {
  const int ranks = static_cast<int>(configs.size());
  auto one = [&](int i, const char* id) {
    return attempt([&] {
      auto fabric = Fabric::connect(configs[static_cast<std::size_t>(i)], id);
      body(*fabric);
      // As an engine does it: nobody leaves while others still wait.
      fabric->allGather(nullptr, 0, nullptr, 20000);
    });
  };
  if (kind == Kind::threads) {
    char id[128];
    if (given == nullptr) makeUniqueId(id);
    std::vector<std::string> texts(configs.size());
    std::vector<std::thread> threads;
    for (int i = 0; i < ranks; ++i) {
      threads.emplace_back([&, i] { texts[static_cast<std::size_t>(i)] = one(i, given ? given : id); });
    }
    for (std::thread& thread : threads) thread.join();
    return texts;
  }
  // Forked before this process has a thread; the id comes later.
  SharedPage<IdPage> page;
  Children children(ranks, [&](int i) {
    while (page->ready.load() == 0) usleep(200);
    return one(i, page->id);
  });
  if (given == nullptr) {
    makeUniqueId(page->id);
  } else {
    std::memcpy(page->id, given, 128);
  }
  page->ready.store(1);
  return children.join();
}

}  // namespace

std::vector<std::string> runRanks(Kind kind, int ranks, FabricConfig config, const Body& body,
                                  const std::vector<int>& nodes) {
  std::vector<FabricConfig> configs;
  for (int rank = 0; rank < ranks; ++rank) {
    config.rank = rank;
    config.ranks = ranks;
    if (!nodes.empty()) config.nodeId = nodes[static_cast<std::size_t>(rank)];
    configs.push_back(config);
  }
  return runAll(kind, configs, nullptr, body);
}

std::vector<std::string> runConfigs(Kind kind, const std::vector<FabricConfig>& configs, const Body& body) {
  return runAll(kind, configs, nullptr, body);
}

void expectRanks(Kind kind, int ranks, const FabricConfig& config, const Body& body, const std::vector<int>& nodes) {
  const auto texts = runRanks(kind, ranks, config, body, nodes);
  for (int rank = 0; rank < ranks; ++rank) {
    EXPECT_EQ(texts[static_cast<std::size_t>(rank)], "") << nameOf(kind) << ", rank " << rank << " of " << ranks;
  }
}

std::vector<std::string> connectOnly(Kind kind, const std::vector<FabricConfig>& configs, const char id[128]) {
  return runAll(kind, configs, id, [](Fabric&) {});
}

namespace {

int entriesOf(const char* path) {
  DIR* directory = opendir(path);
  int count = 0;
  while (readdir(directory) != nullptr) ++count;
  closedir(directory);
  return count;
}

}  // namespace

Footprint footprint() {
  Footprint now;
  now.descriptors = entriesOf("/proc/self/fd");
  now.threads = entriesOf("/proc/self/task");
  std::ifstream maps("/proc/self/maps");
  std::string line;
  while (std::getline(maps, line)) now.mappings += line.find("fusco-") != std::string::npos ? 1 : 0;
  return now;
}

std::string leftBehind(const Footprint& before) {
  Footprint after = footprint();
  const auto more = [&] {
    return after.descriptors > before.descriptors || after.threads > before.threads || after.mappings > before.mappings;
  };
  for (const Deadline patience = Deadline::afterMs(3000); more() && !patience.passed(); usleep(10000)) {
    after = footprint();
  }
  if (!more()) return {};
  const auto told = [](const char* what, int first, int last) {
    return std::string(what) + ": " + std::to_string(first) + " before, " + std::to_string(last) + " after; ";
  };
  return told("descriptors", before.descriptors, after.descriptors) + told("threads", before.threads, after.threads) +
         told("mappings", before.mappings, after.mappings);
}

}  // namespace fusco::comm::testing
