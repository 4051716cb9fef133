#include "engine/combine.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace fusco::engine {

using plan::Copy;
using plan::Entry;

namespace {
// Bytes of rows read before the other steps get their turn; with rows fetched into scratch, what should stay in the
// cache.
constexpr std::size_t kChunkBytes = 4 * 1024 * 1024;
constexpr std::size_t kFetchBytes = 1024 * 1024;
// Where sums are only launched.
constexpr std::size_t kDeferredChunkBytes = 64 * 1024 * 1024;
}  // namespace

void TermSource::bind(const Meeting& meeting, const std::byte* own, std::size_t rowBytes, exec::RowType type,
                      bool weighted) {
  const int count = engine_.nodeRanks();
  bases_.assign(static_cast<std::size_t>(count), nullptr);
  remote_.assign(static_cast<std::size_t>(count), 0);
  rowBytes_ = rowBytes;
  type_ = type;
  weighted_ = weighted;
  anyRemote_ = false;
  for (int i = 0; i < count; ++i) {
    const transport::MemoryRef& memory = meeting.ready(i).memory[kRows];
    const auto at = static_cast<std::size_t>(i);
    bases_[at] = i == engine_.localIndex() ? own : reachTensor(engine_, i, meeting.ready(i), kRows);
    if (bases_[at] == nullptr && memory.kind != transport::MemoryRef::none) {
      remote_[at] = memory.address;
      anyRemote_ = true;
    }
  }
}

void TermSource::append(const Copy& copy, std::uint32_t endEntry, const Entry* entries, const float* weights,
                        std::size_t offset, std::vector<exec::Term>& terms) {
  const std::uint32_t count = endEntry - copy.firstEntry;
  // Entries come by slot; sums go by rank, then slot. K is small: sort by insertion.
  std::uint32_t order[64];
  std::vector<std::uint32_t> many;
  std::uint32_t* at = order;
  if (count > 64) {
    many.resize(count);
    at = many.data();
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint32_t e = copy.firstEntry + i;
    std::uint32_t j = i;
    while (j > 0 && entries[at[j - 1]].rank > entries[e].rank) {
      at[j] = at[j - 1];
      --j;
    }
    at[j] = e;
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    const Entry& entry = entries[at[i]];
    const float weight = weighted_ ? weights[at[i]] : 1.0f;
    const std::size_t place = entry.row * rowBytes_ + offset;
    if (bases_[entry.rank] != nullptr) {
      terms.push_back({bases_[entry.rank] + place, weight, type_});
    } else {
      wanted_.push_back({terms.size(), entry.rank, remote_[entry.rank] + place});
      terms.push_back({nullptr, weight, type_});
    }
  }
}

void TermSource::fetch(std::size_t partBytes, std::vector<exec::Term>& terms) {
  if (wanted_.empty()) return;
  const std::size_t stride = (partBytes + 63) & ~std::size_t{63};
  std::byte* rows = engine_.scratch(0).need(wanted_.size() * stride);
  for (int rank = 0; rank < engine_.nodeRanks(); ++rank) {
    std::vector<transport::Segment> local, remote;
    for (std::size_t i = 0; i < wanted_.size(); ++i) {
      if (wanted_[i].rank != rank) continue;
      local.push_back({rows + i * stride, partBytes});
      remote.push_back({reinterpret_cast<void*>(wanted_[i].address), partBytes});
      terms[wanted_[i].term].row = rows + i * stride;
    }
    if (local.empty()) continue;
    engine_.fabric().vmRead(engine_.nodeRank(rank), local, remote);
    engine_.statistics().processVmBytes += local.size() * partBytes;
  }
  wanted_.clear();
}

Combine::Combine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request)
    : ShuffleOperation(OperationKind::combine, engine, std::move(plan)), request_(request), source_(engine) {
  elementBytes_ = exec::elementBytes(request.type);
  rowBytes_ = request.elements * elementBytes_;
  // One row per token and rank stands for all of its slots there: there is no weight to apply to it.
  if (plan_->request.options.layout == plan::Layout::rankOrder) request_.weighted = false;
  partialType_ = request.partialsFp32 ? exec::RowType::f32 : request.type;
}

void Combine::reset() {
  ShuffleOperation::reset();
  partAt_ = 0;
  token_ = 0;
  back_ = std::vector<StreamBack>(plan_->streams().out.size());
  sent_.assign(plan_->streams().in.size(), {});
  out_.clear();
  bias_.clear();
  terms_.clear();
  first_.assign(1, 0);
}

Outcome Combine::run(const Step& step) {
  switch (step.kind) {
    case StepKind::ready:
      return announceReady();
    case StepKind::waitReady:
      return bindPeers();
    case StepKind::put:
      return sumHome();
    case StepKind::sendBack:
      return sendBack(static_cast<std::size_t>(step.index));
    case StepKind::done:
      return announceDone();
    case StepKind::waitDone:
      return waitDone();
    default:
      return Outcome::complete;
  }
}

// Home waits for the partials that are still to come, in this pass over parts of rows or in the next.
bool Combine::needs(const Step& step, int rank) const {
  if (step.kind != StepKind::put) return ShuffleOperation::needs(step, rank);
  const bool lastPass = partAt_ + partElements_ >= request_.elements;
  for (std::size_t i = 0; i < back_.size(); ++i) {
    if (plan_->streams().out[i].peer == rank && (!lastPass || back_[i].nextToken())) return true;
  }
  return false;
}

Outcome Combine::announceReady() {
  PlanState& plan = *plan_;
  settleTensors(engine_, request_.stream, operationName(kind()),
                {{"input", request_.input}, {"output", request_.output}, {"bias", request_.bias}});
  if (!plan_->streams().in.empty() && !plan.dispatched) {
    fail(Code::invalidUsage,
         fmt::format("rank {}: combine before the first dispatch of its plan: on several nodes the way back follows "
                     "what dispatch brought; dispatch first",
                     engine_.fabric().rank()));
  }
  const std::size_t bytes = static_cast<std::size_t>(plan.receiveRows()) * rowBytes_;
  const Reach reach = reachOf(request_.input, bytes);
  Meeting::Announcement a;
  a.rows = static_cast<std::uint64_t>(plan.receiveRows());
  a.parameters = parameters(rowBytes_, 0, static_cast<std::uint64_t>(request_.type),
                            (request_.weighted ? 1u : 0u) | (request_.partialsFp32 ? 2u : 0u));
  const std::byte* memory = request_.input;
  if (reach == Reach::staged) {
    std::byte* window = engine_.staging(slot_, 1, plan.rowsToHold() * rowBytes_);
    std::memcpy(window, request_.input, bytes);
    engine_.statistics().stagedBytes += bytes;
    memory = window;
  }
  describeTensor(engine_, a, kRows, memory, bytes);
  meeting_.announce(a);

  std::size_t slot = SIZE_MAX;
  const std::size_t partialBytes = exec::elementBytes(partialType_);
  for (std::size_t i = 0; i < back_.size(); ++i) {
    const Stream& stream = plan_->streams().out[i];
    transport::PostedLink& link = linkTo(stream);
    back_[i].begin(link, plan.view, stream.flows, signature(), &passage(kIn, i));
    back_[i].setPlace(
        [this](transport::PostedLink& from, const std::byte* inSlot) { return engine_.payloadIn(from, inSlot); });
    slot = link.slotBytes();
    // Home takes tokens in order, and waits for the slowest of its streams: what the others bring meanwhile must not
    // stand in their lanes, where peers wait that have nothing to do with it. Fast lanes have time to spare.
    const bool slow = link.sliceBytes() < slot;
    if (slow && back_.size() > 1 && engine_.deviceExecutor() == nullptr) back_[i].setShelf(Shelf(engine_.buffer()));
  }
  for (std::size_t i = 0; i < plan_->streams().in.size(); ++i) {
    transport::PostedLink& link = linkTo(plan_->streams().in[i]);
    slot = link.slotBytes();
    sent_[i].sliceBytes = link.sliceBytes();
  }
  partElements_ =
      slot == SIZE_MAX ? request_.elements : partBytes(request_.elements * partialBytes, 0, slot) / partialBytes;
  ownCopy_ = plan.view.flows[plan_->streams().ownFlow].copyBegin;
  return Outcome::complete;
}

Outcome Combine::bindPeers() {
  if (!meeting_.allReady(kind())) return Outcome::idle;
  source_.bind(meeting_, request_.input, rowBytes_, request_.type, request_.weighted);
  return Outcome::complete;
}

void Combine::flushHome() {
  if (out_.empty()) return;
  StageTimer timer(engine_.statistics().sumNs);
  const std::size_t elements = std::min(partElements_, request_.elements - partAt_);
  source_.fetch(elements * elementBytes_, terms_);
  exec::SumArgs args;
  args.out = out_.data();
  args.bias = request_.bias == nullptr ? nullptr : bias_.data();
  args.terms = terms_.data();
  args.first = first_.data();
  args.rows = out_.size();
  args.elements = elements;
  args.outType = request_.type;
  engine_.executor().sum(args);
  engine_.statistics().bytesRead += terms_.size() * elements * elementBytes_;
  out_.clear();
  bias_.clear();
  terms_.clear();
  first_.assign(1, 0);
}

// Collects the terms of one token: node by node, within a node by rank and slot. False when a partial has not arrived.
bool Combine::gatherToken(std::uint32_t token) {
  const plan::View& view = plan_->view;
  const int ownNode = engine_.topology().nodeOf(engine_.fabric().rank());
  const std::size_t part = std::min(partElements_, request_.elements - partAt_) * exec::elementBytes(partialType_);
  const std::size_t rowOffset = partAt_ * exec::elementBytes(partialType_);
  const plan::Flow& own = view.flows[plan_->streams().ownFlow];
  // Look before taking anything: every stream whose next row is this token must have it here.
  for (std::size_t i = 0; i < back_.size(); ++i) {
    if (back_[i].nextToken() == token && back_[i].row(SliceKind::partials, number(), rowOffset, part) == nullptr)
      return false;
  }
  bool ownDone = false;
  const auto takeOwn = [&] {
    // Copies of one token follow each other (dedup none): their entries are put in order together.
    const std::size_t first = ownCopy_;
    while (ownCopy_ < own.copyEnd && view.copies[ownCopy_].token == token) ++ownCopy_;
    if (ownCopy_ > first) {
      source_.append(view.copies[first], view.copies[ownCopy_].firstEntry, view.entries, view.weights,
                     partAt_ * elementBytes_, terms_);
    }
    ownDone = true;
  };
  for (std::size_t i = 0; i < back_.size(); ++i) {
    if (!ownDone && engine_.topology().nodeOf(plan_->streams().out[i].peer) > ownNode) takeOwn();
    if (back_[i].nextToken() == token) {
      const std::byte* row = back_[i].row(SliceKind::partials, number(), rowOffset, part);
      terms_.push_back({row, 1.0f, partialType_});
      back_[i].take();
    }
  }
  if (!ownDone) takeOwn();
  out_.push_back(request_.output + token * rowBytes_ + partAt_ * elementBytes_);
  if (request_.bias != nullptr) bias_.push_back(request_.bias + token * rowBytes_ + partAt_ * elementBytes_);
  first_.push_back(static_cast<std::uint32_t>(terms_.size()));
  return true;
}

Outcome Combine::sumHome() {
  const std::int64_t tokens = plan_->view.header->tokensUsed;
  const std::size_t chunk = source_.fetches()             ? kFetchBytes
                            : engine_.executor().defers() ? kDeferredChunkBytes
                                                          : kChunkBytes;
  const std::size_t limit = chunk / std::max<std::size_t>(1, rowBytes_);
  bool moved = false;
  bool stalled = false;
  bool waits = false;
  while (token_ < tokens && !stalled && terms_.size() <= limit && out_.size() < 4096) {
    if (!gatherToken(static_cast<std::uint32_t>(token_))) {
      stalled = waits = true;
      break;
    }
    ++token_;
    moved = true;
    for (StreamBack& back : back_) stalled |= back.holdsSpent();
  }
  flushHome();
  for (StreamBack& back : back_) {
    back.release();
    // The executor still reads it: nobody will ring when it has ended.
    moved |= back.holdsSpent();
    stalled |= back.holdsSpent();
  }
  for (StreamBack& back : back_) {
    if (waits) back.setAside(SliceKind::partials, number());
  }
  if (token_ < tokens || (stalled && engine_.executor().defers())) return moved ? Outcome::moved : Outcome::idle;
  partAt_ += partElements_;
  if (tokens == 0 || partAt_ >= request_.elements) return Outcome::complete;
  token_ = 0;
  ownCopy_ = plan_->view.flows[plan_->streams().ownFlow].copyBegin;
  for (StreamBack& back : back_) back.nextPass();
  return Outcome::moved;
}

Outcome Combine::sendBack(std::size_t stream) {
  const InflowRecord& record = plan_->inflows[stream];
  Progress& progress = sent_[stream];
  exec::Passage& way = passage(kOut, stream);
  const std::size_t copies = record.copies.empty() ? 0 : record.copies.size() - 1;
  if (copies == 0) return Outcome::complete;
  transport::PostedLink& link = linkTo(plan_->streams().in[stream]);
  if (leaving_[stream].open) {
    if (postWhenFilled(leaving_[stream], way, link) != Outcome::complete) return Outcome::moved;
    return progress.all ? Outcome::complete : Outcome::moved;
  }
  std::byte* slot = link.acquire();
  if (slot == nullptr) return Outcome::idle;
  StageTimer timer(engine_.statistics().sumNs);
  const std::size_t partialBytes = exec::elementBytes(partialType_);
  const std::size_t elements = std::min(partElements_, request_.elements - progress.part);
  const std::size_t rowBytes = elements * partialBytes;
  // Copies of one token that follow each other (dedup none) become one row.
  const auto runEnd = [&](std::size_t copy) {
    const std::uint32_t token = record.copies[copy].token;
    while (copy < copies && record.copies[copy].token == token) ++copy;
    return copy;
  };
  std::size_t rows = 0;
  std::size_t end = progress.copy;
  while (end < copies && (rows == 0 || sliceBytes(rows + 1, 0, rowBytes) <= progress.sliceBytes)) {
    end = runEnd(end);
    ++rows;
  }
  Slice slice = layOutSlice(slot, SliceKind::partials, rows, 0, rowBytes);
  std::vector<exec::Term> terms;
  std::vector<std::byte*> out(rows);
  std::vector<std::uint32_t> first(1, 0);
  std::size_t copy = progress.copy;
  std::byte* const place = engine_.payloadOut(link, slice.payload);
  std::byte* const payload = way.out(place, rows * sliceRowStride(rowBytes));
  for (std::size_t i = 0; i < rows; ++i) {
    slice.copies[i] = {record.copies[copy].token, 0};
    const std::size_t stop = runEnd(copy);
    source_.append(record.copies[copy], record.copies[stop].firstEntry, record.entries.data(), record.weights.data(),
                   progress.part * elementBytes_, terms);
    copy = stop;
    first.push_back(static_cast<std::uint32_t>(terms.size()));
    out[i] = payload + i * sliceRowStride(rowBytes);
  }
  slice.copies[rows] = {0, 0};
  source_.fetch(elements * elementBytes_, terms);
  exec::SumArgs args;
  args.out = out.data();
  args.terms = terms.data();
  args.first = first.data();
  args.rows = rows;
  args.elements = elements;
  args.outType = partialType_;
  args.streaming = false;
  engine_.executor().sum(args);
  engine_.statistics().bytesRead += terms.size() * elements * elementBytes_;
  const std::size_t rowOffset = progress.part * partialBytes;
  progress.copy = end;
  if (progress.copy == copies) {
    progress.copy = 0;
    progress.part += partElements_;
  }
  progress.all = progress.part >= request_.elements;
  way.close();
  leaving_[stream] = {
      true, slice, sliceBytes(rows, 0, rowBytes), rowOffset, progress.all ? kLastSlice : 0, place != slice.payload};
  if (postWhenFilled(leaving_[stream], way, link) != Outcome::complete) return Outcome::moved;
  return progress.all ? Outcome::complete : Outcome::moved;
}

std::unique_ptr<Operation> makeCombine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request) {
  return std::make_unique<Combine>(engine, std::move(plan), request);
}

}  // namespace fusco::engine
