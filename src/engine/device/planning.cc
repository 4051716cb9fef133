#include "engine/device/planning.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/device/rows.h"
#include "engine/shuffle.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

DevicePlanning::DevicePlanning(Engine& engine, std::shared_ptr<PlanState> plan, cuda::Stream stream)
    : DeviceOperation(OperationKind::plan, engine, std::move(plan), stream), rows_(engine, slot_) {}

void DevicePlanning::takePlace() {
  DeviceOperation::takePlace();
  rows_.setChannel(slot_);
  plan_->number = plan_->request.slot >= 0 ? engine_.nextPlanNumber() : engine_.turn();
}

void DevicePlanning::reset() {
  DeviceOperation::reset();
  if (comparesRows()) rows_.begin();
  announcedRows_ = false;
}

void DevicePlanning::announce(Meeting::Announcement& announcement) {
  const PlanRequest& r = plan_->request;
  domain_.checkPointer("expertIds", r.map.ids);
  domain_.checkPointer("weights", r.map.weights);
  domain_.checkPointer("tokensOnDevice", r.tokensOnDevice);
  if (capturing() && !plan_->device->countsStayOnDevice()) {
    fail(Code::invalidUsage,
         fmt::format("rank {}: an exact plan cannot be captured, since the host reads its counts: give capacityRows "
                     "and fuscoCapacityDrop, or the slotted layout",
                     engine_.fabric().rank()));
  }
  announcement.parameters = parameters(
      0, 0, 0, (r.dropBeyondCapacity ? 1u : 0u) | static_cast<std::uint64_t>(r.options.dedup) << 2 | std::uint64_t{32});
  announcement.rows = static_cast<std::uint64_t>(r.map.tokens);
  announceTensor(announcement, kRows, plan_->device->arena(), plan_->device->arenaBytes());
  plan_->device->usedOn(stream(), capturing());
}

void DevicePlanning::bind() {
  for (int i = 0; i < engine_.nodeRanks(); ++i)
    plan_->device->learn(i, plan_->request, tensorOf(i, kRows), static_cast<std::int64_t>(meeting_.ready(i).rows));
}

kernels::PlanArgs DevicePlanning::arguments(const std::vector<DeviceOperation*>& all,
                                            const kernels::Budget& budget) const {
  const PlanRequest& r = plan_->request;
  const plan::Topology& topology = engine_.topology();
  kernels::PlanArgs args{};
  args.idBytes = r.map.idBytes;
  args.topk = r.map.topk;
  args.experts = r.map.experts;
  args.ranks = topology.ranks();
  args.nodes = topology.nodes();
  args.layout = r.options.layout;
  args.dedup = r.options.dedup;
  args.alignment = r.options.alignment;
  args.maxTokens = r.options.maxTokens;
  args.capacityRows = r.options.capacityRows;
  args.countsRoom = DeviceDomain::kMaxKeys;
  args.allCounts = domain_.allCounts(slot_);
  args.blocks = budget.blocks;
  args.rankCount = static_cast<int>(all.size());
  for (std::size_t i = 0; i < all.size(); ++i) {
    auto& one = static_cast<DevicePlanning&>(*all[i]);
    const int rank = one.engine_.fabric().rank();
    args.rank[i] = one.plan_->device->planner(one.plan_->request, rank, topology.nodeOf(rank));
    args.rank[i].counts = one.domain_.counts(one.slot_);
  }
  return args;
}

namespace {
// Dispatch brings all ids and weights of a token along with its row, and the caller's may be gone by then.
void keepRoutingMap(const PlanState& plan, cuda::Stream stream) {
  const plan::RoutingMap& map = plan.request.map;
  const auto slots = static_cast<std::size_t>(map.tokens) * static_cast<std::size_t>(map.topk);
  if (plan.request.options.layout != plan::Layout::rankOrder || slots == 0) return;
  cuda::copy(plan.device->keptIds(), map.ids, slots * static_cast<std::size_t>(map.idBytes), stream);
  if (map.weights != nullptr) cuda::copy(plan.device->keptWeights(), map.weights, slots * sizeof(float), stream);
}
}  // namespace

void DevicePlanning::agree(const std::vector<DeviceOperation*>& all) {
  bool small = domain_.together() && !domain_.oneLaunch() && all.size() <= kernels::kMaxPlanRanks;
  // The ranks of a GPU have to follow each other.
  std::vector<int> parts;
  for (DeviceOperation* one : all) {
    const int part = static_cast<DevicePlanning*>(one)->domain_.part();
    if (!parts.empty() && parts.back() == part) continue;
    small = small && std::find(parts.begin(), parts.end(), part) == parts.end();
    parts.push_back(part);
  }
  if (small) {
    kernels::PlanArgs args = arguments(all, {});
    args.ranksHere = 1;
    small = cuda::planIsSmall(args);
  }
  for (DeviceOperation* one : all) static_cast<DevicePlanning*>(one)->small_ = small;
}

void DevicePlanning::launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                               cuda::Stream stream) {
  const kernels::PlanArgs args = arguments(all, budget);
  if (!cuda::planFits(args)) {
    fail(Code::invalidArgument, fmt::format("GPU {} has not got the shared memory to plan top-{} of {} experts on {} "
                                            "ranks",
                                            domain_.device(), args.topk, args.experts, args.ranks));
  }
  for (DeviceOperation* one : all) keepRoutingMap(one->plan(), stream);
  if (domain_.oneLaunch()) {
    cuda::plan(args, stream);
  } else if (small_) {
    kernels::PlanArgs whole = arguments(everyone(), budget);
    whole.firstHere =
        static_cast<int>(std::find(everyone().begin(), everyone().end(), all.front()) - everyone().begin());
    whole.ranksHere = static_cast<int>(all.size());
    cuda::plan(whole, stream);
  } else {
    cuda::planCount(args, stream);
    const int blocks = cuda::planBlocksOfRank(args);
    for (DeviceOperation* one : all) static_cast<DevicePlanning*>(one)->blocksOfCount_ = blocks;
  }
}

void DevicePlanning::launchRest(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                                cuda::Stream stream) {
  cuda::planLay(arguments(all, budget), stream);
}

// What the planner has found, of which all ranks know.
void checkPlanned(const PlanState& plan) {
  const kernels::PlanStatus& status = plan.device->status();
  const int rank = plan.engine.fabric().rank();
  switch (status.code) {
    case kernels::PlanStatus::ok:
      return;
    case kernels::PlanStatus::badId:
      throw CommonError(Code::invalidArgument,
                        fmt::format("routing map of rank {}: token {}, slot {} names expert {}; ids are 0 to {}, or -1 "
                                    "for none",
                                    rank, status.token, status.slot, status.id, plan.request.map.experts - 1));
    case kernels::PlanStatus::badIdElsewhere:
      throw CommonError(Code::invalidArgument,
                        fmt::format("plan {}: {} could not read its routing map; its own error says why. Nothing was "
                                    "moved",
                                    plan.number, plan.engine.fabric().describeRank(status.rank)));
    case kernels::PlanStatus::tooManyTokens:
      throw CommonError(Code::invalidArgument,
                        fmt::format("rank {}: the number of tokens on the GPU is negative, or more than the {} that "
                                    "the plan was made for",
                                    rank, plan.request.map.tokens));
    default:
      throw CommonError(
          Code::invalidArgument,
          fmt::format("plan {}: a rank would receive more than 2^31 - 1 rows; split the batch", plan.number));
  }
}

void DevicePlanning::readCounts() {
  PlanState& p = *plan_;
  DevicePlan& device = *p.device;
  cuda::copy(device.head(), device.arena(), device.headBytes(), stream());
  cuda::synchronize(stream());
  checkPlanned(p);
  p.view = plan::view(device.head());
  p.localExpertRows.assign(p.view.localExpertRows, p.view.localExpertRows + p.view.header->localExperts);
}

// Every rank sees what all would receive, so that all of them fail where one would.
void DevicePlanning::checkCapacity() {
  const std::int64_t capacity = plan_->request.options.capacityRows;
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    const auto wanted = static_cast<std::int64_t>(rows_.ready(i).rows);
    if (wanted <= capacity) continue;
    throw CommonError(Code::invalidArgument,
                      fmt::format("rank {} needs {} rows, has {}: raise capacityRows, or choose fuscoCapacityDrop",
                                  engine_.nodeRank(i), wanted, capacity));
  }
}

Outcome DevicePlanning::finish() {
  if (!announcedRows_) {
    if (domain_.waitsOnHost()) {
      std::vector<DeviceOperation*> self{this};
      cuda::planLay(arguments(self, {blocksOfCount_}), stream());
    }
    if (plan_->device->countsStayOnDevice()) {
      // What the host may say of it: the places that there are.
      auto* header = reinterpret_cast<plan::ArenaHeader*>(plan_->device->head());
      header->receiveRows = static_cast<std::int64_t>(plan_->rowCapacity);
      header->tokensUsed = header->tokens;
      plan_->view = plan::view(plan_->device->head());
      return Outcome::complete;
    }
    readCounts();
    plan_->device->holdBeside(plan_->request, plan_->rowsToHold());
    if (!comparesRows()) return Outcome::complete;
    Meeting::Announcement announcement;
    announcement.parameters = parameters(0, 0, 0, 0);
    announcement.rows = static_cast<std::uint64_t>(plan_->device->status().wantedRows);
    rows_.announce(announcement);
    announcedRows_ = true;
  }
  if (!rows_.allReady(kind())) return Outcome::idle;
  checkCapacity();
  return Outcome::complete;
}

std::unique_ptr<Operation> makeDevicePlanning(Engine& engine, std::shared_ptr<PlanState> plan, void* stream) {
  if (engine.deviceExecutor() != nullptr) return makeNodesPlanning(engine, std::move(plan), stream);
  return std::make_unique<DevicePlanning>(engine, std::move(plan), stream);
}

}  // namespace fusco::engine
