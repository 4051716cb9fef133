#include "engine/dispatch.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "engine/device/plan_memory.h"

namespace fusco::engine {

using plan::Copy;
using plan::Entry;
using plan::kNoRow;

namespace {
// Rows moved before the other steps get their turn; where they are only launched it may be more.
constexpr std::size_t kChunkBytes = 512 * 1024;
constexpr std::size_t kDeferredChunkBytes = 32 * kChunkBytes;
}  // namespace

Dispatch::Dispatch(Engine& engine, std::shared_ptr<PlanState> plan, const DispatchRequest& request)
    : ShuffleOperation(OperationKind::dispatch, engine, std::move(plan)), request_(request), placer_(engine) {}

void Dispatch::noLongerUnderWay() {
  if (underWay_) --plan_->dispatchesUnderWay;
  underWay_ = false;
}

void Dispatch::reset() {
  ShuffleOperation::reset();
  noLongerUnderWay();
  tensors_.clear();
  landing_.clear();
  sources_.clear();
  at_ = 0;
  out_.assign(plan_->streams().out.size(), {});
  arriving_.assign(plan_->streams().in.size(), {});
  scattering_.assign(plan_->streams().in.size(), {});
  arrivals_.assign(plan_->streams().in.size(), {});
}

Outcome Dispatch::run(const Step& step) {
  const auto index = static_cast<std::size_t>(step.index);
  switch (step.kind) {
    case StepKind::ready:
      return announceReady();
    case StepKind::waitReady:
      return bindPeers();
    case StepKind::put:
      return put();
    case StepKind::extract:
      return extract(index);
    case StepKind::place:
      return place(index);
    case StepKind::done:
      return announceDone();
    case StepKind::waitDone:
      return waitDone();
    case StepKind::finish:
      return finish();
    default:
      return Outcome::complete;
  }
}

// Where the rows must be FP8 before they leave (slices, process_vm), the whole input is cast into library memory first.
void Dispatch::castInput() {
  StageTimer timer(engine_.statistics().extractNs);
  const auto tokens = static_cast<std::size_t>(plan_->view.header->tokensUsed);
  const auto mostTokens = static_cast<std::size_t>(plan_->view.header->tokens);
  const std::size_t elements = request_.rowBytes / 2;
  const std::size_t scaleBytes = elements / 128 * 4;
  std::byte* rows = nullptr;
  std::byte* scales = nullptr;
  if (plan_->device != nullptr) {
    rows = plan_->device->castMemory((mostTokens + 1) * (elements + scaleBytes));
    scales = rows + mostTokens * elements;
  } else {
    rows = plan_->castRows.need(mostTokens * elements + 64);
    scales = plan_->castScales.need(mostTokens * scaleBytes + 64);
  }
  std::vector<Copy> copies(tokens + 1);
  std::vector<Entry> entries(tokens);
  for (std::size_t t = 0; t <= tokens; ++t) {
    copies[t] = {static_cast<std::uint32_t>(t), static_cast<std::uint32_t>(t)};
    if (t < tokens) entries[t] = {0, 0, static_cast<std::uint32_t>(t)};
  }
  exec::CastArgs args;
  args.place.source = request_.input;
  args.place.sourceStride = request_.rowBytes;
  args.place.copies = copies.data();
  args.place.entries = entries.data();
  args.place.end = tokens;
  args.place.bases = &rows;
  args.place.destinationStride = elements;
  args.place.rowBytes = request_.rowBytes;
  args.place.streaming = false;
  args.elements = elements;
  args.scaleBases = &scales;
  args.scaleStride = scaleBytes;
  engine_.executor().cast(args);
  engine_.executor().fence();
  tensors_[0].input = rows;
  tensors_[1].input = scales;
}

Outcome Dispatch::announceReady() {
  PlanState& plan = *plan_;
  settleTensors(engine_, request_.stream, operationName(kind()),
                {{"input", request_.input},
                 {"output", request_.output},
                 {"input2", request_.input2},
                 {"output2", request_.output2},
                 {"outputScales", request_.outputScales}});
  const auto rows = static_cast<std::size_t>(plan.receiveRows());
  if (request_.castToFp8) {
    const std::size_t elements = request_.rowBytes / 2;
    tensors_.push_back({nullptr, request_.output, elements, kRows});
    tensors_.push_back({nullptr, request_.outputScales, elements / 128 * 4, kRows2});
  } else {
    tensors_.push_back({request_.input, request_.output, request_.rowBytes, kRows});
    if (request_.rowBytes2 > 0) tensors_.push_back({request_.input2, request_.output2, request_.rowBytes2, kRows2});
  }
  const bool rankOrder = plan.request.options.layout == plan::Layout::rankOrder;
  if (rankOrder && !plan.dispatched) {
    tensors_.push_back(
        {plan.extraRows.data(), plan.extra.data(), static_cast<std::size_t>(plan.view.header->topk) * 8, kExtra});
  }

  Reach reach = Reach::mapped;
  for (const Tensor& tensor : tensors_) reach = std::max(reach, reachOf(tensor.output, rows * tensor.rowBytes));
  const bool expand = plan.request.dedupAuto ? reach != Reach::mapped : plan.request.options.dedup == plan::Dedup::full;
  flags_ = 0;
  if (expand) flags_ |= kWantsPrimariesOnly;
  if (reach == Reach::staged) flags_ |= kStaged;
  const std::uint32_t kept = flags_;
  // What belongs to the plan and is written by a dispatch (tickets, landing lists, counters, a cast input) is written
  // by one at a time.
  const bool shares = plan.counters.data() != nullptr || request_.castToFp8;
  if (plan.dispatchesUnderWay > 0 && (shares || !plan.dispatched || (kept != 0 && plan.landingFlags != kept))) {
    tensors_.clear();
    return Outcome::idle;
  }
  ++plan.dispatchesUnderWay;
  underWay_ = true;
  if (flags_ != 0 && (!plan.dispatched || plan.landingFlags != kept)) {
    flags_ |= kWantsLandingList;
    plan.landing.need(plan.rowsToHold() * 4 + 4);
    std::fill_n(plan.landing.as<std::uint32_t>(), rows, kNoRow);
    plan.landingFlags = 0;  // until it has been written
    plan.landingSorted = false;
  }
  if (plan.tickets.data() != nullptr && !plan.dispatched) flags_ |= kWantsTickets;
  if (plan.counters.data() != nullptr) {
    auto* board = plan.counters.as<CounterBoard>();
    // Consumers may be looking.
    for (std::uint64_t e = 0; e < board->localExperts; ++e) {
      std::atomic_ref<std::uint64_t>(board->counters()[e]).store(0, std::memory_order_relaxed);
    }
    clearCounters(plan);
    // A GPU's are set when all rows are there.
    if (kept == 0 && engine_.device() == nullptr) flags_ |= kWantsCounters;
  }
  recording_ = !plan.dispatched && !plan_->streams().in.empty();
  if (recording_) plan.inflows.assign(plan_->streams().in.size(), {});

  Meeting::Announcement a;
  a.flags = flags_;
  a.rows = rows;
  a.parameters = parameters(request_.rowBytes, request_.rowBytes2, 0, request_.castToFp8 ? 1 : 0);
  std::size_t stagedBytes = 0;
  for (const Tensor& tensor : tensors_) stagedBytes += plan::arenaAlign(plan.rowsToHold() * tensor.rowBytes);
  std::byte* staging = reach == Reach::staged ? engine_.staging(slot_, 0, stagedBytes) : nullptr;
  for (const Tensor& tensor : tensors_) {
    const std::size_t bytes = rows * tensor.rowBytes;
    std::byte* memory = tensor.output;
    if (staging != nullptr && tensor.role != kExtra) {
      memory = staging;
      staging += plan::arenaAlign(bytes);
    }
    landing_.push_back(memory);
    if (tensor.ofLibrary()) {
      if (bytes > 0) a.memory[tensor.role] = engine_.fabric().describe(memory, bytes);
    } else {
      describeTensor(engine_, a, tensor.role, memory, bytes);
    }
  }
  if (flags_ & kWantsTickets) a.memory[kTickets] = engine_.fabric().describe(plan.tickets.data(), plan.tickets.size());
  if (flags_ & kWantsLandingList)
    a.memory[kLanding] = engine_.fabric().describe(plan.landing.data(), plan.landing.size());
  if (flags_ & kWantsCounters)
    a.memory[kCounters] = engine_.fabric().describe(plan.counters.data(), plan.counters.size());
  if (plan.request.zeroFill && plan.view.header->alignment > 1) {
    for (int e = 0; e < plan.view.header->localExperts; ++e) {
      const auto end = static_cast<std::size_t>(plan.view.localExpertStart[e] + plan.view.localExpertRows[e]);
      const auto next = static_cast<std::size_t>(plan.view.localExpertStart[e + 1]);
      for (const Tensor& tensor : tensors_) {
        if (next > end) engine_.executor().fill(tensor.output + end * tensor.rowBytes, (next - end) * tensor.rowBytes);
      }
    }
  }
  meeting_.announce(a);

  castOnTheWay_ = request_.castToFp8 && plan_->streams().out.empty();
  if (request_.castToFp8 && !castOnTheWay_) castInput();
  std::vector<std::size_t> rowBytes;
  for (const Tensor& tensor : tensors_) {
    rowBytes.push_back(tensor.rowBytes);
    sources_.push_back({tensor.input, tensor.rowBytes, tensor.ofLibrary()});
  }
  for (std::size_t i = 0; i < out_.size(); ++i) {
    const Stream& stream = plan_->streams().out[i];
    transport::PostedLink& link = linkTo(stream);
    out_[i].begin(plan.view, stream.flows, rowBytes, link.slotBytes(), link.sliceBytes());
  }
  at_ = plan.view.flows[plan_->streams().ownFlow].copyBegin;
  return Outcome::complete;
}

Outcome Dispatch::bindPeers() {
  if (!meeting_.allReady(kind())) return Outcome::idle;
  MemoryRole roles[kTensors];
  std::byte* own[kTensors];
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    roles[t] = tensors_[t].role;
    own[t] = tensors_[t].output;
  }
  placer_.bind(meeting_, static_cast<int>(tensors_.size()), roles, own);
  if (castOnTheWay_ && !placer_.everyRank()) {
    castOnTheWay_ = false;
    castInput();
  }
  openPlaces();
  return Outcome::complete;
}

// To those that send to this rank: where the rows of this node's ranks go, by tensor and rank, as far as they can be
// written from here.
void Dispatch::openPlaces() {
  if (engine_.executor().defers()) return;
  std::vector<transport::Segment> pieces;
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    for (int rank = 0; rank < engine_.nodeRanks(); ++rank) {
      std::byte* const base = placer_.base(static_cast<int>(t), rank);
      pieces.push_back({base, base == nullptr ? 0 : meeting_.ready(rank).rows * tensors_[t].rowBytes});
    }
  }
  for (const Stream& stream : plan_->streams().in) {
    transport::PostedLink& link = linkTo(stream);
    if (link.opensPlaces()) link.openPlaces(placesTag(), pieces);
  }
}

// The rows of this slice have been written to the first place of each. The others get them from there.
void Dispatch::copyFromFirst(const Slice& slice) {
  const transport::SliceHeader& h = *slice.header;
  const Tensor& tensor = tensors_[slice.tensor()];
  for (std::uint32_t i = 0; i < h.rows; ++i) {
    const std::uint32_t first = slice.copies[i].firstEntry, end = slice.copies[i + 1].firstEntry;
    std::byte* const base =
        first < end ? placer_.base(static_cast<int>(slice.tensor()), slice.entries[first].rank) : nullptr;
    if (base == nullptr) {
      fail(Code::internalError, fmt::format("{} says that it has written a row to where none was opened to it",
                                            engine_.fabric().describeRank(h.source)));
    }
    if (end == first + 1) continue;
    const Copy rest[2] = {{slice.copies[i].token, first + 1}, {0, end}};
    PlaceRequest r;
    r.tensor = static_cast<int>(slice.tensor());
    r.rows = base + slice.entries[first].row * tensor.rowBytes + h.rowOffset;
    r.stride = sliceRowStride(h.rowBytes);
    r.packed = true;
    r.copies = rest;
    r.entries = slice.entries;
    r.end = 1;
    r.rowBytes = tensor.rowBytes;
    r.rowOffset = h.rowOffset;
    r.partBytes = h.rowBytes;
    r.ofLibrary = tensor.ofLibrary();
    placer_.place(r);
  }
}

void Dispatch::putRows(std::size_t begin, std::size_t end) {
  const plan::View& view = plan_->view;
  std::size_t first = 0;
  if (castOnTheWay_) {
    StageTimer timer(engine_.statistics().placeNs);
    exec::CastArgs args;
    args.place.source = request_.input;
    args.place.sourceStride = request_.rowBytes;
    args.place.copies = view.copies;
    args.place.entries = view.entries;
    args.place.begin = begin;
    args.place.end = end;
    args.place.bases = placer_.bases(0);
    args.place.destinationStride = tensors_[0].rowBytes;
    args.place.rowBytes = request_.rowBytes;
    args.elements = request_.rowBytes / 2;
    args.scaleBases = placer_.bases(1);
    args.scaleStride = tensors_[1].rowBytes;
    engine_.executor().cast(args);
    const std::uint64_t rows = view.copies[end].firstEntry - view.copies[begin].firstEntry;
    engine_.statistics().rowsPlaced += rows;
    engine_.statistics().bytesPlaced += rows * tensors_[0].rowBytes;
    first = 2;
  }
  for (std::size_t t = first; t < tensors_.size(); ++t) {
    PlaceRequest r;
    r.tensor = static_cast<int>(t);
    r.rows = tensors_[t].input;
    r.stride = r.rowBytes = r.partBytes = tensors_[t].rowBytes;
    r.copies = view.copies;
    r.entries = view.entries;
    r.begin = begin;
    r.end = end;
    r.ofLibrary = tensors_[t].ofLibrary();
    placer_.place(r);
  }
}

Outcome Dispatch::put() {
  const plan::View& view = plan_->view;
  const plan::Flow& own = view.flows[plan_->streams().ownFlow];
  const std::size_t bytes = engine_.executor().defers() ? kDeferredChunkBytes : kChunkBytes;
  const std::size_t chunk = std::max<std::size_t>(1, bytes / std::max<std::size_t>(1, request_.rowBytes));
  const std::size_t end = std::min<std::size_t>(own.copyEnd, at_ + chunk);
  if (at_ < end) {
    putRows(at_, end);
    if (placer_.describes()) {
      placer_.describe(engine_.fabric().rank(), view.copies, view.entries, view.weights, at_, end);
    }
    if (placer_.counts()) placer_.count(view.copies, view.entries, at_, end);
    at_ = end;
  }
  return at_ >= own.copyEnd ? Outcome::complete : Outcome::moved;
}

Outcome Dispatch::extract(std::size_t stream) { return extractSlice(stream, out_[stream], sources_.data()); }

void Dispatch::record(std::size_t stream, const Slice& slice) {
  InflowRecord& record = plan_->inflows[stream];
  const auto base = static_cast<std::uint32_t>(record.entries.size());
  if (!record.copies.empty()) record.copies.pop_back();
  for (std::uint32_t i = 0; i <= slice.header->rows; ++i) {
    record.copies.push_back({slice.copies[i].token, slice.copies[i].firstEntry + base});
  }
  record.entries.insert(record.entries.end(), slice.entries, slice.entries + slice.header->entries);
  record.weights.insert(record.weights.end(), slice.weights, slice.weights + slice.header->entries);
}

// Where the rows of a slice end up, if each of them has one place that this rank can write.
bool Dispatch::findPlaces(const Slice& slice) {
  const transport::SliceHeader& h = *slice.header;
  const Tensor& tensor = tensors_[slice.tensor()];
  places_.clear();
  if (h.rows == 0 || h.entries != h.rows || h.rowBytes != sliceRowStride(h.rowBytes)) return false;
  for (std::uint32_t i = 0; i < h.rows; ++i) {
    if (slice.copies[i].firstEntry != i) return false;
    const Entry& entry = slice.entries[i];
    std::byte* base = placer_.base(static_cast<int>(slice.tensor()), entry.rank);
    if (base == nullptr) return false;
    places_.push_back({base + entry.row * tensor.rowBytes + h.rowOffset, h.rowBytes});
  }
  return true;
}

// Brings the rows of the oldest slice to their places. False: more of it has to arrive first.
bool Dispatch::takeIn(transport::PostedLink& link, std::size_t stream, const Slice& slice, bool whole) {
  const transport::SliceHeader& h = *slice.header;
  std::vector<transport::Segment>& rows = scattering_[stream];
  const Tensor& tensor = tensors_[slice.tensor()];
  const bool deferred = !tensor.ofLibrary() && engine_.executor().defers();
  if (!whole) {
    if (!deferred && rows.empty() && findPlaces(slice)) rows = places_;
    if (!rows.empty()) {
      StageTimer timer(engine_.statistics().placeNs);
      if (!link.receiveRows(rows)) return false;
      engine_.statistics().rowsPlaced += h.rows;
      engine_.statistics().bytesPlaced += h.rows * h.rowBytes;
      rows.clear();
      return true;
    }
    if (link.peek() == nullptr) return false;
  }
  if (h.rows == 0) return true;
  PlaceRequest r;
  r.tensor = static_cast<int>(slice.tensor());
  exec::Passage& way = passage(kIn, stream);
  r.rows = slice.payload;
  if (deferred) r.rows = way.in(engine_.payloadIn(link, slice.payload), h.rows * sliceRowStride(h.rowBytes));
  r.stride = sliceRowStride(h.rowBytes);
  r.packed = true;
  r.copies = slice.copies;
  r.entries = slice.entries;
  r.end = h.rows;
  r.rowBytes = tensor.rowBytes;
  r.rowOffset = h.rowOffset;
  r.partBytes = h.rowBytes;
  r.ofLibrary = tensor.ofLibrary();
  placer_.place(r);
  if (deferred) way.close();
  return true;
}

Outcome Dispatch::place(std::size_t stream) {
  transport::PostedLink& link = linkTo(plan_->streams().in[stream]);
  Arriving& arriving = arriving_[stream];
  const auto next = [&] {
    if (!passage(kIn, stream).done()) return Outcome::moved;
    arriving.open = false;
    link.release();
    return arriving.last ? Outcome::complete : Outcome::moved;
  };
  if (arriving.open) return next();
  const transport::PostedLink::Arrival arrival = link.peekHead();
  if (arrival.slot == nullptr) return Outcome::idle;
  const Slice slice = readSlice(arrival.slot, link.slotBytes());
  if (scattering_[stream].empty()) checkRows(slice, sources_);
  if (arrival.placed) {
    copyFromFirst(slice);
  } else if (!takeIn(link, stream, slice, arrival.whole)) {
    return Outcome::idle;
  }
  const transport::SliceHeader& h = *slice.header;
  if (h.rows > 0) {
    if (slice.tensor() == 0 && h.rowOffset == 0) {
      if (recording_) record(stream, slice);
      if (placer_.describes()) placer_.describe(h.source, slice.copies, slice.entries, slice.weights, 0, h.rows);
    }
    const bool complete =
        slice.tensor() + 1 == tensors_.size() && h.rowOffset + h.rowBytes == tensors_[slice.tensor()].rowBytes;
    if (complete && placer_.counts()) placer_.count(slice.copies, slice.entries, 0, h.rows);
  }
  arriving = {true, slice.last()};
  if (engine_.balancer().measures()) {
    ArrivalClock& clock = arrivals_[stream];
    clock.took(h.payloadOffset + h.rows * h.rowBytes, nowNs());
    if (arriving.last) engine_.balancer().meter().arrived(plan_->streams().in[stream], clock);
  }
  return next();
}

// Groups the landing list by the row that is read, so that each is read once and written to all its places.
void Dispatch::sortLanding() {
  PlanState& plan = *plan_;
  if (plan.landingSorted) return;
  const auto rows = static_cast<std::size_t>(plan.receiveRows());
  const std::uint32_t* from = plan.landing.as<std::uint32_t>();
  std::vector<std::uint32_t> first(rows + 1, 0);
  for (std::size_t row = 0; row < rows; ++row) {
    if (from[row] != kNoRow) ++first[from[row] + 1];
  }
  for (std::size_t row = 0; row < rows; ++row) first[row + 1] += first[row];
  plan.landingEntries.resize(first[rows]);
  std::vector<std::uint32_t> next(first.begin(), first.end() - 1);
  for (std::size_t row = 0; row < rows; ++row) {
    if (from[row] != kNoRow) plan.landingEntries[next[from[row]]++] = {0, 0, static_cast<std::uint32_t>(row)};
  }
  plan.landingCopies.clear();
  for (std::size_t row = 0; row < rows; ++row) {
    if (first[row + 1] > first[row]) plan.landingCopies.push_back({static_cast<std::uint32_t>(row), first[row]});
  }
  plan.landingCopies.push_back({0, first[rows]});
  plan.landingSorted = true;
}

void Dispatch::land(int t) {
  PlanState& plan = *plan_;
  const Tensor& tensor = tensors_[static_cast<std::size_t>(t)];
  std::byte* output = tensor.output;
  // A library tensor is its own landing buffer even when the caller's rows are staged.
  if ((flags_ & kStaged) && landing_[static_cast<std::size_t>(t)] == output) return;
  exec::PlaceArgs args;
  args.source = landing_[static_cast<std::size_t>(t)];
  args.sourceStride = args.destinationStride = args.rowBytes = tensor.rowBytes;
  args.copies = plan.landingCopies.data();
  args.entries = plan.landingEntries.data();
  args.end = plan.landingCopies.size() - 1;
  args.bases = &output;
  executorOf(tensor.ofLibrary()).place(args);
  if (args.source != output) engine_.statistics().stagedBytes += plan.landingEntries.size() * tensor.rowBytes;
}

void Dispatch::finishRankOrder() {
  PlanState& plan = *plan_;
  const auto rows = static_cast<std::size_t>(plan.receiveRows());
  const auto topk = static_cast<std::size_t>(plan.view.header->topk);
  const int experts = plan.request.map.experts;
  const int firstExpert = engine_.topology().firstExpert(engine_.fabric().rank(), experts);
  const int localExperts = plan.view.header->localExperts;
  auto* ids = plan.rankOrderIds.as<std::int32_t>();
  auto* weights = plan.rankOrderWeights.as<float>();
  for (std::size_t row = 0; row < rows; ++row) {
    const std::byte* received = plan.extra.data() + row * topk * 8;
    std::memcpy(weights + row * topk, received + topk * 4, topk * 4);
    for (std::size_t k = 0; k < topk; ++k) {
      std::int32_t id;
      std::memcpy(&id, received + k * 4, 4);
      const bool here = id >= firstExpert && id < firstExpert + localExperts;
      ids[row * topk + k] = here ? id - firstExpert : -1;
      if (!here) weights[row * topk + k] = 0;
    }
  }
}

void Dispatch::finishCounters() {
  PlanState& plan = *plan_;
  auto* board = plan.counters.as<CounterBoard>();
  const bool slotted = plan.request.options.layout == plan::Layout::slotted;
  if (!(flags_ & kWantsCounters)) {
    for (std::uint64_t e = 0; e < board->localExperts; ++e) {
      std::uint64_t rows = static_cast<std::uint64_t>(slotted ? 0 : plan.view.localExpertRows[e]);
      if (slotted) {
        const auto* tickets = plan.tickets.as<Ticket>();
        for (std::int32_t row = board->starts()[e]; row < board->starts()[e + 1]; ++row)
          rows += tickets[row].source >= 0;
      }
      std::atomic_ref<std::uint64_t>(board->counters()[e]).store(rows, std::memory_order_release);
    }
  }
  if (slotted) {
    plan.localExpertRows.assign(board->counters(), board->counters() + board->localExperts);
  }
}

// Without deduplication a token's rows come one by one, and who places one does not know the others: their first is
// found here.
void Dispatch::finishTickets() {
  PlanState& plan = *plan_;
  auto* tickets = plan.tickets.as<Ticket>();
  std::vector<std::uint32_t> rows;
  for (std::int64_t row = 0; row < plan.receiveRows(); ++row) {
    if (tickets[row].source >= 0) rows.push_back(static_cast<std::uint32_t>(row));
  }
  const auto key = [&](std::uint32_t row) {
    return std::tie(tickets[row].source, tickets[row].token, tickets[row].slot);
  };
  std::sort(rows.begin(), rows.end(), [&](std::uint32_t a, std::uint32_t b) { return key(a) < key(b); });
  for (std::size_t i = 1; i < rows.size(); ++i) {
    const Ticket& before = tickets[rows[i - 1]];
    Ticket& ticket = tickets[rows[i]];
    if (ticket.source == before.source && ticket.token == before.token) ticket.primary = before.primary;
  }
}

Outcome Dispatch::finish() {
  if (flags_ & kWantsLandingList) plan_->landingFlags = flags_ & (kWantsPrimariesOnly | kStaged);
  if (flags_ & (kWantsPrimariesOnly | kStaged)) {
    StageTimer timer(engine_.statistics().placeNs);
    sortLanding();
    for (std::size_t t = 0; t < tensors_.size(); ++t) land(static_cast<int>(t));
    engine_.executor().fence();
  }
  if (plan_->request.options.layout == plan::Layout::rankOrder && !plan_->dispatched) finishRankOrder();
  if (plan_->tickets.data() != nullptr && plan_->request.options.dedup == plan::Dedup::none && !plan_->dispatched)
    finishTickets();
  if (plan_->counters.data() != nullptr) finishCounters();
  if (plan_->device != nullptr) bringBeside(*plan_);
  plan_->dispatched = true;
  noLongerUnderWay();
  return Outcome::complete;
}

std::unique_ptr<Operation> makeDispatch(Engine& engine, std::shared_ptr<PlanState> plan,
                                        const DispatchRequest& request) {
  return std::make_unique<Dispatch>(engine, std::move(plan), request);
}

}  // namespace fusco::engine
