#include "engine/device/shuffle.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

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
constexpr double kOverheadOfDispatch = 4 << 20, kOverheadOfCombine = 8 << 20;

// The cost rule: whether rows of `rowBytes` had better cross links once. With uniform routing a token has experts on
// P (1 - (1 - 1/P)^K) of P parts.
bool savesEnough(const PlanRequest& request, int parts, std::int64_t tokens, std::size_t rowBytes, double overhead) {
  if (parts < 2) return false;
  double elsewhere = 1;
  for (int k = 0; k < request.map.topk; ++k) elsewhere *= 1.0 - 1.0 / parts;
  const double rows = request.map.topk - parts * (1 - elsewhere);
  return static_cast<double>(tokens) * rows * (parts - 1) / parts * static_cast<double>(rowBytes) > overhead;
}

// Where launches wait beside others both want some multiprocessors.
constexpr int kLeastBlocks = 4;

// What a plan and its ranks must be for rows to cross links once, whatever it saves.
bool mayCrossOnce(const DeviceDomain& domain, const PlanRequest& request, std::size_t members) {
  const plan::Dedup dedup = request.options.dedup;
  return domain.together() && !domain.oneLaunch() && request.options.layout != plan::Layout::rankOrder &&
         (dedup == plan::Dedup::full || (dedup == plan::Dedup::node && request.dedupAuto)) &&
         members <= kernels::kMaxSources && request.map.topk <= kernels::kMaxPlanTopk;
}

Across besideOrBehind(const DeviceDomain& domain, bool enoughSms) {
  return domain.ownGpus() && enoughSms ? Across::beside : Across::behind;
}

// Of a budget, what goes to those who send; the rest to those who take.
kernels::Budget senders(const kernels::Budget& budget) { return {(budget.blocks * 11 + 19) / 20}; }
kernels::Budget takers(const kernels::Budget& budget) { return {budget.blocks - senders(budget).blocks}; }
}  // namespace

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
}

void DeviceDispatch::announce(Meeting::Announcement& announcement) {
  domain_.checkPointer("input", tensors_[0].input);
  domain_.checkPointer("output", tensors_[0].output);
  domain_.checkPointer("input2", tensors_[1].input);
  domain_.checkPointer("output2", tensors_[1].output);
  const auto rows = static_cast<std::size_t>(plan_->receiveRows());
  announcement.rows = rows;
  announcement.parameters = parameters(request_.rowBytes, request_.rowBytes2, 0, request_.castToFp8 ? 1 : 0);
  announceTensor(announcement, kRows, tensors_[0].output, rows * tensors_[0].rowBytes);
  announceTensor(announcement, kRows2, tensors_[1].output, rows * tensors_[1].rowBytes);
  plan_->device->usedOn(stream(), capturing());

  // Tickets say the same each time, and so do counters that nobody looks at before the end.
  flags_ = 0;
  const DeviceBeside* beside = plan_->device->beside();
  if (beside == nullptr) return;
  const PlanRequest& plan = plan_->request;
  const bool first = !plan_->dispatched;
  if (first && DeviceBeside::wantsTickets(plan)) flags_ |= kWantsTickets;
  if (DeviceBeside::wantsCounters(plan)) {
    if (plan.counters && !request_.castToFp8) {
      flags_ |= kWantsCounters;
    } else if (plan.counters || first) {
      flags_ |= kCountsAtEnd;
    }
  }
  announcement.flags = flags_;
  if (flags_ == 0) return;
  announcement.bytes = beside->shape().rows;
  announceTensor(announcement, kTickets, beside->data(), beside->shape().bytes());
  if (domain_.oneLaunch()) return;  // else the others' kernels are not to wait for
  std::vector<DeviceOperation*> self{this};
  resetBeside(self, budgetOf(self), stream());
}

void DeviceDispatch::bind() {
  for (auto& bases : bases_) bases.clear();
  growing_.clear();
  beside_.clear();
  anyGrowing_ = anyBeside_ = anyCounted_ = false;
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    bases_[0].push_back(tensorOf(i, kRows));
    bases_[1].push_back(tensorOf(i, kRows2));
    const ReadyCell& cell = meeting_.ready(i);
    kernels::BesideRows rows{};
    if (cell.flags != 0) {
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
    anyCounted_ |= (cell.flags & (kWantsCounters | kCountsAtEnd)) != 0;
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
    args.ranks[i].plan = one.plan_->device->pointers(one.engine_.streams().ownFlow);
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
    args.ranks[i].plan = device.pointers(one.engine_.streams().ownFlow);
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
    if (across_ == Across::no) {
      cuda::place(args, budget, stream);
    } else {
      tellOthers(args, all);
      if (across_ == Across::behind) {
        cuda::place(args, budget, stream);
      } else {
        const cuda::Stream beside = domain_.beside(stream, capturing());
        cuda::place(args, senders(budget), stream);
        expand(all, takers(budget), beside);
        domain_.joinBeside(stream, capturing());
      }
    }
  }
  if (anyBeside_) describeRows(all, budget, stream);
}

void DeviceDispatch::launchRest(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                                cuda::Stream stream) {
  expand(all, budget, stream);
}

bool DeviceDispatch::crossesOnce(const std::vector<DeviceOperation*>& all) const {
  const PlanRequest& request = plan_->request;
  if (!mayCrossOnce(domain_, request, all.size())) return false;
  if (request_.castToFp8 || anyCounted_ || tensors_[0].rowBytes == 0) return false;
  for (DeviceOperation* one : all) {
    const std::vector<DeviceOperation*> alone{one};
    if (!cuda::placesAcross(placeArgs(alone, 0))) return false;
  }
  if (!request.dedupAuto) return true;
  return domain_.ownGpus() &&
         savesEnough(request, partCount(all), mostTokens(all), tensors_[0].rowBytes, kOverheadOfDispatch);
}

void DeviceDispatch::agree(const std::vector<DeviceOperation*>& all) {
  const Across across = crossesOnce(all) ? besideOrBehind(domain_, mayTake(all, kLeastBlocks)) : Across::no;
  for (DeviceOperation* one : all) static_cast<DeviceDispatch*>(one)->across_ = across;
}

namespace {
std::uint32_t unitsOfSource(const std::vector<DeviceOperation*>& everyone, const kernels::RowPieces& pieces) {
  return static_cast<std::uint32_t>(mostTokens(everyone)) * pieces.count;
}
}  // namespace

void DeviceDispatch::tellOthers(kernels::PlaceArgs& args, const std::vector<DeviceOperation*>& all) const {
  args.across = true;
  args.pieces = kernels::wholePieces(args.rowBytes);
  const std::uint32_t units = unitsOfSource(everyone(), args.pieces);
  // A GPU's words are with the first of its ranks.
  std::map<int, std::uint32_t*> words;
  for (std::size_t i = 0; i < everyone().size(); ++i) {
    DeviceDomain& domain = static_cast<DeviceDispatch*>(everyone()[i])->domain_;
    if (domain.part() == domain_.part()) continue;
    args.expands[i] = true;
    if (across_ != Across::beside) continue;
    std::uint32_t*& ofPart = words[domain.part()];
    if (ofPart == nullptr) ofPart = domain.arrivals(slot_, std::size_t{units} * everyone().size());
    args.arrivals[i] = ofPart;
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto local = static_cast<const DeviceDispatch*>(all[i])->engine_.localIndex();
    args.firstUnit[i] = static_cast<std::uint32_t>(local) * units;
  }
}

void DeviceDispatch::expand(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                            cuda::Stream stream) const {
  kernels::ExpandArgs args{};
  args.rowBytes = tensors_[0].rowBytes;
  args.maxTokens = mostTokens(everyone());
  args.pieces = kernels::wholePieces(args.rowBytes);
  const std::uint32_t units = unitsOfSource(everyone(), args.pieces);
  for (std::size_t i = 0; i < everyone().size(); ++i) {
    const auto& one = static_cast<const DeviceDispatch&>(*everyone()[i]);
    if (one.domain_.part() == domain_.part()) {
      args.bases[i] = bases_[0][i];
    } else {
      args.sources[args.sourceCount++] = {one.plan_->device->pointers(one.engine_.streams().ownFlow),
                                          static_cast<std::uint32_t>(i) * units};
    }
  }
  if (across_ == Across::beside) {
    args.arrivals =
        static_cast<DeviceDispatch*>(all.front())->domain_.arrivals(slot_, std::size_t{units} * everyone().size());
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
  return Outcome::complete;
}

DeviceCombine::DeviceCombine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request,
                             cuda::Stream stream)
    : DeviceOperation(OperationKind::combine, engine, std::move(plan), stream), request_(request) {
  if (plan_->request.options.layout == plan::Layout::rankOrder) request_.weighted = false;
}

void DeviceCombine::announce(Meeting::Announcement& announcement) {
  domain_.checkPointer("input", request_.input);
  domain_.checkPointer("output", request_.output);
  domain_.checkPointer("bias", request_.bias);
  const auto rows = static_cast<std::size_t>(plan_->receiveRows());
  const std::size_t rowBytes = request_.elements * exec::elementBytes(request_.type);
  announcement.rows = rows;
  announcement.parameters = parameters(rowBytes, 0, static_cast<std::uint64_t>(request_.type),
                                       (request_.weighted ? 1u : 0u) | (request_.partialsFp32 ? 2u : 0u));
  announceTensor(announcement, kRows, request_.input, rows * rowBytes);
  plan_->device->usedOn(stream(), capturing());
}

void DeviceCombine::bind() {
  bases_.clear();
  for (int i = 0; i < engine_.nodeRanks(); ++i) bases_.push_back(tensorOf(i, kRows));
}

// Sums cross links where that is less than the rows: in the row's type, so not where partial sums are wanted in FP32.
bool DeviceCombine::crossesOnce() const {
  const PlanRequest& request = plan_->request;
  const std::vector<DeviceOperation*>& all = everyone();
  if (!mayCrossOnce(domain_, request, all.size())) return false;
  if ((request_.partialsFp32 && request_.type != exec::RowType::f32) || request_.elements == 0) return false;
  const std::int64_t bound = engine_.config().maxStagingBytes;
  const auto tokens = static_cast<std::int64_t>(mostTokens(all));
  if (bound > 0 && tokens * mostPartials() * static_cast<std::int64_t>(rowBytes()) > bound) return false;
  if (!request.dedupAuto) return true;
  return domain_.ownGpus() && savesEnough(request, partCount(all), tokens, rowBytes(), kOverheadOfCombine);
}

int DeviceCombine::mostPartials() const {
  return std::min(plan_->request.map.topk, static_cast<int>(everyone().size()));
}

void DeviceCombine::agree(const std::vector<DeviceOperation*>& all) {
  const Across across = crossesOnce() ? besideOrBehind(domain_, mayTake(all, kLeastBlocks)) : Across::no;
  for (DeviceOperation* one : all) {
    auto& combine = *static_cast<DeviceCombine*>(one);
    combine.across_ = across;
    combine.arrivals_ = nullptr;
    if (across == Across::no) continue;
    const auto places =
        static_cast<std::size_t>(combine.plan_->request.map.tokens) * static_cast<std::size_t>(mostPartials());
    combine.partials_ = combine.domain_.partials(slot_, std::max<std::size_t>(places, 1) * rowBytes());
    if (across == Across::beside)
      combine.arrivals_ = combine.domain_.arrivals(
          slot_, std::max<std::size_t>(places, 1) * kernels::piecesOf(rowBytes(), mostTokens(all)).count);
  }
}

void DeviceCombine::launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                              cuda::Stream stream) {
  if (across_ == Across::no) {
    sumRows(all, budget, stream);
  } else if (across_ == Across::behind) {
    bringPartials(budget, stream);
  } else {
    const cuda::Stream beside = domain_.beside(stream, capturing());
    bringPartials(senders(budget), stream);
    sumRows(all, takers(budget), beside);
    domain_.joinBeside(stream, capturing());
  }
}

void DeviceCombine::launchRest(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                               cuda::Stream stream) {
  sumRows(all, budget, stream);
}

void DeviceCombine::bringPartials(const kernels::Budget& budget, cuda::Stream stream) const {
  kernels::PartialArgs args{};
  args.elements = request_.elements;
  args.type = static_cast<kernels::SumType>(request_.type);
  args.weighted = request_.weighted;
  args.maxTokens = mostTokens(everyone());
  args.pieces = kernels::piecesOf(rowBytes(), args.maxTokens);
  args.mostPartials = mostPartials();
  for (std::size_t i = 0; i < everyone().size(); ++i) {
    const auto& one = static_cast<const DeviceCombine&>(*everyone()[i]);
    if (one.domain_.part() == domain_.part()) {
      args.bases[i] = bases_[i];
    } else {
      args.homes[args.homeCount++] = {
          {one.plan_->device->pointers(one.engine_.streams().ownFlow), 0}, one.partials_, one.arrivals_};
    }
  }
  cuda::partial(args, budget, stream);
}

void DeviceCombine::sumRows(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                            cuda::Stream stream) const {
  kernels::SumArgs args{};
  args.rankCount = static_cast<int>(all.size());
  args.maxTokens = mostTokens(all);
  args.topk = plan_->request.map.topk;
  args.elements = request_.elements;
  args.type = static_cast<kernels::SumType>(request_.type);
  args.weighted = request_.weighted;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& one = static_cast<const DeviceCombine&>(*all[i]);
    args.ranks[i].plan = one.plan_->device->pointers(one.engine_.streams().ownFlow);
    args.ranks[i].out = one.request_.output;
    args.ranks[i].bias = one.request_.bias;
    args.partials[i] = one.partials_;
    args.arrivals[i] = one.arrivals_;
  }
  std::copy(bases_.begin(), bases_.end(), args.bases);
  if (across_ != Across::no) {
    args.across = true;
    args.pieces = kernels::piecesOf(rowBytes(), mostTokens(everyone()));
    args.mostPartials = mostPartials();
    args.wait = domain_.arrivalWait();
    for (std::size_t i = 0; i < everyone().size(); ++i)
      args.brings[i] = static_cast<const DeviceCombine&>(*everyone()[i]).domain_.part() != domain_.part();
  }
  cuda::sum(args, budget, stream);
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
