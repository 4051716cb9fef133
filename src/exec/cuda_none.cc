// The GPU in a build without CUDA: there is none, and that is said.
#include "base/status.h"
#include "exec/cuda.h"

namespace fusco::exec::cuda {

namespace {
[[noreturn]] void none() {
  fail(Code::invalidUsage, "this build of the library has no CUDA kernels: build it where nvcc is found");
}
}  // namespace

bool available(std::string* why) {
  if (why != nullptr) *why = "this build of the library has no CUDA kernels";
  return false;
}
int currentDevice() { none(); }
DeviceId deviceId(int) { none(); }
std::string deviceName(int) { none(); }
int multiprocessors(int) { none(); }
std::uint32_t busIdOf(int) { none(); }
std::vector<std::uint32_t> withoutPath(int) { none(); }
bool reachDevice(int, int) { none(); }
OnDevice::OnDevice(int) { none(); }
OnDevice::~OnDevice() = default;
void* allocate(std::size_t) { none(); }
void* tryAllocate(std::size_t) { none(); }
void release(void*) noexcept {}
void* allocatePinned(std::size_t) { none(); }
void releasePinned(void*) noexcept {}
bool pin(void*, std::size_t) noexcept { return false; }
void unpin(void*) noexcept {}
Where whereIs(const void*) { none(); }
void copy(void*, const void*, std::size_t, Stream) { none(); }
void fill(void*, int, std::size_t, Stream) { none(); }
void synchronize(Stream) { none(); }
void copyNow(void*, const void*, std::size_t) { none(); }
void fillNow(void*, int, std::size_t) { none(); }
bool capturing(Stream) { none(); }
Event::Event() { none(); }
Event::~Event() = default;
void Event::record(Stream) { none(); }
void Event::waitOn(Stream) const { none(); }
bool Event::reached() const { none(); }
void Event::wait() const { none(); }
void holdInGraph(Stream, std::shared_ptr<const void>) { none(); }
void Event::recordEachTime(Stream) { none(); }
void Event::waitOnEachTime(Stream) const { none(); }
bool isPerThread(Stream) { none(); }
unsigned long long captureOf(Stream) { none(); }
CaptureEdges captureEdges(Stream) { none(); }
void setCaptureEdges(Stream, const CaptureEdges&) { none(); }
void addCaptureEdges(Stream, const CaptureEdges&) { none(); }
void Order::begin(Stream) { none(); }
bool Order::isFree(Stream) const { none(); }
void Order::end(Stream) { none(); }
Exported exportMemory(const void*, std::size_t) { none(); }
std::size_t planScratchBytes(int, int, int) { none(); }
bool planFits(const kernels::PlanArgs&) { none(); }
bool planIsSmall(const kernels::PlanArgs&) { none(); }
int planBlocksOfRank(const kernels::PlanArgs&) { none(); }
void planCount(const kernels::PlanArgs&, Stream) { none(); }
void planLay(const kernels::PlanArgs&, Stream) { none(); }
void plan(const kernels::PlanArgs&, Stream) { none(); }
void place(const kernels::PlaceArgs&, const kernels::Budget&, Stream) { none(); }
bool placesAcross(const kernels::PlaceArgs&) { none(); }
bool sumFillsMultiprocessors(const kernels::SumArgs&) { none(); }
void expand(const kernels::ExpandArgs&, const kernels::Budget&, Stream) { none(); }
void meet(const kernels::MeetArgs&, Stream) { none(); }
void bringMaps(const kernels::BringMapsArgs&, Stream) { none(); }
void tell(const kernels::TellArgs&, Stream) { none(); }
void await(const kernels::AwaitArgs&, Stream) { none(); }
void partial(const kernels::PartialArgs&, const kernels::Budget&, Stream) { none(); }
void placeCounted(const kernels::CountedPlaceArgs&, const kernels::Budget&, Stream) { none(); }
void castPlace(const kernels::CastPlaceArgs&, const kernels::Budget&, Stream) { none(); }
void sum(const kernels::SumArgs&, const kernels::Budget&, Stream) { none(); }
void sumTerms(const kernels::TermSumArgs&, const kernels::Budget&, Stream) { none(); }
void back(const kernels::BackArgs&, const kernels::Budget&, Stream) { none(); }
void gaps(const kernels::GapsArgs&, const kernels::Budget&, Stream) { none(); }
void reset(const kernels::ResetArgs&, const kernels::Budget&, Stream) { none(); }
void describe(const kernels::DescribeArgs&, const kernels::Budget&, Stream) { none(); }

}  // namespace fusco::exec::cuda
