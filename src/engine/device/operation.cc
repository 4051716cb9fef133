#include "engine/device/operation.h"

#include <fmt/format.h>

#include <algorithm>
#include <mutex>

#include "engine/device/plan_memory.h"
#include "exec/ranges.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

DeviceOperation::DeviceOperation(OperationKind kind, Engine& engine, std::shared_ptr<PlanState> plan,
                                 cuda::Stream stream)
    : Operation(kind),
      engine_(engine),
      domain_(*engine.device()),
      plan_(std::move(plan)),
      meeting_(engine, slot_),
      stream_(stream) {
  if (cuda::isPerThread(stream)) {
    fail(Code::invalidUsage,
         fmt::format(
             "rank {}: {} on cudaStreamPerThread, which is another stream for each thread that launches for this "
             "rank; give it a stream",
             engine_.fabric().rank(), operationName(kind)));
  }
  const auto add = [&](StepKind step, int stage) {
    program_.push_back({step, static_cast<std::uint8_t>(stage), static_cast<std::uint8_t>(stage), 0});
  };
  add(StepKind::ready, 0);
  add(StepKind::waitReady, 1);
  add(StepKind::put, 2);
  if (domain_.waitsOnHost()) {
    add(StepKind::done, 3);
    add(StepKind::waitDone, 4);
  }
  add(StepKind::finish, 5);
}

DeviceOperation::~DeviceOperation() { giveUp(); }

void DeviceOperation::giveUp() {
  // Also when it has been launched: who launches for all holds the group's lock until it needs none of them any more.
  if (arrived_) domain_.group().withdraw(slot_, domain_.member(), *this);
}

void DeviceOperation::takePlace() {
  slot_ = plan_->request.slot >= 0 ? plan_->request.slot : engine_.takeSlot();
  meeting_.setChannel(slot_);
}

void DeviceOperation::reset() {
  meeting_.begin();
  arrived_ = false;
  launched_ = false;
  launchError_ = nullptr;
}

std::string DeviceOperation::describe() const {
  std::string text =
      fmt::format("{} {} on GPU {}", operationName(kind()),
                  meeting_.sequence() * kOperationSlots + static_cast<std::uint64_t>(slot_), domain_.device());
  if (meeting_.missing() >= 0) {
    text += fmt::format(", waiting for {}; one thread that drives several ranks calls for all of them in one group",
                        engine_.fabric().describeRank(meeting_.missing()));
  }
  return text;
}

Outcome DeviceOperation::run(const Step& step) {
  switch (step.kind) {
    case StepKind::ready:
      return ready();
    case StepKind::waitReady:
      if (!meeting_.allReady(kind())) return Outcome::idle;
      bind();
      return Outcome::complete;
    case StepKind::put:
      return launchStep();
    case StepKind::done: {
      const cuda::OnDevice on(domain_.device());
      cuda::synchronize(stream_);
      meeting_.sayDone();
      return Outcome::complete;
    }
    case StepKind::waitDone:
      return meeting_.allDone() ? Outcome::complete : Outcome::idle;
    case StepKind::finish: {
      const cuda::OnDevice on(domain_.device());
      return finish();
    }
    default:
      return Outcome::complete;
  }
}

Outcome DeviceOperation::ready() {
  const cuda::OnDevice on(domain_.device());
  capturing_ = cuda::capturing(stream_);
  domain_.checkArrivals();
  if (domain_.waitsOnHost() && capturing_) {
    fail(Code::invalidUsage,
         fmt::format("rank {}: {} cannot be captured: processes of this node share a GPU, or have several, and wait on "
                     "the host; give each process a GPU of its own",
                     engine_.fabric().rank(), operationName(kind())));
  }
  if (capturing_) {
    domain_.keepMapped();
    plan_->device->holdInGraph(stream_);
  }
  Meeting::Announcement announcement;
  announce(announcement);
  if (domain_.waitsOnHost()) cuda::synchronize(stream_);
  meeting_.announce(announcement);
  return Outcome::complete;
}

Outcome DeviceOperation::launchStep() {
  if (!arrived_) {
    arrived_ = true;
    domain_.group().arrive(slot_, domain_.member(), *this);
  }
  if (!launched_.load(std::memory_order_acquire)) return Outcome::idle;
  if (launchError_) std::rethrow_exception(launchError_);
  return Outcome::complete;
}

void DeviceOperation::launched(std::exception_ptr error, bool bySelf) {
  launchError_ = error;
  launched_.store(true, std::memory_order_release);
  if (!bySelf) engine_.fabric().ring(engine_.fabric().rank());
}

void DeviceOperation::checkWaits() const {
  engine_.checkUsable();
  if (waits_) domain_.checkArrivals(*waits_);
}

kernels::Budget DeviceOperation::budgetOf(const std::vector<DeviceOperation*>& all) {
  kernels::Budget budget;
  for (const DeviceOperation* one : all) {
    if (one->domain_.maxSms() == 0) return {};
    budget.blocks += one->domain_.maxSms();
  }
  if (budget.blocks >= cuda::multiprocessors(all.front()->domain_.device())) return {};
  return budget;
}

std::vector<DeviceOperation::Part> DeviceOperation::partsOf(const std::vector<DeviceOperation*>& all) {
  std::vector<Part> parts;
  for (DeviceOperation* one : all) {
    auto part = std::find_if(parts.begin(), parts.end(),
                             [&](const Part& p) { return p.domain().part() == one->domain_.part(); });
    if (part == parts.end()) part = parts.insert(parts.end(), Part{});
    part->all.push_back(one);
  }
  for (Part& part : parts) {
    for (DeviceOperation* one : part.all) {
      if (one->stream_ == part.leader() ||
          std::find(part.others.begin(), part.others.end(), one->stream_) != part.others.end())
        continue;
      part.others.push_back(one->stream_);
    }
  }
  return parts;
}

void DeviceOperation::meet(const std::vector<Part>& parts) const {
  if (domain_.meetsOnGpu()) {
    const cuda::OnDevice on(parts.front().domain().device());
    parts.front().domain().meet(slot_, parts.front().leader());
    return;
  }
  if (parts.size() < 2) return;
  for (const Part& part : parts) {
    const cuda::OnDevice on(part.domain().device());
    part.domain().event(1).record(part.leader());
  }
  for (const Part& part : parts) {
    const cuda::OnDevice on(part.domain().device());
    for (const Part& other : parts) {
      // Not by their streams: the default ones of all GPUs have the same handle.
      if (&other != &part) other.domain().event(1).waitOn(part.leader());
    }
  }
}

void DeviceOperation::recordUse(const Part& part) const {
  if (capturing_) return;
  const std::shared_ptr<cuda::Event> end = part.all.front()->plan_->device->recordEnd(part.leader());
  for (DeviceOperation* one : part.all) one->plan_->device->shareEnd(part.leader(), end);
}

// What uses the slot comes after its last operation; a planning that can be followed also after that of the others, but
// not where another stream of its capture has them: it would wait for that.
void DeviceOperation::beginSlots(Part& part) const {
  if (!usesSlotMemory()) return;
  const cuda::OnDevice on(part.domain().device());
  for (int slot = 0; slot < kOperationSlots; ++slot) {
    const auto orderOf = [&](const DeviceOperation* one) -> cuda::Order& { return one->domain_.slotOrder(slot); };
    part.begun[slot] = slot == slot_ ||
                       (canBeFollowed() && std::all_of(part.all.begin(), part.all.end(),
                                                       [&](auto* one) { return orderOf(one).isFree(part.leader()); }));
    if (!part.begun[slot]) continue;
    for (DeviceOperation* one : part.all) orderOf(one).begin(part.leader());
  }
}

void DeviceOperation::keepCaptured(const Part& part) const {
  const cuda::CaptureEdges met = cuda::captureEdges(part.leader());
  for (DeviceOperation* one : part.all) {
    DevicePlan::Captured captured{part.leader(), part.planned, met, {}};
    for (int slot = 0; slot < kOperationSlots; ++slot) {
      captured.ends[slot] = part.begun[slot] ? one->domain_.slotOrder(slot).ends() : DevicePlan::Captured::kNever;
    }
    one->plan_->device->setCaptured(std::move(captured));
  }
}

// What has come onto the stream since this rank looked (an operation that was started has not held its caller) stays.
void DeviceOperation::rewind(const Part& part) const {
  const DevicePlan::Captured& captured = part.all.front()->plan_->device->captured();
  const cuda::CaptureEdges now = cuda::captureEdges(part.leader());
  cuda::setCaptureEdges(part.leader(), captured.planned);
  if (!(now == captured.met)) cuda::addCaptureEdges(part.leader(), now);
}

// A meeting at the end of the planning uses the same words as those to come, which are behind it.
void DeviceOperation::takeBack(const Part& part) const {
  const DevicePlan::Captured& captured = part.all.front()->plan_->device->captured();
  if (domain_.meetsOnGpu() && !(captured.met == captured.planned)) cuda::addCaptureEdges(part.leader(), captured.met);
}

void DeviceOperation::launchTogether(const std::vector<DeviceOperation*>& all) {
  const exec::Range range("launch");
  std::vector<Part> parts = partsOf(all);
  // Launches that wait for other GPUs are put on all of these in one order, whichever communicators they are of.
  static std::mutex order;
  const std::unique_lock ordered =
      domain_.oneLaunch() ? std::unique_lock<std::mutex>() : std::unique_lock<std::mutex>(order);
  // What others have on their streams comes first, and what they do next comes after.
  for (const Part& part : parts) {
    const cuda::OnDevice on(part.domain().device());
    for (const cuda::Stream other : part.others) {
      cuda::Event& event = (*std::find_if(part.all.begin(), part.all.end(), [&](const DeviceOperation* one) {
                             return one->stream_ == other;
                           }))->domain_.event(0);
      event.record(other);
      event.waitOn(part.leader());
    }
  }
  const bool usesSlot = usesSlotMemory();
  if (follows()) {
    for (const Part& part : parts) rewind(part);
  } else {
    for (Part& part : parts) beginSlots(part);
    if (meetsBefore()) meet(parts);
  }
  const auto launchParts = [&](auto launch) {
    for (const Part& part : parts) {
      const cuda::OnDevice on(part.domain().device());
      (part.all.front()->*launch)(part.all, budgetOf(part.all), part.leader());
    }
  };
  launchParts(&DeviceOperation::launchAll);
  if (follows()) {
    for (const Part& part : parts) takeBack(part);
  }
  if (hasRest()) {
    meet(parts);
    launchParts(&DeviceOperation::launchRest);
  }
  const bool keepsEdges = canBeFollowed();
  if (keepsEdges) {
    for (Part& part : parts) part.planned = cuda::captureEdges(part.leader());
  }
  if (meetsBehind()) meet(parts);
  for (const Part& part : parts) {
    const cuda::OnDevice on(part.domain().device());
    recordUse(part);
    for (DeviceOperation* one : part.all) {
      one->waits_ = part.domain().waits();
      if (usesSlot) one->domain_.slotOrder(slot_).end(part.leader());
    }
    if (keepsEdges && part.others.empty()) keepCaptured(part);
    if (part.others.empty()) continue;
    cuda::Event& end = part.domain().event(1);
    end.record(part.leader());
    for (const cuda::Stream other : part.others) end.waitOn(other);
  }
}

Parameters DeviceOperation::parameters(std::size_t rowBytes, std::size_t rowBytes2, std::uint64_t type,
                                       std::uint64_t options) const {
  const PlanRequest& request = plan_->request;
  Parameters p;
  p.experts = static_cast<std::uint64_t>(request.map.experts);
  p.topk = static_cast<std::uint64_t>(request.map.topk);
  p.layout = static_cast<std::uint64_t>(request.options.layout);
  p.alignment = static_cast<std::uint64_t>(request.options.alignment);
  p.capacity = static_cast<std::uint64_t>(request.options.capacityRows);
  p.maxTokens = static_cast<std::uint64_t>(request.options.maxTokens);
  p.kind = static_cast<std::uint64_t>(kind());
  p.rowBytes = rowBytes;
  p.rowBytes2 = rowBytes2;
  p.type = type;
  p.planNumber = plan_->number;
  p.options = options;
  return p;
}

namespace {
// The handles of other processes' memory follow the tensors.
int handleOf(MemoryRole role) { return kLanding + 1 + 2 * static_cast<int>(role); }
static_assert(kLanding + 1 + 2 * kLanding + 2 <= kMemoryRoles);
}  // namespace

void DeviceOperation::announceTensor(Meeting::Announcement& announcement, MemoryRole role, const void* pointer,
                                     std::size_t bytes) {
  if (bytes == 0) return;
  announcement.memory[role] = domain_.describe(pointer, bytes, &announcement.memory[handleOf(role)]);
}

std::byte* DeviceOperation::tensorOf(int localIndex, MemoryRole role) const {
  const ReadyCell& cell = meeting_.ready(localIndex);
  return domain_.reach(localIndex, cell.memory[role], &cell.memory[handleOf(role)]);
}

}  // namespace fusco::engine
