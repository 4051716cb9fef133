#include "engine/device/plan_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "engine/engine.h"
#include "engine/shuffle.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {
std::size_t after(std::size_t at, std::size_t bytes) { return (at + bytes + 255) / 256 * 256; }
}  // namespace

DevicePlan::DevicePlan(Engine& engine, const PlanRequest& request)
    : engine_(engine),
      domain_(*engine.device()),
      countsStay_(engine.topology().nodes() == 1 &&
                  (request.options.layout == plan::Layout::slotted ||
                   (request.options.capacityRows > 0 && request.dropBeyondCapacity))) {
  const plan::Topology& topology = engine.topology();
  const int rank = engine.fabric().rank();
  const plan::Frame frame = plan::makeFrame(request.map, topology, rank, request.options);
  const bool hostPlans = topology.nodes() > 1;
  frame_ = frame.header;
  offsets_ = plan::arenaOffsets(frame_);
  statusAt_ = after(0, headBytes());
  if (hostPlans) {
    const cuda::OnDevice on(domain_.device());
    arenaBytes_ = headBytes();
    block_ = domain_.pool().take(arenaBytes_, statusAt_ + sizeof(kernels::PlanStatus));
    clearHead();
    return;
  }
  if (request.map.topk > kernels::kMaxPlanTopk || request.map.experts > DeviceDomain::kMaxKeys) {
    fail(Code::invalidArgument,
         fmt::format("rank {}: top-{} of {} experts; GPUs plan at most top-{} of {}", rank, request.map.topk,
                     request.map.experts, kernels::kMaxPlanTopk, DeviceDomain::kMaxKeys));
  }
  arenaBytes_ = offsets_.end;
  const std::size_t homesBytes = frame.homes.size() * sizeof frame.homes[0];
  const std::size_t flowsBytes = frame.flows.size() * sizeof frame.flows[0];
  frameAt_ = after(0, arenaBytes_);
  homesAt_ = after(frameAt_, sizeof frame_);
  flowsAt_ = after(homesAt_, homesBytes);
  scratchAt_ = after(flowsAt_, flowsBytes);
  const std::size_t scratch = cuda::planScratchBytes(request.map.experts, topology.ranks(), topology.nodes());
  const std::size_t uploadAt = after(statusAt_, sizeof(kernels::PlanStatus));
  const std::size_t uploadBytes = scratchAt_ - frameAt_;

  const cuda::OnDevice on(domain_.device());
  exchangedAt_ = after(scratchAt_, scratch);
  keys_ = static_cast<std::size_t>(request.options.layout == plan::Layout::rankOrder ? topology.ranks()
                                                                                     : request.map.experts);
  keptIdsAt_ = after(exchangedAt_, 2 * keys_ * sizeof(std::int32_t));
  keptWeightsAt_ = keptIdsAt_;
  std::size_t end = keptIdsAt_;
  if (request.options.layout == plan::Layout::rankOrder) {
    const auto slots = static_cast<std::size_t>(request.map.tokens) * static_cast<std::size_t>(request.map.topk);
    keptWeightsAt_ = after(keptIdsAt_, slots * static_cast<std::size_t>(request.map.idBytes));
    end = request.map.weights == nullptr ? keptWeightsAt_ : after(keptWeightsAt_, slots * sizeof(float));
  }
  block_ = domain_.pool().take(end, uploadAt + uploadBytes);
  std::byte* upload = block_.host + uploadAt;
  std::memcpy(upload, &frame_, sizeof frame_);
  std::memcpy(upload + (homesAt_ - frameAt_), frame.homes.data(), homesBytes);
  std::memcpy(upload + (flowsAt_ - frameAt_), frame.flows.data(), flowsBytes);
  cuda::copyNow(block_.device + frameAt_, upload, uploadBytes);
  clearHead();
}

void DevicePlan::clearHead() {
  std::memset(block_.host, 0, headBytes());
  std::memcpy(block_.host, &frame_, sizeof frame_);
  std::memset(static_cast<void*>(&status()), 0, sizeof(kernels::PlanStatus));
}

std::byte* DevicePlan::castMemory(std::size_t bytes) {
  if (castBlock_.deviceBytes < bytes) {
    const cuda::OnDevice on(domain_.device());
    domain_.pool().drop(std::move(castBlock_));
    castBlock_ = domain_.pool().take(bytes, 1);
  }
  return castBlock_.device;
}

DevicePlan::~DevicePlan() {
  std::vector<DevicePool::Block> blocks;
  blocks.push_back(std::move(block_));
  blocks.push_back(std::move(castBlock_));
  if (beside_) blocks.push_back(beside_->release());
  for (DevicePool::Block& block : blocks) {
    for (const auto& [stream, end] : uses_) block.uses.push_back(end);
    block.inGraphs = inGraphs_;
    domain_.pool().giveBack(std::move(block));
  }
}

void DevicePlan::holdInGraph(cuda::Stream stream) {
  const unsigned long long capture = cuda::captureOf(stream);
  if (capture == capture_) return;
  if (inGraphs_ == nullptr) inGraphs_ = std::make_shared<char>();
  cuda::holdInGraph(stream, inGraphs_);
  capture_ = capture;
}

std::shared_ptr<cuda::Event>& DevicePlan::endOn(cuda::Stream stream) {
  const auto known = std::find_if(uses_.begin(), uses_.end(), [&](const auto& use) { return use.first == stream; });
  return known != uses_.end() ? known->second : uses_.emplace_back(stream, nullptr).second;
}

std::shared_ptr<cuda::Event> DevicePlan::recordEnd(cuda::Stream stream) {
  std::shared_ptr<cuda::Event>& end = endOn(stream);
  if (end == nullptr) end = std::make_shared<cuda::Event>();
  end->record(stream);
  return end;
}

bool DevicePlan::followedBy(cuda::Stream stream, int slot) const {
  return captured_.met.capture != 0 && stream == captured_.stream && cuda::captureEdges(stream) == captured_.met &&
         domain_.slotOrder(slot).ends() == captured_.ends[slot];
}

void DevicePlan::settle() const {
  for (const auto& [stream, end] : uses_) end->wait();
}

void DevicePlan::holdBeside(const PlanRequest& request, std::size_t rows) {
  if (beside_ || !DeviceBeside::wanted(request)) return;
  beside_ = std::make_unique<DeviceBeside>(engine_, request, rows);
}

kernels::PlanPointers DevicePlan::pointersTo(const std::byte* arena, const plan::ArenaOffsets& offsets) {
  return {reinterpret_cast<const plan::ArenaHeader*>(arena), reinterpret_cast<const plan::Flow*>(arena + offsets.flows),
          reinterpret_cast<const plan::Copy*>(arena + offsets.copies),
          reinterpret_cast<const plan::Entry*>(arena + offsets.entries),
          reinterpret_cast<const float*>(arena + offsets.weights)};
}

void DevicePlan::learn(int localIndex, const PlanRequest& request, const std::byte* arena, std::int64_t tokens) {
  const plan::Topology& topology = engine_.topology();
  const int rank = engine_.nodeRank(localIndex);
  const plan::ArenaOffsets offsets = plan::arenaOffsets(tokens, request.map.topk, request.map.experts, topology.ranks(),
                                                        topology.nodes(), topology.expertsOf(rank, request.map.experts),
                                                        topology.flowCount(rank), request.options.dedup);
  ofRanks_.resize(static_cast<std::size_t>(engine_.nodeRanks()));
  ofRanks_[static_cast<std::size_t>(localIndex)] = {pointersTo(arena, offsets), tokens};
}

int DevicePlan::mostTokensOfNode() const {
  std::int64_t most = 0;
  for (const OfRank& rank : ofRanks_) most = std::max(most, rank.tokens);
  return static_cast<int>(most);
}

kernels::PlanArgs::Rank DevicePlan::planner(const PlanRequest& request, int rank, int node) const {
  kernels::PlanArgs::Rank r{};
  r.ids = request.map.ids;
  r.weights = request.map.weights;
  r.tokens = request.map.tokens;
  r.tokensUsed = request.tokensOnDevice;
  r.arena = block_.device;
  r.frame = reinterpret_cast<const plan::ArenaHeader*>(block_.device + frameAt_);
  r.homes = reinterpret_cast<const std::uint32_t*>(block_.device + homesAt_);
  r.flows = reinterpret_cast<const plan::Flow*>(block_.device + flowsAt_);
  r.rank = rank;
  r.node = node;
  r.localExperts = frame_.localExperts;
  r.flowCount = frame_.flows;
  r.scratch = block_.device + scratchAt_;
  r.status = &status();
  if (frame_.layout != plan::Layout::slotted) r.exchanged = const_cast<std::int32_t*>(exchanged());
  return r;
}

DeviceCounts deviceCounts(const PlanState& plan) {
  const DevicePlan& device = *plan.device;
  const plan::ArenaOffsets& o = device.offsets();
  const std::byte* a = device.arena();
  return {reinterpret_cast<const std::int32_t*>(a + o.localExpertRows),
          reinterpret_cast<const std::int32_t*>(a + o.localExpertStart),
          &reinterpret_cast<const plan::ArenaHeader*>(a)->dropped,
          &reinterpret_cast<const plan::ArenaHeader*>(a)->receiveRows};
}

DeviceBesideView deviceBeside(const PlanState& plan) {
  DeviceBesideView view;
  const DeviceBeside* beside = plan.device->beside();
  if (beside == nullptr) return view;
  const kernels::BesideRows rows = beside->rows();
  if (DeviceBeside::wantsCounters(plan.request)) view.counters = rows.board.counters;
  if (DeviceBeside::wantsTickets(plan.request)) view.tickets = reinterpret_cast<const Ticket*>(rows.tickets);
  view.localIds = rows.localIds;
  view.weights = rows.weights;
  return view;
}

std::vector<std::byte> bringArena(const PlanState& plan) {
  if (plan.madeOnHost()) return {plan.arena.data(), plan.arena.data() + plan.view.header->bytes};
  const DevicePlan& device = *plan.device;
  std::vector<std::byte> arena(device.arenaBytes());
  const cuda::OnDevice on(plan.engine.device()->device());
  device.settle();
  cuda::copyNow(arena.data(), device.arena(), arena.size());
  return arena;
}

}  // namespace fusco::engine
