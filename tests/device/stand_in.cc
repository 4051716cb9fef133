#include "device/stand_in.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <vector>

#include "base/bus_id.h"
#include "exec/cuda.h"
#include "exec/executor.h"

namespace fusco::exec::cuda {

namespace {

struct Region {
  std::byte* shadow;  // where the stand-in itself reaches it
  std::size_t bytes;
  bool device;
  int file;
  int gpu;  // of memory of a GPU
};

struct Queue {
  std::deque<std::function<void()>> operations;
  std::uint64_t begun = 0;  // operations that were put in, and that have run
  std::uint64_t ended = 0;
};

struct Recorded {
  Queue* queue = nullptr;
  std::uint64_t upTo = 0;
};

// One lock for all: nothing here is to be fast.
struct Gpu {
  std::recursive_mutex mutex;
  std::map<std::uintptr_t, Region> memory;
  Queue defaultQueue;
  NicWrites nicWrites{9, 100, 1};
  int flushed = 0;
  std::set<std::pair<int, int>> noPath;  // from, to
};
Gpu& gpu() {
  static auto* one = new Gpu;
  return *one;
}
using Lock = std::lock_guard<std::recursive_mutex>;

thread_local int currentGpu = 0;

[[noreturn]] void notHere(const char* what) { throw std::logic_error(std::string("not in the stand-in: ") + what); }

Queue& queueOf(Stream stream) { return stream == nullptr ? gpu().defaultQueue : *static_cast<Queue*>(stream); }

const Region* regionOf(const void* pointer, std::uintptr_t* start = nullptr) {
  const auto at = reinterpret_cast<std::uintptr_t>(pointer);
  auto found = gpu().memory.upper_bound(at);
  if (found == gpu().memory.begin()) return nullptr;
  --found;
  if (at >= found->first + found->second.bytes) return nullptr;
  if (start != nullptr) *start = found->first;
  return &found->second;
}

// The address at which the stand-in reaches what a kernel was given.
template <class T>
T* there(T* pointer) {
  std::uintptr_t start = 0;
  const Region* region = regionOf(pointer, &start);
  if (region == nullptr || !region->device) return pointer;
  return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(region->shadow) +
                              (reinterpret_cast<std::uintptr_t>(pointer) - start));
}

bool runOne(Queue& queue) {
  if (queue.operations.empty()) return false;
  auto operation = std::move(queue.operations.front());
  queue.operations.pop_front();
  operation();
  ++queue.ended;
  return true;
}
void runTo(Queue& queue, std::uint64_t upTo) {
  while (queue.ended < upTo && runOne(queue)) {
  }
}
void put(Stream stream, std::function<void()> operation) {
  const Lock lock(gpu().mutex);
  Queue& queue = queueOf(stream);
  queue.operations.push_back(std::move(operation));
  ++queue.begun;
}

std::size_t pages(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

}  // namespace

bool available(std::string*) { return true; }
int currentDevice() { return currentGpu; }
DeviceId deviceId(int device) { return {static_cast<unsigned char>(1 + device)}; }
std::string deviceName(int) { return "stand-in"; }
int multiprocessors(int) { return 8; }
std::uint32_t busIdOf(int device) { return busId(0, static_cast<unsigned>(16 + device), 0); }
std::vector<std::uint32_t> withoutPath(int device) {
  const Lock lock(gpu().mutex);
  std::set<std::uint32_t> none;
  for (const auto& [from, to] : gpu().noPath) {
    if (from == device) none.insert(busIdOf(to));
    if (to == device) none.insert(busIdOf(from));
  }
  return {none.begin(), none.end()};
}
bool reachDevice(int device, int other) {
  const Lock lock(gpu().mutex);
  return !gpu().noPath.contains({device, other});
}
OnDevice::OnDevice(int device) : before_(currentGpu) { currentGpu = device; }
OnDevice::~OnDevice() { currentGpu = before_; }

void* allocate(std::size_t bytes) {
  const Lock lock(gpu().mutex);
  const std::size_t size = pages(std::max<std::size_t>(bytes, 1));
  const int file = memfd_create("stand-in", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(size)) != 0) throw std::runtime_error("memfd");
  void* const address = mmap(nullptr, size, PROT_NONE, MAP_SHARED, file, 0);
  void* const shadow = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (address == MAP_FAILED || shadow == MAP_FAILED) throw std::runtime_error("mmap");
  std::memset(shadow, 0x5a, size);
  gpu().memory[reinterpret_cast<std::uintptr_t>(address)] = {static_cast<std::byte*>(shadow), size, true, file,
                                                             currentGpu};
  return address;
}
void release(void* pointer) noexcept {
  if (pointer == nullptr) return;
  const Lock lock(gpu().mutex);
  const auto found = gpu().memory.find(reinterpret_cast<std::uintptr_t>(pointer));
  munmap(found->second.shadow, found->second.bytes);
  munmap(pointer, found->second.bytes);
  close(found->second.file);
  gpu().memory.erase(found);
}
void* tryAllocate(std::size_t bytes) { return allocate(bytes); }
void* allocatePinned(std::size_t bytes) {
  const Lock lock(gpu().mutex);
  const std::size_t size = pages(std::max<std::size_t>(bytes, 1));
  void* const address = std::aligned_alloc(4096, size);
  gpu().memory[reinterpret_cast<std::uintptr_t>(address)] = {static_cast<std::byte*>(address), size, false, -1, -1};
  return address;
}
void releasePinned(void* pointer) noexcept {
  if (pointer == nullptr) return;
  const Lock lock(gpu().mutex);
  gpu().memory.erase(reinterpret_cast<std::uintptr_t>(pointer));
  std::free(pointer);
}
bool pin(void* memory, std::size_t bytes) noexcept {
  const Lock lock(gpu().mutex);
  auto& [shadow, size, device, file, ofGpu] = gpu().memory[reinterpret_cast<std::uintptr_t>(memory)];
  shadow = static_cast<std::byte*>(memory);
  size = bytes;
  device = false;
  ofGpu = -1;
  --file;  // counts below zero
  return true;
}
void unpin(void* memory) noexcept {
  const Lock lock(gpu().mutex);
  const auto found = gpu().memory.find(reinterpret_cast<std::uintptr_t>(memory));
  if (++found->second.file == 0) gpu().memory.erase(found);
}
Where whereIs(const void* pointer) {
  const Lock lock(gpu().mutex);
  const Region* region = regionOf(pointer);
  if (region == nullptr) return {Place::host, -1, false};
  return {region->device ? Place::device : Place::host, region->device ? region->gpu : -1, !region->device};
}

// As the run time does it: ordinary host memory is read before the call returns, and has been written when it does.
void copy(void* to, const void* from, std::size_t bytes, Stream stream) {
  const Lock lock(gpu().mutex);
  if (regionOf(from) == nullptr) {
    const auto* begin = static_cast<const std::byte*>(from);
    std::vector<std::byte> read(begin, begin + bytes);
    put(stream, [to, read = std::move(read)] { std::memcpy(there(to), read.data(), read.size()); });
  } else {
    put(stream, [=] { std::memcpy(there(to), there(from), bytes); });
  }
  if (regionOf(to) == nullptr) synchronize(stream);
}
void fill(void* pointer, int byte, std::size_t bytes, Stream stream) {
  put(stream, [=] { std::memset(there(pointer), byte, bytes); });
}
void synchronize(Stream stream) {
  const Lock lock(gpu().mutex);
  runTo(queueOf(stream), queueOf(stream).begun);
}
void copyNow(void* to, const void* from, std::size_t bytes) {
  const Lock lock(gpu().mutex);
  std::memcpy(there(to), there(from), bytes);
}
void fillNow(void* pointer, int byte, std::size_t bytes) {
  const Lock lock(gpu().mutex);
  std::memset(there(pointer), byte, bytes);
}
bool capturing(Stream) { return false; }
unsigned long long captureOf(Stream) { return 0; }
CaptureEdges captureEdges(Stream) { return {}; }
void setCaptureEdges(Stream, const CaptureEdges&) {}
void addCaptureEdges(Stream, const CaptureEdges&) {}
bool isPerThread(Stream) { return false; }
void holdInGraph(Stream, std::shared_ptr<const void>) { notHere("holdInGraph"); }

Event::Event() : event_(new Recorded) {}
Event::~Event() { delete static_cast<Recorded*>(event_); }
void Event::record(Stream stream) {
  const Lock lock(gpu().mutex);
  *static_cast<Recorded*>(event_) = {&queueOf(stream), queueOf(stream).begun};
}
void Event::waitOn(Stream stream) const {
  const Recorded recorded = *static_cast<Recorded*>(event_);
  if (recorded.queue != nullptr) put(stream, [recorded] { runTo(*recorded.queue, recorded.upTo); });
}
// Asked again and again it comes nearer.
void Event::recordEachTime(Stream) { notHere("recordEachTime"); }
void Event::waitOnEachTime(Stream) const { notHere("waitOnEachTime"); }
bool Event::reached() const {
  const Lock lock(gpu().mutex);
  const Recorded& recorded = *static_cast<Recorded*>(event_);
  if (recorded.queue == nullptr || recorded.queue->ended >= recorded.upTo) return true;
  runOne(*recorded.queue);
  return false;
}
void Event::wait() const {
  const Lock lock(gpu().mutex);
  const Recorded& recorded = *static_cast<Recorded*>(event_);
  if (recorded.queue != nullptr) runTo(*recorded.queue, recorded.upTo);
}
void Order::begin(Stream stream) {
  if (used_) end_.waitOn(stream);
}
bool Order::isFree(Stream) const { return true; }
void Order::end(Stream stream) {
  end_.record(stream);
  used_ = true;
}
Exported exportMemory(const void*, std::size_t) { notHere("exportMemory"); }

namespace {

exec::PlaceArgs onHost(const kernels::PlaceArgs& args, int rank, std::vector<std::byte*>& bases) {
  const kernels::PlaceArgs::Rank& r = args.ranks[rank];
  bases.assign(std::begin(args.bases), std::end(args.bases));
  for (std::byte*& base : bases) base = there(base);
  const plan::Flow& flow = *there(r.plan.flow);
  exec::PlaceArgs a;
  a.source = there(r.source);
  a.sourceStride = args.sourceStride;
  a.copies = there(r.plan.copies);
  a.entries = there(r.plan.entries);
  a.begin = flow.copyBegin;
  a.end = flow.copyEnd;
  a.bases = bases.data();
  a.destinationStride = args.destinationStride;
  a.rowBytes = args.rowBytes;
  a.skipDuplicates = args.skipDuplicates;
  return a;
}
exec::Executor& scalar() { return *hostExecutor("scalar"); }

}  // namespace

void place(const kernels::PlaceArgs& args, const kernels::Budget&, Stream stream) {
  put(stream, [args] {
    std::vector<std::byte*> bases;
    for (int r = 0; r < args.rankCount; ++r) scalar().place(onHost(args, r, bases));
  });
}
void castPlace(const kernels::CastPlaceArgs& args, const kernels::Budget&, Stream stream) {
  put(stream, [args] {
    std::vector<std::byte*> bases, scales(std::begin(args.scaleBases), std::end(args.scaleBases));
    for (std::byte*& base : scales) base = there(base);
    for (int r = 0; r < args.place.rankCount; ++r) {
      exec::CastArgs a;
      a.place = onHost(args.place, r, bases);
      a.elements = args.place.rowBytes / 2;
      a.scaleBases = scales.data();
      a.scaleStride = args.scaleStride;
      scalar().cast(a);
    }
  });
}
void sumTerms(const kernels::TermSumArgs& args, const kernels::Budget&, Stream stream) {
  put(stream, [args] {
    const auto rows = static_cast<std::size_t>(args.rows);
    const std::uint32_t* first = there(args.first);
    std::vector<std::byte*> out;
    std::vector<const std::byte*> bias;
    std::vector<exec::Term> terms;
    for (std::size_t i = 0; i < rows; ++i) {
      out.push_back(there(there(args.out)[i]));
      bias.push_back(args.bias == nullptr ? nullptr : there(there(args.bias)[i]));
    }
    for (std::uint32_t t = 0; t < first[rows]; ++t) {
      const kernels::Term& term = there(args.terms)[t];
      terms.push_back({there(term.row), term.weight, static_cast<exec::RowType>(term.type)});
    }
    exec::SumArgs a;
    a.out = out.data();
    a.bias = bias.data();
    a.terms = terms.data();
    a.first = first;
    a.rows = rows;
    a.elements = args.elements;
    a.outType = static_cast<exec::RowType>(args.type);
    scalar().sum(a);
  });
}
void back(const kernels::BackArgs& args, const kernels::Budget&, Stream stream) {
  put(stream, [args] {
    std::vector<std::byte*> bases, experts;
    kernels::PlaceArgs place{};
    place.rankCount = args.rankCount;
    place.rowBytes = args.elements * (args.type == kernels::SumType::f32 ? 4 : 2);
    place.sourceStride = args.gradientStride > 0 ? args.gradientStride : place.rowBytes;
    place.destinationStride = args.stride > 0 ? args.stride : place.rowBytes;
    std::copy(std::begin(args.bases), std::end(args.bases), place.bases);
    for (const std::byte* base : args.expertBases) experts.push_back(const_cast<std::byte*>(there(base)));
    for (int r = 0; r < args.rankCount; ++r) {
      place.ranks[r] = {args.ranks[r].plan, args.ranks[r].gradient};
      exec::BackArgs a;
      a.place = onHost(place, r, bases);
      a.weights = there(args.ranks[r].plan.weights);
      a.expertBases = experts.data();
      a.expertStride = place.destinationStride;
      a.type = static_cast<exec::RowType>(args.type);
      std::vector<float> dots(a.place.copies[a.place.end].firstEntry);
      a.dots = dots.data();
      scalar().back(a);
      for (std::size_t i = a.place.begin; i < a.place.end; ++i) {
        for (std::uint32_t e = a.place.copies[i].firstEntry; e < a.place.copies[i + 1].firstEntry; ++e) {
          const auto slot = static_cast<std::size_t>(a.place.entries[e].slot & plan::kSlotMask);
          const std::size_t at = a.place.copies[i].token * static_cast<std::size_t>(args.topk) + slot;
          *there(args.ranks[r].dots + at) = dots[e];
        }
      }
    }
  });
}

// Ranks of one node plan and launch with these.
std::size_t planScratchBytes(int, int, int) { notHere("the planner"); }
bool planFits(const kernels::PlanArgs&) { notHere("the planner"); }
bool planIsSmall(const kernels::PlanArgs&) { return false; }
int planBlocksOfRank(const kernels::PlanArgs&) { return 1; }
void planCount(const kernels::PlanArgs&, Stream) { notHere("the planner"); }
void planLay(const kernels::PlanArgs&, Stream) { notHere("the planner"); }
void plan(const kernels::PlanArgs&, Stream) { notHere("the planner"); }
bool placesAcross(const kernels::PlaceArgs&) { return false; }
bool sumFillsMultiprocessors(const kernels::SumArgs&) { return false; }
void expand(const kernels::ExpandArgs&, const kernels::Budget&, Stream) { notHere("expand"); }
void meet(const kernels::MeetArgs&, Stream) { notHere("meet"); }
void bringMaps(const kernels::BringMapsArgs&, Stream) { notHere("bringMaps"); }
void tell(const kernels::TellArgs&, Stream) { notHere("tell"); }
void await(const kernels::AwaitArgs&, Stream) { notHere("await"); }
void partial(const kernels::PartialArgs&, const kernels::Budget&, Stream) { notHere("partial"); }
void placeCounted(const kernels::CountedPlaceArgs&, const kernels::Budget&, Stream) { notHere("placeCounted"); }
void sum(const kernels::SumArgs&, const kernels::Budget&, Stream) { notHere("sum"); }
void gaps(const kernels::GapsArgs&, const kernels::Budget&, Stream) { notHere("gaps"); }
void reset(const kernels::ResetArgs&, const kernels::Budget&, Stream) { notHere("reset"); }
void describe(const kernels::DescribeArgs&, const kernels::Budget&, Stream) { notHere("describe"); }

OwnStream::OwnStream() : stream_(new Queue) {}
OwnStream::~OwnStream() {
  synchronize(stream_);
  delete static_cast<Queue*>(stream_);
}
bool OwnStream::drained() const {
  const Lock lock(gpu().mutex);
  return !runOne(queueOf(stream_));
}
SharedEvent::SharedEvent(bool) : event_(new Event) {}
SharedEvent::SharedEvent(const Handle&) { notHere("events of other processes"); }
SharedEvent::~SharedEvent() { delete static_cast<Event*>(event_); }
Handle SharedEvent::handle() const { notHere("events of other processes"); }
void SharedEvent::record(Stream stream) { static_cast<Event*>(event_)->record(stream); }
void SharedEvent::waitOn(Stream stream) const { static_cast<Event*>(event_)->waitOn(stream); }
Allocation allocationOf(const void*) { notHere("allocationOf"); }
bool tryExport(const Allocation&, Handle&) { notHere("tryExport"); }
struct Imported::Mapping {};
Imported::Imported(const Foreign&) { notHere("memory of other processes"); }
Imported::~Imported() = default;
std::byte* Imported::start() const { notHere("memory of other processes"); }
bool Imported::unmapped() const { notHere("memory of other processes"); }

NicWrites nicWrites() {
  const Lock lock(gpu().mutex);
  return gpu().nicWrites;
}
void flushNicWrites() {
  const Lock lock(gpu().mutex);
  ++gpu().flushed;
}
int exportDmaBuf(const void* begin, std::size_t bytes, std::string* why) {
  const Lock lock(gpu().mutex);
  std::uintptr_t start = 0;
  const Region* region = regionOf(begin, &start);
  if (region == nullptr || !region->device) throw std::logic_error("a dmabuf of memory that is not the stand-in's");
  if (reinterpret_cast<std::uintptr_t>(begin) + bytes > start + region->bytes)
    throw std::logic_error("a dmabuf of more than was allocated");
  const int copy = fcntl(region->file, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) *why = std::strerror(errno);
  return copy;
}

namespace {
// Where byte `at` of a copy lies, and how many follow it there.
std::pair<std::byte*, std::size_t> bytesOf(const kernels::RowEnd& end, std::size_t at, std::size_t most) {
  if (end.list == nullptr) return {there(end.base + end.start + at), most};
  const std::size_t row = (end.start + at) / end.rowBytes, within = (end.start + at) % end.rowBytes;
  const auto index = end.narrow ? static_cast<std::size_t>(there(static_cast<const std::int32_t*>(end.list))[row])
                                : static_cast<std::size_t>(there(static_cast<const std::int64_t*>(end.list))[row]);
  return {there(end.base + index * end.rowBytes + within), std::min(most, end.rowBytes - within)};
}
}  // namespace

void copyRows(const kernels::RowCopy* copies, std::size_t count, const kernels::Budget&, Stream stream) {
  put(stream, [all = std::vector<kernels::RowCopy>(copies, copies + count)] {
    for (const kernels::RowCopy& c : all) {
      for (std::size_t i = 0; i < c.bytes;) {
        const auto [to, room] = bytesOf(c.destination, i, c.bytes - i);
        const auto [from, bytes] = bytesOf(c.source, i, room);
        std::memcpy(to, from, bytes);
        i += bytes;
      }
    }
  });
}

}  // namespace fusco::exec::cuda

namespace fusco::test {

namespace cuda = exec::cuda;

std::byte* shadowOf(const void* address) {
  const cuda::Lock lock(cuda::gpu().mutex);
  const cuda::Region* region = cuda::regionOf(address);
  if (region == nullptr || !region->device) return nullptr;
  return cuda::there(static_cast<std::byte*>(const_cast<void*>(address)));
}
void sayOfNicWrites(const cuda::NicWrites& said) {
  const cuda::Lock lock(cuda::gpu().mutex);
  cuda::gpu().nicWrites = said;
}
void useGpu(int device) { cuda::currentGpu = device; }
void sayNoPath(std::set<std::pair<int, int>> fromTo) {
  const cuda::Lock lock(cuda::gpu().mutex);
  cuda::gpu().noPath = std::move(fromTo);
}
int nicWritesFlushed() {
  const cuda::Lock lock(cuda::gpu().mutex);
  return cuda::gpu().flushed;
}

void* StandInSpace::allocate(std::size_t bytes, bool) { return cuda::allocate(bytes); }
void StandInSpace::release(void* pointer, bool) {
  settle();
  cuda::release(pointer);
}
void StandInSpace::settle() { cuda::synchronize(stream_.get()); }
void StandInSpace::read(void* to, const void* from, std::size_t bytes) { cuda::copy(to, from, bytes, stream_.get()); }
void StandInSpace::write(void* to, const void* from, std::size_t bytes) { cuda::copy(to, from, bytes, stream_.get()); }

}  // namespace fusco::test
