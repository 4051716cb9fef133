#include "engine/device/planning.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/device/rows.h"
#include "engine/shuffle.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

DevicePlanning::DevicePlanning(Engine& engine, std::shared_ptr<PlanState> plan, cuda::Stream stream)
    : DeviceOperation(OperationKind::plan, engine, std::move(plan), stream), rows_(engine, slot_) {
  const PlanRequest& r = plan_->request;
  domain_.checkPointer("expertIds", r.map.ids);
  domain_.checkPointer("weights", r.map.weights);
  domain_.checkPointer("tokensOnDevice", r.tokensOnDevice);
  const cuda::OnDevice on(domain_.device());
  if (!plan_->device->countsStayOnDevice() && cuda::capturing(stream)) {
    fail(Code::invalidUsage,
         fmt::format("rank {}: an exact plan cannot be captured, since the host reads its counts: give capacityRows "
                     "and fuscoCapacityDrop, or the slotted layout",
                     engine_.fabric().rank()));
  }
}

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
  announcement.parameters = parameters(
      0, 0, 0, (r.dropBeyondCapacity ? 1u : 0u) | static_cast<std::uint64_t>(r.options.dedup) << 2 | std::uint64_t{32});
  announceMap(announcement);
  announceTensor(announcement, kRows, plan_->device->arena(), plan_->device->arenaBytes());
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

// Other GPUs count this rank's routing map by themselves, where it is small: they reach it, or it is brought to them.
void DevicePlanning::announceMap(Meeting::Announcement& announcement) {
  const PlanRequest& r = plan_->request;
  announcement.rows = static_cast<std::uint64_t>(r.map.tokens);
  announcement.bytes = static_cast<std::uint64_t>(r.map.idBytes);
  if (domain_.waitsOnHost() || domain_.oneLaunch() || engine_.nodeRanks() > kernels::kMaxPlanRanks) return;
  kernels::PlanArgs alone = arguments({this}, {});
  alone.ranksHere = 1;
  if (!cuda::planIsSmall(alone)) return;
  if (r.options.layout != plan::Layout::slotted && !domain_.meetsOnGpu()) {
    const auto slots = static_cast<std::size_t>(r.map.tokens) * static_cast<std::size_t>(r.map.topk);
    announceTensor(announcement, kRows2, r.map.ids, slots * static_cast<std::size_t>(r.map.idBytes));
    if (r.tokensOnDevice != nullptr) announceTensor(announcement, kTickets, r.tokensOnDevice, sizeof(std::int64_t));
  }
  announcement.flags |= kMapReached;
}

void DevicePlanning::bind() {
  const PlanRequest& r = plan_->request;
  const int ranks = engine_.nodeRanks();
  bool reached = true, ordered = true;
  for (int i = 0; i < ranks; ++i) {
    const ReadyCell& cell = meeting_.ready(i);
    plan_->device->learn(i, r, tensorOf(i, kRows), static_cast<std::int64_t>(cell.rows));
    reached = reached && (cell.flags & kMapReached) != 0 && cell.bytes == static_cast<std::uint64_t>(r.map.idBytes);
    // The ranks of a GPU have to follow each other.
    ordered = ordered && (domain_.partOf(i) == i || domain_.partOf(i) == domain_.partOf(i - 1));
  }
  small_ = reached && ordered && cuda::planIsSmall(mapsOfNode({}));
}

// The routing maps of all ranks of the node, as they have told of them.
kernels::PlanArgs DevicePlanning::mapsOfNode(const kernels::Budget& budget) const {
  kernels::PlanArgs args = arguments({}, budget);
  const plan::Topology& topology = engine_.topology();
  args.rankCount = engine_.nodeRanks();
  args.firstHere = domain_.part();
  args.ranksHere = 1;
  if (domain_.meetsOnGpu()) domain_.setTurn(slot_, args);
  for (int i = 0; i < args.rankCount; ++i) {
    kernels::PlanArgs::Rank& one = args.rank[i];
    if (domain_.meetsOnGpu()) {
      one.ids = domain_.broughtMap(slot_, i);
    } else {
      one.ids = tensorOf(i, kRows2);
      one.tokensUsed = reinterpret_cast<const std::int64_t*>(tensorOf(i, kTickets));
    }
    one.tokens = plan_->device->ofRank(i).tokens;
    one.rank = engine_.nodeRank(i);
    one.node = topology.nodeOf(one.rank);
    one.localExperts = topology.expertsOf(one.rank, args.experts);
    one.flowCount = topology.flowCount(one.rank);
  }
  return args;
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
    kernels::PlanArgs whole = mapsOfNode(budget);
    whole.ranksHere = args.rankCount;
    std::copy_n(args.rank, args.rankCount, whole.rank + whole.firstHere);
    if (domain_.meetsOnGpu() && plan_->request.options.layout != plan::Layout::slotted) bringMaps(all, stream);
    cuda::plan(whole, stream);
  } else {
    cuda::planCount(args, stream);
    const int blocks = cuda::planBlocksOfRank(args);
    for (DeviceOperation* one : all) static_cast<DevicePlanning*>(one)->blocksOfCount_ = blocks;
  }
}

// The GPUs meet in it, in a capture.
bool DevicePlanning::canBeFollowed() const {
  const bool meets = meetsBefore() || hasRest() || plan_->request.options.layout != plan::Layout::slotted;
  return capturing() && !domain_.waitsOnHost() && !domain_.oneLaunch() && meets;
}

void DevicePlanning::bringMaps(const std::vector<DeviceOperation*>& all, cuda::Stream stream) const {
  kernels::BringMapsArgs args{};
  args.topk = plan_->request.map.topk;
  args.idBytes = plan_->request.map.idBytes;
  for (DeviceOperation* one : all) {
    const auto& planning = static_cast<const DevicePlanning&>(*one);
    const PlanRequest& r = planning.plan_->request;
    args.own[args.ownCount++] = {r.map.ids, r.tokensOnDevice, r.map.tokens, planning.engine_.localIndex()};
  }
  domain_.bringMaps(slot_, args, stream);
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
  // Kernels that have waited in vain have left what they found.
  checkWaits();
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
      domain_.slotOrder(slot_).end(stream());
      plan_->device->recordEnd(stream());
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
