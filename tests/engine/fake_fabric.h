// All ranks of a communicator in one thread: a fabric without sockets, processes or sleep, whose links deliver late and
// lend slots unwillingly, as a seed says. Whole operations can be stepped through it in any order of ranks.
#pragma once

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "base/status.h"
#include "comm/fabric.h"
#include "engine/control.h"

namespace fusco::engine::testing {

struct AlignedFree {
  void operator()(std::byte* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<std::byte[], AlignedFree>;

// Exactly so many bytes (a multiple of 64), so that a sanitizer sees one too much.
inline AlignedBytes alignedBytes(std::size_t bytes, int fill = 0) {
  AlignedBytes memory(static_cast<std::byte*>(std::aligned_alloc(64, bytes)));
  std::memset(memory.get(), fill, bytes);
  return memory;
}

// Now and then says no, while `on`.
struct Adversary {
  explicit Adversary(std::uint64_t seed) : random(seed) {}
  bool refuses() { return on && random() % 100 < percent; }
  // Changes a few bytes in front of a slice's payload, once in `damagedOf` slices.
  void damage(std::byte* slot) {
    if (damagedOf == 0 || random() % damagedOf != 0) return;
    transport::SliceHeader header;
    std::memcpy(&header, slot, sizeof header);
    for (std::uint64_t n = random() % 3 + 1; n > 0; --n) {
      const std::uint64_t at = random() % 3 == 0 ? random() % header.payloadOffset : random() % sizeof header;
      slot[at] = static_cast<std::byte>(random() % 2 == 0 ? random() % 256 : 0xff);
    }
    ++damaged;
  }
  std::mt19937_64 random;
  unsigned percent = 30;
  unsigned damagedOf = 0;
  std::uint64_t damaged = 0;
  bool on = true;
};

// One direction of a link: a ring of slots with credits.
class FakePipe {
 public:
  FakePipe(std::size_t slotBytes, int slots, Adversary& adversary) : slotBytes_(slotBytes), adversary_(adversary) {
    for (int i = 0; i < slots; ++i) slots_.push_back(alignedBytes(slotBytes, 0xa5));
  }
  std::byte* acquire() {
    if (!acquired_ && (posted_ - released_ == slots_.size() || adversary_.refuses())) return nullptr;
    acquired_ = true;
    return slots_[posted_ % slots_.size()].get();
  }
  void post(std::size_t bytes) {
    if (!acquired_ || bytes > slotBytes_)
      throw std::logic_error("a slot was posted that was not acquired, or too large");
    acquired_ = false;
    adversary_.damage(slots_[posted_ % slots_.size()].get());
    ++posted_;
  }
  const std::byte* peek() {
    if (!seen_ && (released_ == posted_ || adversary_.refuses())) return nullptr;
    seen_ = true;
    return slots_[released_ % slots_.size()].get();
  }
  void release() {
    if (!seen_) throw std::logic_error("a slot was released that was not looked at");
    // Whoever still reads it shall notice.
    std::memset(slots_[released_ % slots_.size()].get(), 0xa5, slotBytes_);
    seen_ = false;
    ++released_;
  }
  bool empty() const { return posted_ == released_; }
  std::size_t slotBytes() const { return slotBytes_; }

 private:
  std::size_t slotBytes_;
  Adversary& adversary_;
  std::vector<AlignedBytes> slots_;
  std::size_t posted_ = 0, released_ = 0;
  bool acquired_ = false, seen_ = false;
};

class FakeLink final : public transport::PostedLink {
 public:
  FakeLink(FakePipe& out, FakePipe& in, bool slow = false) : out_(out), in_(in), slow_(slow) {}
  std::size_t slotBytes() const override { return out_.slotBytes(); }
  std::size_t sliceBytes() override { return slow_ ? slotBytes() / 2 : slotBytes(); }
  std::byte* acquire() override { return out_.acquire(); }
  void post(std::size_t bytes) override { out_.post(bytes); }
  const std::byte* peek() override { return in_.peek(); }
  void release() override { in_.release(); }
  bool drained() override { return out_.empty(); }

 private:
  FakePipe& out_;
  FakePipe& in_;
  const bool slow_;
};

struct FakeConfig {
  std::size_t slotBytes = 4096;
  int slots = 2;
  bool oneProcess = true;  // every address is mapped
  bool processVm = true;   // else only windows are reached
  bool slowLinks = false;  // whose slices are cut short
};

class FakeCluster {
 public:
  FakeCluster(const plan::Topology& topology, const FakeConfig& config, std::uint64_t seed)
      : topology_(topology), config_(config), adversary_(seed), bells_(static_cast<std::size_t>(topology.ranks()), 0) {
    for (int rank = 0; rank < topology.ranks(); ++rank) {
      const auto members = static_cast<int>(topology.ranksOf(topology.nodeOf(rank)).size());
      control_.push_back(alignedBytes((controlBytes(members) + 63) / 64 * 64));
    }
  }
  std::unique_ptr<comm::Fabric> fabric(int rank);
  const plan::Topology& topology() const { return topology_; }
  Adversary& adversary() { return adversary_; }
  bool slowLinks() const { return config_.slowLinks; }
  // Slices that nobody has taken: none when all operations have completed.
  bool quiet() const {
    for (const auto& [key, pipe] : pipes_) {
      if (!pipe->empty()) return false;
    }
    return true;
  }

 private:
  friend class FakeFabric;
  FakePipe& pipe(int from, int to, int channel) {
    auto& found = pipes_[{from, to, channel}];
    if (found == nullptr) found = std::make_unique<FakePipe>(config_.slotBytes, config_.slots, adversary_);
    return *found;
  }
  plan::Topology topology_;
  FakeConfig config_;
  Adversary adversary_;
  std::vector<AlignedBytes> control_;
  std::vector<std::uint32_t> bells_;
  std::map<std::tuple<int, int, int>, std::unique_ptr<FakePipe>> pipes_;
  std::map<std::tuple<int, int, int>, std::unique_ptr<FakeLink>> links_;
  std::string aborted_;
};

class FakeFabric final : public comm::Fabric {
 public:
  FakeFabric(FakeCluster& cluster, int rank) : c_(cluster), rank_(rank) {}
  int rank() const override { return rank_; }
  int ranks() const override { return c_.topology_.ranks(); }
  const plan::Topology& topology() const override { return c_.topology_; }
  std::string describeRank(int rank) const override { return "rank " + std::to_string(rank); }
  std::byte* control(int rank) override {
    requireOwnNode(rank);
    return c_.control_[static_cast<std::size_t>(rank)].get();
  }
  void ring(int rank) override { ++c_.bells_[static_cast<std::size_t>(rank)]; }
  std::uint32_t bell() const override { return c_.bells_[static_cast<std::size_t>(rank_)]; }
  void sleep(std::uint32_t, std::int64_t) override {}
  transport::MemoryRef describe(const void* address, std::size_t bytes) override {
    transport::MemoryRef memory;
    memory.kind =
        comm::windowContains(address, bytes) ? transport::MemoryRef::window : transport::MemoryRef::privateMemory;
    memory.address = reinterpret_cast<std::uint64_t>(address);
    memory.bytes = bytes;
    return memory;
  }
  std::byte* reach(int rank, const transport::MemoryRef& memory) override {
    requireOwnNode(rank);
    const bool reached = rank == rank_ || c_.config_.oneProcess || memory.kind == transport::MemoryRef::window;
    return reached ? reinterpret_cast<std::byte*>(memory.address) : nullptr;
  }
  bool processVm() const override { return c_.config_.processVm; }
  bool oneProcess() const override { return c_.config_.oneProcess; }
  void vmWrite(int rank, std::span<const transport::Segment> local,
               std::span<const transport::Segment> remote) override {
    move(rank, remote, local);
  }
  void vmRead(int rank, std::span<const transport::Segment> local,
              std::span<const transport::Segment> remote) override {
    move(rank, local, remote);
  }
  transport::PostedLink& link(int rank, int ofChannel, int path) override {
    const int channel = path * kChannels + ofChannel;
    if (c_.topology_.nodeOf(rank) == c_.topology_.nodeOf(rank_)) throw std::logic_error("a link within a node");
    auto& found = c_.links_[{rank_, rank, channel}];
    if (found == nullptr)
      found = std::make_unique<FakeLink>(c_.pipe(rank_, rank, channel), c_.pipe(rank, rank_, channel), c_.slowLinks());
    return *found;
  }
  void allGather(const void*, std::size_t, void*, std::int64_t) override {
    throw std::logic_error("all ranks are one thread");
  }
  void check() override {
    if (!c_.aborted_.empty()) fail(Code::remoteError, "aborted: " + c_.aborted_);
  }
  void abort(const std::string& reason) override {
    if (c_.aborted_.empty()) c_.aborted_ = reason.empty() ? "no reason" : reason;
  }
  std::size_t memoryBytes() const override { return 0; }

 private:
  void requireOwnNode(int rank) const {
    if (c_.topology_.nodeOf(rank) != c_.topology_.nodeOf(rank_))
      throw std::logic_error("memory of another node is out of reach");
  }
  void move(int rank, std::span<const transport::Segment> to, std::span<const transport::Segment> from) {
    requireOwnNode(rank);
    if (!c_.config_.processVm || to.size() != from.size())
      throw std::logic_error("process_vm with lists that do not pair up, or not allowed");
    for (std::size_t i = 0; i < to.size(); ++i) {
      if (to[i].bytes != from[i].bytes) throw std::logic_error("process_vm with segments that do not pair up");
      std::memcpy(to[i].address, from[i].address, to[i].bytes);
    }
  }
  FakeCluster& c_;
  int rank_;
};

inline std::unique_ptr<comm::Fabric> FakeCluster::fabric(int rank) { return std::make_unique<FakeFabric>(*this, rank); }

}  // namespace fusco::engine::testing
