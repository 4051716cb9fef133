// One way to carry out a shuffle on GPUs, for all ranks of this process.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "shuffle/cuda/tensors.h"
#include "shuffle/cuda/world.h"

namespace fusco::bench::gpu {

using Parts = std::vector<std::pair<std::string, double>>;  // name, microseconds

class Shuffle {
 public:
  virtual ~Shuffle() = default;
  // Puts so many shuffles on the streams, behind what is on the lead's, and the lead behind them.
  virtual void enqueue(int times) = 0;
  // Whether enqueue() can be captured from the lead.
  virtual bool capturable() const { return true; }
  // Whether the scales beside the rows are brought, too (--scales).
  virtual bool bringsScales() const { return false; }
  // What it is made of, each part timed alone.
  virtual Parts parts() { return {}; }
  // What a reader of the row must know.
  virtual std::string remark() const { return ""; }
};

// Microseconds of one of `times` shuffles that `work(times)` enqueues, from event to event on the lead.
double timeOf(World& world, const std::function<void(int)>& work, int times);
// Median of a few.
double quickTimeOf(World& world, const std::function<void(int)>& work);

// What rows in the memory of one GPU cost at most: the best of several kernels, found here.
std::unique_ptr<Shuffle> makeOnePass(World& world, Tensors& tensors, const Options& options);
// A device copy, and how many bytes it reads and writes together.
std::unique_ptr<Shuffle> makeDeviceCopy(World& world, Tensors& tensors);
std::size_t bytesOfDeviceCopy(const Shuffle& copy);
// Several GPUs: one copy a token and rank, from one piece of memory into another.
std::unique_ptr<Shuffle> makePeerCopy(World& world, Tensors& tensors);
std::uint64_t wrongInPeerCopy(Shuffle& peerCopy);
// Bytes that leave the busiest GPU, or reach it, whichever is more.
std::uint64_t busiestLinkBytes(Shuffle& peerCopy);

std::unique_ptr<Shuffle> makeStaged(World& world, Tensors& tensors, const Options& options);

class Nccl;
// Throws std::runtime_error that says why there is none.
std::shared_ptr<Nccl> openNccl(World& world);
std::string ncclVersion(const Nccl& nccl);
std::unique_ptr<Shuffle> makeNccl(World& world, Tensors& tensors, const Options& options, std::shared_ptr<Nccl> nccl);

class Communicators;
// Of fusco, with a budget of multiprocessors for each GPU (0: all). Throws.
std::shared_ptr<Communicators> openFusco(World& world, const Options& options, int sms);
class FuscoShuffle : public Shuffle {
 public:
  // Planning alone, as enqueue() does it.
  virtual void enqueuePlans(int times) = 0;
};
std::unique_ptr<FuscoShuffle> makeFusco(World& world, Tensors& tensors, const Options& options,
                                        std::shared_ptr<Communicators> communicators);

}  // namespace fusco::bench::gpu
