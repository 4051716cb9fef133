// Ranks for tests: as threads of this process, or as forked processes that are reaped.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/fabric.h"

namespace fusco::comm::testing {

enum class Kind { threads, processes };
const char* nameOf(Kind kind);

using Body = std::function<void(Fabric& fabric)>;

// Connects `ranks` ranks with `config` (rank and ranks are filled in) and runs the body on each. Returns one text per
// rank: empty, or what it threw. nodes: label per rank, empty for one node.
std::vector<std::string> runRanks(Kind kind, int ranks, FabricConfig config, const Body& body,
                                  const std::vector<int>& nodes = {});

// Each rank with its own configuration.
std::vector<std::string> runConfigs(Kind kind, const std::vector<FabricConfig>& configs, const Body& body);

// The same, expecting no error.
void expectRanks(Kind kind, int ranks, const FabricConfig& config, const Body& body,
                 const std::vector<int>& nodes = {});

// One rank each with its own configuration; `connect` only.
std::vector<std::string> connectOnly(Kind kind, const std::vector<FabricConfig>& configs, const char id[128]);

// Fails the rank.
void require(bool condition, const std::string& what);

// Open descriptors, threads and mappings of this process.
struct Footprint {
  int descriptors = 0;
  int threads = 0;
  int mappings = 0;
};
Footprint footprint();
// What there is more of than before, or "". What ends by itself has 3 s for it: the last meeting place; a thread that
// was joined may still be seen for a moment.
std::string leftBehind(const Footprint& before);

// Processes in which `body(i)` runs; its text is what they return.
class Children {
 public:
  explicit Children(int count, const std::function<std::string(int)>& body);
  ~Children();
  pid_t pid(int i) const { return pids_[i]; }
  // Waits for all. "killed" for who died by a signal.
  std::vector<std::string> join();

 private:
  std::vector<pid_t> pids_;
  std::vector<int> pipes_;
};

// A page that forked children share.
template <typename T>
class SharedPage;
void* mapShared(std::size_t bytes);
void unmapShared(void* at, std::size_t bytes);

template <typename T>
class SharedPage {
 public:
  SharedPage() : value_(new (mapShared(sizeof(T))) T()) {}
  ~SharedPage() { unmapShared(value_, sizeof(T)); }
  SharedPage(const SharedPage&) = delete;
  SharedPage& operator=(const SharedPage&) = delete;
  T* operator->() const { return value_; }
  T& operator*() const { return *value_; }

 private:
  T* value_;
};

}  // namespace fusco::comm::testing
