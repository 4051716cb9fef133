#include "engine/device/shuffle.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {
constexpr std::size_t kScaleGroup = 128;  // elements that share a scale of a cast

int mostTokens(const std::vector<DeviceOperation*>& all) {
  std::int64_t most = 0;
  for (DeviceOperation* one : all) most = std::max(most, one->plan().request.map.tokens);
  return static_cast<int>(most);
}

// Rows that cross a link once cost more launches and waits: about what so many bytes take on a link.
constexpr double kOverheadOfDispatch = 4 << 20;
double overheadOfCombine(const DeviceDomain& domain) {
  const double sums = (2 << 20) * (domain.parts() - 1);
  return domain.maxSms() == 0 ? sums : std::max<double>(sums, 8 << 20);
}

// Of `parts` parts, on how many a token has experts, with uniform routing.
double partsOfToken(int topk, int parts) { return parts * (1 - std::pow(1 - 1.0 / parts, topk)); }

// The cost rule: whether rows of `rowBytes` had better cross links once.
bool savesEnough(const PlanRequest& request, int parts, std::int64_t tokens, std::size_t rowBytes, double overhead) {
  if (parts < 2) return false;
  const double rows = request.map.topk - partsOfToken(request.map.topk, parts);
  return static_cast<double>(tokens) * rows * (parts - 1) / parts * static_cast<double>(rowBytes) > overhead;
}

// Flags that speak of memory beside rows.
constexpr std::uint32_t kCounterFlags = kWantsCounters | kCountsAtEnd;
constexpr std::uint32_t kBesideFlags = kWantsTickets | kCounterFlags;

// Where launches wait beside others both want some multiprocessors.
constexpr int kLeastBlocks = 4;

// A budget, between those who send rows to other GPUs and those who take what comes.
struct Divided {
  kernels::Budget senders, takers;
};
Divided divide(const kernels::Budget& budget, double share) {
  if (budget.blocks == 0) return {};
  const int senders = std::min(static_cast<int>(std::ceil(budget.blocks * share)), budget.blocks - 1);
  return {{senders}, {budget.blocks - senders}};
}
// All multiprocessors: those who take, of any two operations under way, leave room for those who send.
Divided divideAll(int multiprocessors, double share) {
  Divided divided = divide({multiprocessors}, share);
  const int takers = std::min(divided.takers.blocks, (multiprocessors - 1) / 2);
  return {{multiprocessors - takers}, {takers}};
}
// In dispatch. Of 24 multiprocessors, 4096 tokens: 50 to 60 in a hundred are within a tenth of the best on 2 and 4
// GPUs.
constexpr double kSendersOfDispatch = 0.55;
// From so many tokens of a rank on all multiprocessors are divided, too; with fewer it is quicker to have a launch for
// each half on all of them.
constexpr int kTokensToDivide = 1024;
// In combine, of a token's rows those who send read all that lie elsewhere and write a sum for each part; those who
// take read the rest and the sums, and write one. A multiprocessor reads twice as fast as it writes.
double sendersOfCombine(int topk, int parts) {
  const double each = static_cast<double>(topk) / parts, sums = partsOfToken(topk, parts) * (parts - 1) / parts;
  const double senders = topk - each + 2 * sums, takers = each + sums + 2;
  return senders / (senders + takers);
}
// The same for combine: rows of all tokens of a GPU.
constexpr std::int64_t kBytesToDivide = std::int64_t{80} << 20;
// Pieces that sums are cut into, of all tokens: what is done for each takes long, so those who fill multiprocessors
// want few, for each of these; else many are wanted, so that all warps have some.
constexpr std::int64_t kPiecesToFill = 12, kPiecesOfAll = 2048;
constexpr std::size_t kLeastToFill = 3584, kLeastOfAll = 1024;  // bytes

}  // namespace

void Crossing::consider(const DeviceDomain& domain, const PlanState& plan, std::size_t rowBytes, double overhead,
                        bool captured) {
  captured_ = captured;
  const PlanRequest& request = plan.request;
  const plan::Dedup dedup = request.options.dedup;
  const int ranks = plan.engine.nodeRanks();
  considered_ = !domain.waitsOnHost() && !domain.oneLaunch() && request.options.layout != plan::Layout::rankOrder &&
                (dedup == plan::Dedup::full || (dedup == plan::Dedup::node && request.dedupAuto)) &&
                ranks <= kernels::kMaxSources && request.map.topk <= kernels::kMaxPlanTopk && rowBytes > 0;
  if (considered_ && request.dedupAuto) {
    considered_ =
        domain.ownGpus() && savesEnough(request, domain.parts(), plan.device->mostTokensOfNode(), rowBytes, overhead);
  }
}

std::uint32_t Crossing::flags(const DeviceDomain& domain, bool may) const {
  const bool waits = tells(domain) && (domain.maxSms() == 0 || domain.maxSms() >= kLeastBlocks);
  return considered_ && may ? kCrossesOnce | (waits ? kWaitsBeside : 0u) : 0u;
}

void Crossing::bind(const Meeting& meeting, int ranks) {
  bool crosses = considered_, beside = true;
  for (int i = 0; i < ranks; ++i) {
    crosses = crosses && (meeting.ready(i).flags & kCrossesOnce) != 0;
    beside = beside && (meeting.ready(i).flags & kWaitsBeside) != 0;
  }
  across_ = !crosses ? Across::no : beside ? Across::beside : Across::behind;
}

DeviceDispatch::DeviceDispatch(Engine& engine, std::shared_ptr<PlanState> plan, const DispatchRequest& request,
                               cuda::Stream stream)
    : DeviceOperation(OperationKind::dispatch, engine, std::move(plan), stream), request_(request) {
  if (request.castToFp8) {
    const std::size_t elements = request.rowBytes / 2;
    tensors_[0] = {request.input, request.output, elements};
    tensors_[1] = {nullptr, request.outputScales, elements / kScaleGroup * sizeof(float)};
  } else {
    tensors_[0] = {request.input, request.output, request.rowBytes};
    tensors_[1] = {request.input2, request.output2, request.rowBytes2};
  }
  domain_.checkPointer("input", tensors_[0].input);
  domain_.checkPointer("output", tensors_[0].output);
  domain_.checkPointer("input2", tensors_[1].input);
  domain_.checkPointer("output2", tensors_[1].output);
  domain_.checkRowBytes(std::max(request.rowBytes, request.rowBytes2));
}

void DeviceDispatch::announce(Meeting::Announcement& announcement) {
  const auto rows = static_cast<std::size_t>(plan_->receiveRows());
  announcement.rows = rows;
  announcement.parameters = parameters(request_.rowBytes, request_.rowBytes2, 0, request_.castToFp8 ? 1 : 0);
  announceTensor(announcement, kRows, tensors_[0].output, rows * tensors_[0].rowBytes);
  announceTensor(announcement, kRows2, tensors_[1].output, rows * tensors_[1].rowBytes);
  flags_ = besideFlags();
  announceCrossing(announcement);
  if (flags_ == 0) {
    if (plan_->device->followedBy(stream(), slot_)) announcement.flags |= kFollows;
    return;
  }
  const DeviceBeside& beside = *plan_->device->beside();
  announcement.flags |= flags_;
  announcement.bytes = beside.shape().rows;
  announceTensor(announcement, kTickets, beside.data(), beside.shape().bytes());
  if (domain_.oneLaunch()) return;  // else the others' kernels are not to wait for
  std::vector<DeviceOperation*> self{this};
  resetBeside(self, budgetOf(self), stream());
}

// Tickets say the same each time, and so do counters that nobody looks at before the end.
std::uint32_t DeviceDispatch::besideFlags() const {
  if (plan_->device->beside() == nullptr) return 0;
  const PlanRequest& plan = plan_->request;
  const bool first = !plan_->device->described();
  std::uint32_t flags = first && DeviceBeside::wantsTickets(plan) ? kWantsTickets : 0u;
  if (!DeviceBeside::wantsCounters(plan)) return flags;
  if (plan.counters && !request_.castToFp8) return flags | kWantsCounters;
  return plan.counters || first ? flags | kCountsAtEnd : flags;
}

// Rows that are cast or counted are written one by one.
void DeviceDispatch::announceCrossing(Meeting::Announcement& announcement) {
  const Tensor& rows = tensors_[0];
  crossing_.consider(domain_, *plan_, rows.rowBytes, kOverheadOfDispatch, capturing());
  kernels::PlaceArgs own{};
  own.rankCount = 1;
  own.rowBytes = own.sourceStride = own.destinationStride = rows.rowBytes;
  own.ranks[0].source = rows.input;
  own.bases[0] = rows.output;
  const std::uint32_t flags =
      crossing_.flags(domain_, !request_.castToFp8 && !(flags_ & kCounterFlags) && cuda::placesAcross(own));
  if (flags == 0) return;
  // A GPU's words are with the first of its ranks.
  const std::size_t words = crossing_.tells(domain_) && domain_.part() == engine_.localIndex()
                                ? std::size_t{unitsOfRank()} * static_cast<std::size_t>(engine_.nodeRanks())
                                : 0;
  std::uint32_t* const arrivals = domain_.arrivals(slot_, words);
  if (words > 0 && arrivals == nullptr) return;  // rows then come one by one
  announcement.flags |= flags;
  announceTensor(announcement, kLanding, arrivals, words * sizeof(std::uint32_t));
}

std::uint32_t DeviceDispatch::unitsOfRank() const {
  return static_cast<std::uint32_t>(plan_->device->mostTokensOfNode()) *
         kernels::wholePieces(tensors_[0].rowBytes).count;
}

void DeviceDispatch::bind() {
  for (auto& bases : bases_) bases.clear();
  arrivals_.clear();
  growing_.clear();
  beside_.clear();
  anyGrowing_ = anyBeside_ = false;
  follows_ = true;
  crossing_.bind(meeting_, engine_.nodeRanks());
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    bases_[0].push_back(tensorOf(i, kRows));
    bases_[1].push_back(tensorOf(i, kRows2));
    arrivals_.push_back(reinterpret_cast<std::uint32_t*>(tensorOf(i, kLanding)));
    const ReadyCell& cell = meeting_.ready(i);
    follows_ = follows_ && (cell.flags & kFollows) != 0;
    kernels::BesideRows rows{};
    if ((cell.flags & kBesideFlags) != 0) {
      const BesideShape shape =
          BesideShape::of(engine_, plan_->request, engine_.nodeRank(i), static_cast<std::size_t>(cell.bytes));
      rows = shape.at(tensorOf(i, kTickets));
    }
    growing_.push_back(rows.board);
    if (!(cell.flags & kWantsCounters)) growing_.back().counters = nullptr;
    if (!(cell.flags & kCountsAtEnd)) rows.board.counters = nullptr;
    if (!(cell.flags & kWantsTickets)) {
      rows.tickets = nullptr;
      rows.localIds = nullptr;
    }
    beside_.push_back(rows);
    anyGrowing_ |= (cell.flags & kWantsCounters) != 0;
    anyBeside_ |= (cell.flags & (kCountsAtEnd | kWantsTickets)) != 0;
  }
}

kernels::PlaceArgs DeviceDispatch::placeArgs(const std::vector<DeviceOperation*>& all, int tensor) const {
  kernels::PlaceArgs args{};
  args.rankCount = static_cast<int>(all.size());
  args.maxTokens = mostTokens(all);
  args.rowBytes = tensors_[tensor].rowBytes;
  args.sourceStride = args.destinationStride = args.rowBytes;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& one = static_cast<const DeviceDispatch&>(*all[i]);
    args.ranks[i].plan = one.plan_->device->pointers();
    args.ranks[i].source = one.tensors_[tensor].input;
  }
  std::copy(bases_[tensor].begin(), bases_[tensor].end(), args.bases);
  return args;
}

// Rows of the gaps are a rank's own: whoever places rows does not touch them.
void DeviceDispatch::fillGaps(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                              cuda::Stream stream) const {
  kernels::GapsArgs args{};
  for (int t = 0; t < 2; ++t) args.rowBytes[t] = tensors_[t].rowBytes;
  args.mostRows = plan_->request.options.alignment - 1;
  for (DeviceOperation* one : all) {
    const auto& dispatch = static_cast<const DeviceDispatch&>(*one);
    if (!one->plan().request.zeroFill) continue;
    const DeviceCounts counts = deviceCounts(one->plan());
    kernels::GapsArgs::Rank& rank = args.ranks[args.rankCount++];
    rank.rows = counts.localExpertRows;
    rank.starts = counts.localExpertStart;
    rank.experts = one->plan().view.header->localExperts;
    for (int t = 0; t < 2; ++t) rank.outputs[t] = dispatch.tensors_[t].output;
    args.mostExperts = std::max(args.mostExperts, rank.experts);
  }
  cuda::gaps(args, budget, stream);
}

kernels::ResetArgs::Rank DeviceDispatch::resetOf() const {
  kernels::ResetArgs::Rank rank{};
  if (flags_ == 0) return rank;
  const DeviceBeside& beside = *plan_->device->beside();
  const kernels::BesideRows rows = beside.rows();
  rank.board = rows.board;
  if (!(flags_ & (kWantsCounters | kCountsAtEnd))) rank.board.counters = nullptr;
  if (flags_ & kWantsTickets) rank.tickets = rows.tickets;
  rank.starts = deviceCounts(*plan_).localExpertStart;
  rank.rows = beside.shape().rows;
  return rank;
}

void DeviceDispatch::resetBeside(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                                 cuda::Stream stream) const {
  kernels::ResetArgs args{};
  for (DeviceOperation* one : all) args.ranks[args.rankCount++] = static_cast<const DeviceDispatch&>(*one).resetOf();
  cuda::reset(args, budget, stream);
}

void DeviceDispatch::describeRows(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                                  cuda::Stream stream) const {
  kernels::DescribeArgs args{};
  const PlanRequest& request = plan_->request;
  args.rankCount = static_cast<int>(all.size());
  args.maxTokens = mostTokens(all);
  args.topk = request.map.topk;
  args.oneGpu = domain_.oneLaunch();
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& one = static_cast<const DeviceDispatch&>(*all[i]);
    const DevicePlan& device = *one.plan_->device;
    args.ranks[i].plan = device.pointers();
    if (request.options.layout != plan::Layout::rankOrder) continue;
    args.ranks[i].ids = device.keptIds();
    args.ranks[i].idBytes = one.plan_->request.map.idBytes;
    args.ranks[i].weights = one.plan_->request.map.weights == nullptr ? nullptr : device.keptWeights();
  }
  std::copy(beside_.begin(), beside_.end(), args.rows);
  cuda::describe(args, budget, stream);
}

void DeviceDispatch::launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                               cuda::Stream stream) {
  if (domain_.oneLaunch() && (anyGrowing_ || anyBeside_)) resetBeside(all, budget, stream);
  if (plan_->request.options.alignment > 1) fillGaps(all, budget, stream);
  if (tensors_[1].rowBytes > 0 && !request_.castToFp8) cuda::place(placeArgs(all, 1), budget, stream);
  if (request_.castToFp8) {
    kernels::CastPlaceArgs args{};
    args.place = placeArgs(all, 0);
    args.place.rowBytes = args.place.sourceStride = request_.rowBytes;
    std::copy(bases_[1].begin(), bases_[1].end(), args.scaleBases);
    args.scaleStride = tensors_[1].rowBytes;
    cuda::castPlace(args, budget, stream);
  } else if (anyGrowing_) {
    // The first tensor is the last to be placed: a counted row is there in both.
    kernels::CountedPlaceArgs args{};
    args.place = placeArgs(all, 0);
    args.oneGpu = domain_.oneLaunch();
    std::copy(growing_.begin(), growing_.end(), args.boards);
    cuda::placeCounted(args, budget, stream);
  } else {
    kernels::PlaceArgs args = placeArgs(all, 0);
    if (crossing_.across() == Across::no) {
      cuda::place(args, budget, stream);
    } else {
      tellOthers(args, all);
      if (crossing_.across() == Across::behind) {
        cuda::place(args, budget, stream);
      } else {
        const bool dividesAll = budget.blocks == 0 && plan_->device->mostTokensOfNode() >= kTokensToDivide;
        const Divided divided = dividesAll ? divideAll(cuda::multiprocessors(domain_.device()), kSendersOfDispatch)
                                           : divide(budget, kSendersOfDispatch);
        const cuda::Stream beside = domain_.beside(stream, capturing());
        cuda::place(args, divided.senders, beside);
        if (follows_) meetPlans(stream);
        expand(divided.takers, stream);
        domain_.joinBeside(stream, capturing());
      }
    }
  }
  if (anyBeside_) describeRows(all, budget, stream);
}

void DeviceDispatch::launchRest(const std::vector<DeviceOperation*>&, const kernels::Budget& budget,
                                cuda::Stream stream) {
  expand(budget, stream);
}

void DeviceDispatch::meetPlans(cuda::Stream stream) const {
  const DevicePlan::Captured& captured = plan_->device->captured();
  if (domain_.meetsOnGpu() && captured.met == captured.planned) {
    domain_.meet(slot_, stream);
  } else {
    cuda::addCaptureEdges(stream, captured.met);
  }
}

void DeviceDispatch::tellOthers(kernels::PlaceArgs& args, const std::vector<DeviceOperation*>& all) const {
  args.across = true;
  args.pieces = kernels::wholePieces(args.rowBytes);
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    if (domain_.partOf(i) == domain_.part()) continue;
    args.expands[i] = true;
    if (crossing_.across() == Across::beside) args.arrivals[i] = arrivals_[static_cast<std::size_t>(domain_.partOf(i))];
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto local = static_cast<const DeviceDispatch*>(all[i])->engine_.localIndex();
    args.firstUnit[i] = static_cast<std::uint32_t>(local) * unitsOfRank();
  }
}

void DeviceDispatch::expand(const kernels::Budget& budget, cuda::Stream stream) const {
  kernels::ExpandArgs args{};
  args.rowBytes = tensors_[0].rowBytes;
  args.maxTokens = plan_->device->mostTokensOfNode();
  args.pieces = kernels::wholePieces(args.rowBytes);
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    if (domain_.partOf(i) == domain_.part()) {
      args.bases[i] = bases_[0][static_cast<std::size_t>(i)];
    } else {
      args.sources[args.sourceCount++] = {plan_->device->ofRank(i).pointers,
                                          static_cast<std::uint32_t>(i) * unitsOfRank()};
    }
  }
  if (crossing_.across() == Across::beside) {
    args.arrivals = arrivals_[static_cast<std::size_t>(domain_.part())];
    args.wait = domain_.arrivalWait();
  }
  cuda::expand(args, budget, stream);
}

Outcome DeviceDispatch::finish() {
  Statistics& statistics = engine_.statistics();
  if (!plan_->device->countsStayOnDevice()) {
    const auto entries = static_cast<std::uint64_t>(plan_->view.header->entries);
    statistics.rowsPlaced += entries;
    statistics.bytesPlaced += entries * (tensors_[0].rowBytes + tensors_[1].rowBytes);
  }
  plan_->dispatched = true;
  if (!capturing()) plan_->device->setDescribed();
  return Outcome::complete;
}

DeviceCombine::DeviceCombine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request,
                             cuda::Stream stream)
    : DeviceOperation(OperationKind::combine, engine, std::move(plan), stream), request_(request) {
  if (plan_->request.options.layout == plan::Layout::rankOrder) request_.weighted = false;
  domain_.checkPointer("input", request_.input);
  domain_.checkPointer("output", request_.output);
  domain_.checkPointer("bias", request_.bias);
  domain_.checkRowBytes(rowBytes());
}

void DeviceCombine::announce(Meeting::Announcement& announcement) {
  const auto rows = static_cast<std::size_t>(plan_->receiveRows());
  const std::size_t rowBytes = request_.elements * exec::elementBytes(request_.type);
  announcement.rows = rows;
  announcement.parameters = parameters(rowBytes, 0, static_cast<std::uint64_t>(request_.type),
                                       (request_.weighted ? 1u : 0u) | (request_.partialsFp32 ? 2u : 0u));
  announceTensor(announcement, kRows, request_.input, rows * rowBytes);
  announceCrossing(announcement);
}

void DeviceCombine::bind() {
  bases_.clear();
  partials_.clear();
  arrivals_.clear();
  crossing_.bind(meeting_, engine_.nodeRanks());
  pieces_ = {};
  for (int i = 0; i < engine_.nodeRanks(); ++i)
    pieces_.bytes = std::max(pieces_.bytes, static_cast<unsigned>(meeting_.ready(i).bytes));
  if (pieces_.bytes > 0) pieces_.count = static_cast<unsigned>((rowBytes() + pieces_.bytes - 1) / pieces_.bytes);
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    bases_.push_back(tensorOf(i, kRows));
    partials_.push_back(tensorOf(i, kRows2));
    arrivals_.push_back(reinterpret_cast<std::uint32_t*>(tensorOf(i, kLanding)));
    if (crossing_.across() != Across::beside) arrivals_.back() = nullptr;
  }
}

// Sums cross links where that is less than the rows: in the row's type, so not where partial sums are wanted in FP32.
bool DeviceCombine::mayBringPartials() const {
  if (request_.partialsFp32 && request_.type != exec::RowType::f32) return false;
  const std::int64_t bound = engine_.config().maxStagingBytes;
  const std::int64_t bytes =
      std::int64_t{plan_->device->mostTokensOfNode()} * mostPartials() * static_cast<std::int64_t>(rowBytes());
  return bound <= 0 || bytes <= bound;
}

int DeviceCombine::mostPartials() const { return std::min(plan_->request.map.topk, engine_.nodeRanks()); }

int DeviceCombine::filled() const {
  kernels::SumArgs own{};
  own.rankCount = 1;
  own.topk = plan_->request.map.topk;
  own.elements = request_.elements;
  own.type = static_cast<kernels::SumType>(request_.type);
  own.ranks[0].out = request_.output;
  own.ranks[0].bias = request_.bias;
  own.bases[0] = request_.input;
  if (!cuda::sumFillsMultiprocessors(own)) return 0;
  const int all = cuda::multiprocessors(domain_.device()), budget = domain_.maxSms() * domain_.sharing();
  if (budget > 0 && budget < all) return budget;
  const std::int64_t rows = std::int64_t{plan_->device->mostTokensOfNode()} * domain_.sharing() * own.topk;
  return rows * static_cast<std::int64_t>(rowBytes()) >= kBytesToDivide ? all : 0;
}

kernels::RowPieces DeviceCombine::wantedPieces() const {
  const std::int64_t tokens = plan_->device->mostTokensOfNode();
  return filled_ > 0 ? kernels::piecesOf(rowBytes(), tokens, kPiecesToFill * filled_, kLeastToFill)
                     : kernels::piecesOf(rowBytes(), tokens, kPiecesOfAll, kLeastOfAll);
}

void DeviceCombine::announceCrossing(Meeting::Announcement& announcement) {
  crossing_.consider(domain_, *plan_, rowBytes(), overheadOfCombine(domain_), capturing());
  const std::uint32_t flags = crossing_.flags(domain_, mayBringPartials());
  if (flags == 0) return;
  const auto places = std::max<std::size_t>(
      static_cast<std::size_t>(plan_->request.map.tokens) * static_cast<std::size_t>(mostPartials()), 1);
  filled_ = filled();
  const kernels::RowPieces pieces = wantedPieces();
  const std::size_t words = crossing_.tells(domain_) ? places * pieces.count : 0;
  std::byte* const partials = domain_.partials(slot_, places * rowBytes());
  std::uint32_t* const arrivals = domain_.arrivals(slot_, words);
  if (partials == nullptr || (words > 0 && arrivals == nullptr)) return;  // rows are then read one by one
  announcement.flags |= flags;
  announcement.bytes = pieces.bytes;
  announceTensor(announcement, kRows2, partials, places * rowBytes());
  announceTensor(announcement, kLanding, arrivals, words * sizeof(std::uint32_t));
}

void DeviceCombine::launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                              cuda::Stream stream) {
  if (crossing_.across() == Across::no) {
    cuda::sum(sumArgs(all), budget, stream);
  } else if (crossing_.across() == Across::behind) {
    bringPartials(budget, stream);
  } else {
    const kernels::SumArgs sums = sumArgs(all);
    const double share = sendersOfCombine(sums.topk, domain_.parts());
    const bool dividesAll = budget.blocks == 0 && filled_ > 0 && cuda::sumFillsMultiprocessors(sums);
    const Divided divided =
        dividesAll ? divideAll(cuda::multiprocessors(domain_.device()), share) : divide(budget, share);
    const cuda::Stream beside = domain_.beside(stream, capturing());
    bringPartials(divided.senders, beside);
    cuda::sum(sums, divided.takers, stream);
    domain_.joinBeside(stream, capturing());
  }
}

void DeviceCombine::launchRest(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                               cuda::Stream stream) {
  cuda::sum(sumArgs(all), budget, stream);
}

void DeviceCombine::bringPartials(const kernels::Budget& budget, cuda::Stream stream) const {
  kernels::PartialArgs args{};
  args.elements = request_.elements;
  args.type = static_cast<kernels::SumType>(request_.type);
  args.weighted = request_.weighted;
  args.maxTokens = plan_->device->mostTokensOfNode();
  args.pieces = pieces_;
  args.mostPartials = mostPartials();
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (domain_.partOf(i) == domain_.part()) {
      args.bases[i] = bases_[at];
    } else {
      args.homes[args.homeCount++] = {{plan_->device->ofRank(i).pointers, 0}, partials_[at], arrivals_[at]};
    }
  }
  cuda::partial(args, budget, stream);
}

kernels::SumArgs DeviceCombine::sumArgs(const std::vector<DeviceOperation*>& all) const {
  kernels::SumArgs args{};
  args.rankCount = static_cast<int>(all.size());
  args.maxTokens = mostTokens(all);
  args.topk = plan_->request.map.topk;
  args.elements = request_.elements;
  args.type = static_cast<kernels::SumType>(request_.type);
  args.weighted = request_.weighted;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& one = static_cast<const DeviceCombine&>(*all[i]);
    args.ranks[i].plan = one.plan_->device->pointers();
    args.ranks[i].out = one.request_.output;
    args.ranks[i].bias = one.request_.bias;
    const auto local = static_cast<std::size_t>(one.engine_.localIndex());
    args.partials[i] = partials_[local];
    args.arrivals[i] = arrivals_[local];
  }
  std::copy(bases_.begin(), bases_.end(), args.bases);
  if (crossing_.across() != Across::no) {
    args.across = true;
    args.pieces = pieces_;
    args.mostPartials = mostPartials();
    args.wait = domain_.arrivalWait();
    for (int i = 0; i < engine_.nodeRanks(); ++i) args.brings[i] = domain_.partOf(i) != domain_.part();
  }
  return args;
}

std::unique_ptr<Operation> makeDeviceDispatch(Engine& engine, std::shared_ptr<PlanState> plan,
                                              const DispatchRequest& request, void* stream) {
  if (engine.deviceExecutor() != nullptr) {
    DispatchRequest onHost = request;
    onHost.stream = stream;
    return makeDispatch(engine, std::move(plan), onHost);
  }
  return std::make_unique<DeviceDispatch>(engine, std::move(plan), request, stream);
}

std::unique_ptr<Operation> makeDeviceCombine(Engine& engine, std::shared_ptr<PlanState> plan,
                                             const CombineRequest& request, void* stream) {
  if (engine.deviceExecutor() != nullptr) {
    CombineRequest onHost = request;
    onHost.stream = stream;
    return makeCombine(engine, std::move(plan), onHost);
  }
  return std::make_unique<DeviceCombine>(engine, std::move(plan), request, stream);
}

}  // namespace fusco::engine
