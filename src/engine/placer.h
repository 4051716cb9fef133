// Brings rows to their places in the memory of this node's ranks: straight into mapped memory, or by process_vm_writev.
// Used by the rank that has the rows and by the forwarder that got them in a slice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/meeting.h"
#include "engine/plan_state.h"
#include "plan/layout.h"

namespace fusco::engine {

class Engine;

inline constexpr int kTensors = 3;  // rows, second tensor or scales, rank order's ids and weights

struct PlaceRequest {
  int tensor = 0;
  const std::byte* rows = nullptr;
  std::size_t stride = 0;
  bool packed = false;
  const plan::Copy* copies = nullptr;
  const plan::Entry* entries = nullptr;
  std::size_t begin = 0, end = 0;
  std::size_t rowBytes = 0;   // of the whole row
  std::size_t rowOffset = 0;  // where this part of it lies
  std::size_t partBytes = 0;  // bytes of this part
  bool ofLibrary = false;     // memory of the library, on the host whatever the communicator is on
};

class Placer {
 public:
  explicit Placer(Engine& engine) : engine_(engine) {}

  // Learns from the node's announcements where rows go. Own memory is given by address. `roles[t]` is the memory of
  // tensor t.
  void bind(const Meeting& meeting, int tensors, const MemoryRole* roles, std::byte* const* ownMemory);
  void place(const PlaceRequest& request);
  // Writes tickets and landing lists for these copies, as the receivers have asked.
  void describe(int source, const plan::Copy* copies, const plan::Entry* entries, const float* weights,
                std::size_t begin, std::size_t end);
  bool describes() const { return describes_; }
  // Adds the rows of these copies to their experts' counters, after what was placed before has become visible.
  void count(const plan::Copy* copies, const plan::Entry* entries, std::size_t begin, std::size_t end);
  bool counts() const { return counts_; }
  // Mapped bases by local rank, or null: for kernels that do more than copy (cast, backward). `everyRank` tells whether
  // all ranks can be reached so, without leaving duplicates out.
  std::byte* const* bases(int tensor) const { return all_[tensor].data(); }
  // Where a rank's rows can be written from here, every one of them that has no duplicate; or null.
  std::byte* base(int tensor, int localIndex) const {
    const auto at = static_cast<std::size_t>(localIndex);
    return all_[tensor][at] != nullptr ? all_[tensor][at] : primaries_[tensor][at];
  }
  bool everyRank() const { return !anyPrimaries_ && vmRanks_.empty(); }
  const std::vector<int>& vmRanks() const { return vmRanks_; }

 private:
  void placeByVm(const PlaceRequest& request, int localIndex);

  Engine& engine_;
  std::vector<std::byte*> all_[kTensors];        // ranks that take every entry
  std::vector<std::byte*> primaries_[kTensors];  // ranks that take primaries only
  std::vector<std::uint64_t> remote_[kTensors];  // addresses in the owner, for process_vm; else 0
  std::vector<std::byte*> shifted_;
  std::vector<int> vmRanks_;
  std::vector<std::uint32_t> flags_;
  std::vector<Ticket*> tickets_;
  std::vector<std::uint32_t*> landing_;
  std::vector<CounterBoard*> counters_;
  bool anyPrimaries_ = false;
  bool describes_ = false;
  bool counts_ = false;
};

}  // namespace fusco::engine
