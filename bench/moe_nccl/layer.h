// The step of the layer: tokens to their experts and back. Three states of the same program.
#pragma once

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fusco/nccl.h"
#include "moe_nccl/device.h"

namespace fusco::bench::moe {

// Throws what the library says.
void ok(ncclResult_t result, const char* what);
#define OK(call) ::fusco::bench::moe::ok((call), #call)

struct Tensors {
  const std::byte* x;  // [tokens] rows
  const std::int64_t* ids;
  const float* weights;  // [tokens, topk]
  std::byte* y;          // [tokens] rows
};

// The parts of a step, in order.
enum Part { kRoute, kThere, kExperts, kBack, kParts };

class Timer {
 public:
  explicit Timer(Device& device) : device_(device) {}
  void begin();
  // What ran since the last call was that part.
  void ends(Part part);
  std::int64_t beginNs() const { return begin_; }
  std::int64_t endNs() const { return last_; }
  const std::array<std::int64_t, kParts>& parts() const { return parts_; }

 private:
  Device& device_;
  std::int64_t begin_ = 0, last_ = 0;
  std::array<std::int64_t, kParts> parts_{};
};

struct World {
  const Shape shape;
  Device& device;
  const ncclComm_t comm;
};

class Layer {
 public:
  virtual ~Layer() = default;
  virtual void step(const Tensors& tensors, Timer& timer) = 0;
};

// What each expert gets from whom, exchanged with plain sends and receives: for the two states without a plan.
class Counts {
 public:
  explicit Counts(const World& world);
  // Sorts the slots and tells the others how many rows will come. Waits for the device.
  void exchange(const std::int64_t* ids);

  const SortedSlots& sorted() const { return sorted_; }
  std::int64_t sendRows(int peer) const;     // rows for that rank's experts
  std::int64_t receiveRows(int peer) const;  // rows that it sends
  std::int64_t sendStart(int peer) const;    // of the rows in the order of the sorted slots
  std::int64_t sentRows() const { return sendStart(world_.shape.ranks); }
  std::int64_t receivedRows() const { return starts_.back(); }
  // First row of each of this rank's experts; one more at the end.
  const std::vector<std::int64_t>& starts() const { return starts_; }
  // Rows as they come in, by source, then expert, and their places by expert, then source.
  const std::vector<Chunk>& chunks() const { return chunks_; }

 private:
  std::int64_t incoming(int peer, int expert) const;

  const World& world_;
  Buffer counts_, incoming_, order_, tokenOf_, sumPlaces_, sumSlots_;
  SortedSlots sorted_{};
  std::vector<std::int64_t> countsHost_, incomingHost_, starts_;
  std::vector<Chunk> chunks_;
};

std::vector<std::string> layerNames();
std::unique_ptr<Layer> makeLayer(const std::string& name, const World& world);
std::unique_ptr<Layer> makeNcclLayer(const World& world);
std::unique_ptr<Layer> makeIndexedLayer(const World& world);
std::unique_ptr<Layer> makeShuffleLayer(const World& world);

}  // namespace fusco::bench::moe
