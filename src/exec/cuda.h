// The GPU as the engine sees it: memory, streams and events, and the kernels of kernels/launch.h. Streams and events
// are opaque pointers (cudaStream_t, cudaEvent_t). Failed calls throw Error(unhandledCudaError) that names the call. A
// build without CUDA has the same functions: available() is false and tells why, all others throw.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "kernels/across.h"
#include "kernels/beside.h"
#include "kernels/convert.h"
#include "kernels/launch.h"
#include "kernels/meet.h"
#include "kernels/plan.h"

namespace fusco::exec::cuda {

using Stream = void*;

// Whether this build has kernels and this process sees a GPU; else `why` says what is missing.
bool available(std::string* why = nullptr);

// The GPU of this thread.
int currentDevice();
using DeviceId = std::array<unsigned char, 16>;  // the GPU's UUID
DeviceId deviceId(int device);
std::string deviceName(int device);
int multiprocessors(int device);
// Where the GPU sits (base/bus_id.h), and where others of the machine do that it has no path to, or that have none to
// it: of those that this process sees as CUDA says, of the others as NVML says. What nobody knows is a path.
std::uint32_t busIdOf(int device);
std::vector<std::uint32_t> withoutPath(int device);
// Lets kernels on `device` use the memory of `other`; false where the machine has no such path.
bool reachDevice(int device, int other);

// Makes a GPU the thread's for a while, the caller's need not be the communicator's; or for good where the thread is
// the library's own. Meanwhile calls of the library's own (allocations, copies on streams of its own) are legal though
// a stream of the caller's is being captured.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
  int captureMode_ = 0;
};

// Memory of the current GPU.
void* allocate(std::size_t bytes);
void* tryAllocate(std::size_t bytes);  // null: there is not as much
void release(void* pointer) noexcept;
// Host memory that the GPU reads and writes.
void* allocatePinned(std::size_t bytes);
void releasePinned(void* pointer) noexcept;
// Pins host memory that is there already, so that copies to and from it are the GPU's own; false where that is refused.
// Counted: several may pin the same. Unpinned as often, before it is freed.
bool pin(void* memory, std::size_t bytes) noexcept;
void unpin(void* memory) noexcept;

enum class Place { host, device, managed };
struct Where {
  Place place;
  int device;
  bool pinned;  // of host memory: the GPU can reach it
};
Where whereIs(const void* pointer);

// In the order of the stream.
void copy(void* to, const void* from, std::size_t bytes, Stream stream);
void fill(void* pointer, int byte, std::size_t bytes, Stream stream);
void synchronize(Stream stream);
// At once, whatever is on the caller's streams: for memory that no kernel uses yet.
void copyNow(void* to, const void* from, std::size_t bytes);
void fillNow(void* pointer, int byte, std::size_t bytes);
bool capturing(Stream stream);
// Whether the handle stands for a stream of whichever thread uses it (cudaStreamPerThread).
bool isPerThread(Stream stream);
// Which capture the stream is in; 0: none. No two captures of a process have the same number.
unsigned long long captureOf(Stream stream);

// What comes next on a stream that is being captured comes after these nodes of the graph. None (capture is 0) where
// nothing is being captured, and with a CUDA or a driver before 12.3.
struct CaptureEdges {
  unsigned long long capture = 0;
  std::vector<void*> nodes;
  bool operator==(const CaptureEdges&) const = default;
};
CaptureEdges captureEdges(Stream stream);
// Of the same capture: instead of what there is, or besides.
void setCaptureEdges(Stream stream, const CaptureEdges& edges);
void addCaptureEdges(Stream stream, const CaptureEdges& edges);

// Keeps `held` as long as the graph that `stream` is being captured into, and what was instantiated from it. The last
// of these lets go of it on a thread on which CUDA must not be called.
void holdInGraph(Stream stream, std::shared_ptr<const void> held);

class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(Stream stream);
  void waitOn(Stream stream) const;  // what is launched on `stream` from now on comes after the record
  bool reached() const;              // everything before the record has ended
  void wait() const;                 // on the host, until it has
  // On a stream that is being captured: each replay records it, or waits for the record that was the last one then, as
  // calls that are not captured would.
  void recordEachTime(Stream stream);
  void waitOnEachTime(Stream stream) const;

 private:
  void* event_ = nullptr;
};

// Lets what is launched between a begin and its end come after what was launched between those before, whichever
// streams they are on, also within a capture. `eachTime`: what is captured does so each time it is replayed, too, and
// so graphs and calls that are not captured follow each other; else whoever replays graphs orders these. In a capture a
// stream is taken to come after itself: who takes edges away gives them back.
class Order {
 public:
  explicit Order(bool eachTime) : eachTime_(eachTime) {}
  void begin(Stream stream);
  void end(Stream stream);
  std::uint64_t ends() const { return ends_; }  // so far
  // Whether begin waits for no other stream of the capture that `stream` is in.
  bool isFree(Stream stream) const;
  // All that has ended outside of captures, or as a replay with eachTime, is over.
  bool reached() const { return !used_ || end_.reached(); }

 private:
  // What is known of a capture. Of the last few: a program may have several open.
  struct Capture {
    unsigned long long number = 0;
    bool ended = false;
    Stream endedOn = nullptr, waitedOn = nullptr;
    Event end;
    CaptureEdges recorded;  // the last record of end_
  };
  static constexpr std::size_t kMostCaptures = 8;
  Capture& captureNamed(unsigned long long number);
  void recordEachTime(Stream stream, Capture& capture);

  Event end_;
  std::list<Capture> captures_;  // the last one that was used comes first
  std::uint64_t ends_ = 0;
  const bool eachTime_;
  bool used_ = false;
};

// How another process reaches device memory: a handle of the allocation (of virtual memory management: of the pieces
// that [pointer, pointer + bytes) lies in), and where in it.
struct Exported {
  std::array<unsigned char, 64> handle;
  std::uint64_t offset;
  std::uint64_t bytes;  // of the allocation
};
Exported exportMemory(const void* pointer, std::size_t bytes = 1);

// Kernels. The budget counts over all ranks of a launch.
std::size_t planScratchBytes(int experts, int ranks, int nodes);
bool planFits(const kernels::PlanArgs& args);
bool planIsSmall(const kernels::PlanArgs& args);
int planBlocksOfRank(const kernels::PlanArgs& args);
void planCount(const kernels::PlanArgs& args, Stream stream);
void planLay(const kernels::PlanArgs& args, Stream stream);
void plan(const kernels::PlanArgs& args, Stream stream);
void place(const kernels::PlaceArgs& args, const kernels::Budget& budget, Stream stream);
// Whether launches of this shape can bring rows over links once, on the current GPU.
bool placesAcross(const kernels::PlaceArgs& args);
bool sumFillsMultiprocessors(const kernels::SumArgs& args);
void expand(const kernels::ExpandArgs& args, const kernels::Budget& budget, Stream stream);
void meet(const kernels::MeetArgs& args, Stream stream);
void bringMaps(const kernels::BringMapsArgs& args, Stream stream);
void tell(const kernels::TellArgs& args, Stream stream);
void await(const kernels::AwaitArgs& args, Stream stream);
void partial(const kernels::PartialArgs& args, const kernels::Budget& budget, Stream stream);
void placeCounted(const kernels::CountedPlaceArgs& args, const kernels::Budget& budget, Stream stream);
void castPlace(const kernels::CastPlaceArgs& args, const kernels::Budget& budget, Stream stream);
void sum(const kernels::SumArgs& args, const kernels::Budget& budget, Stream stream);
void sumTerms(const kernels::TermSumArgs& args, const kernels::Budget& budget, Stream stream);
void back(const kernels::BackArgs& args, const kernels::Budget& budget, Stream stream);
void gaps(const kernels::GapsArgs& args, const kernels::Budget& budget, Stream stream);
void reset(const kernels::ResetArgs& args, const kernels::Budget& budget, Stream stream);
void describe(const kernels::DescribeArgs& args, const kernels::Budget& budget, Stream stream);

}  // namespace fusco::exec::cuda
