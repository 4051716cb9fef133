#include "engine/backward.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace fusco::engine {

using plan::Copy;
using plan::Entry;
using plan::kSlotMask;

namespace {
constexpr std::size_t kChunkBytes = 512 * 1024;
constexpr std::size_t kDeferredChunkBytes = 32 * kChunkBytes;  // where calls are only launched
}  // namespace

CombineBackward::CombineBackward(Engine& engine, std::shared_ptr<PlanState> plan, const CombineBackwardRequest& request)
    : ShuffleOperation(OperationKind::combineBackward, engine, std::move(plan)), request_(request), placer_(engine) {
  rowBytes_ = request.elements * exec::elementBytes(request.type);
}

void CombineBackward::reset() {
  ShuffleOperation::reset();
  at_ = 0;
  out_.assign(plan_->streams().out.size(), {});
  home_.assign(plan_->streams().out.size(), {});
  dots_.assign(plan_->streams().in.size(), {});
}

Outcome CombineBackward::run(const Step& step) {
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
    case StepKind::sendBack:
      return sendBack(index);
    case StepKind::receiveBack:
      return receiveBack(index);
    case StepKind::done:
      return announceDone();
    case StepKind::waitDone:
      return waitDone();
    case StepKind::finish:
      return finish();
  }
  return Outcome::complete;
}

Outcome CombineBackward::announceReady() {
  settleTensors(engine_, request_.stream, operationName(kind()),
                {{"outputGradient", request_.outputGradient},
                 {"expertRows", request_.expertRows},
                 {"inputGradient", request_.inputGradient},
                 {"weightGradient", request_.weightGradient}});
  const plan::View& view = plan_->view;
  const auto rows = static_cast<std::size_t>(plan_->receiveRows());
  const std::size_t bytes = rows * rowBytes_;
  const Reach reach = std::max(reachOf(request_.inputGradient, bytes), reachOf(request_.expertRows, bytes));
  staged_ = reach == Reach::staged;
  landing_ = request_.inputGradient;
  expertRows_ = request_.expertRows;
  if (staged_) {
    const std::size_t held = plan_->rowsToHold() * rowBytes_;
    landing_ = engine_.staging(slot_, 0, held);
    // Rows that nobody sends a gradient to stay as they are.
    std::memcpy(landing_, request_.inputGradient, bytes);
    std::byte* copy = engine_.staging(slot_, 1, held);
    std::memcpy(copy, request_.expertRows, bytes);
    engine_.statistics().stagedBytes += 2 * bytes;
    expertRows_ = copy;
  }
  Meeting::Announcement a;
  a.rows = rows;
  a.parameters = parameters(rowBytes_, 0, static_cast<std::uint64_t>(request_.type), 0);
  describeTensor(engine_, a, kRows, landing_, bytes);
  describeTensor(engine_, a, kRows2, expertRows_, bytes);
  meeting_.announce(a);
  const auto slots = static_cast<std::size_t>(view.header->tokensUsed) * static_cast<std::size_t>(view.header->topk);
  weightGradient_ = request_.weightGradient;
  if (engine_.device() != nullptr) {
    broughtGradient_.resize(slots);
    weightGradient_ = broughtGradient_.data();
  }
  std::fill_n(weightGradient_, slots, 0.0f);
  const plan::Flow& own = view.flows[plan_->streams().ownFlow];
  at_ = own.copyBegin;
  for (std::size_t i = 0; i < out_.size(); ++i) {
    const Stream& stream = plan_->streams().out[i];
    transport::PostedLink& link = linkTo(stream);
    out_[i].begin(view, stream.flows, {rowBytes_}, link.slotBytes(), link.sliceBytes());
  }
  return Outcome::complete;
}

Outcome CombineBackward::bindPeers() {
  if (!meeting_.allReady(kind())) return Outcome::idle;
  const MemoryRole roles[] = {kRows, kRows2};
  std::byte* own[] = {landing_, const_cast<std::byte*>(expertRows_)};
  placer_.bind(meeting_, 2, roles, own);
  const auto count = static_cast<std::size_t>(engine_.nodeRanks());
  rowBases_.assign(placer_.bases(0), placer_.bases(0) + count);
  expertBases_.assign(placer_.bases(1), placer_.bases(1) + count);
  // A rank of which only one of the two tensors is mapped is served by process_vm for both.
  for (const int rank : placer_.vmRanks())
    rowBases_[static_cast<std::size_t>(rank)] = expertBases_[static_cast<std::size_t>(rank)] = nullptr;
  return Outcome::complete;
}

void CombineBackward::back(const exec::PlaceArgs& rows, const float* weights, std::size_t rowOffset, float* dots) {
  StageTimer timer(engine_.statistics().placeNs);
  std::vector<std::byte*> bases = rowBases_;
  std::vector<std::byte*> experts = expertBases_;
  for (std::size_t i = 0; i < bases.size(); ++i) {
    if (bases[i] == nullptr) continue;
    bases[i] += rowOffset;
    experts[i] += rowOffset;
  }
  exec::BackArgs args;
  args.place = rows;
  args.place.bases = bases.data();
  args.weights = weights;
  args.expertBases = experts.data();
  args.expertStride = rowBytes_;
  args.type = request_.type;
  args.dots = dots;
  engine_.executor().back(args);
  for (const int rank : placer_.vmRanks()) backByVm(rows, weights, rowOffset, rank, dots);
  engine_.statistics().rowsPlaced += rows.copies[rows.end].firstEntry - rows.copies[rows.begin].firstEntry;
}

void CombineBackward::backByVm(const exec::PlaceArgs& rows, const float* weights, std::size_t rowOffset, int localIndex,
                               float* dots) {
  comm::Fabric& fabric = engine_.fabric();
  const int rank = engine_.nodeRank(localIndex);
  std::vector<std::uint32_t> chosen;
  std::vector<Copy> copies;
  std::vector<Entry> entries;
  std::vector<float> chosenWeights;
  for (std::size_t i = rows.begin; i < rows.end; ++i) {
    const auto source = static_cast<std::uint32_t>(rows.packed ? i - rows.begin : rows.copies[i].token);
    for (std::uint32_t e = rows.copies[i].firstEntry; e < rows.copies[i + 1].firstEntry; ++e) {
      if (rows.entries[e].rank != localIndex) continue;
      const auto n = static_cast<std::uint32_t>(chosen.size());
      copies.push_back({source, n});
      entries.push_back({0, 0, n});
      chosenWeights.push_back(weights[e]);
      chosen.push_back(e);
    }
  }
  if (chosen.empty()) return;
  copies.push_back({0, static_cast<std::uint32_t>(chosen.size())});
  const std::size_t stride = rows.rowBytes;
  std::byte* experts = engine_.scratch(0).need(chosen.size() * stride);
  std::byte* scaled = engine_.scratch(1).need(chosen.size() * stride);
  std::vector<transport::Segment> local, remote;
  const auto lists = [&](std::byte* mine, const transport::MemoryRef& theirs) {
    local.clear();
    remote.clear();
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      local.push_back({mine + i * stride, stride});
      remote.push_back(
          {reinterpret_cast<void*>(theirs.address + rows.entries[chosen[i]].row * rowBytes_ + rowOffset), stride});
    }
  };
  const ReadyCell& cell = meeting_.ready(localIndex);
  lists(experts, cell.memory[kRows2]);
  fabric.vmRead(rank, local, remote);
  std::vector<float> chosenDots(chosen.size(), 0.0f);
  const std::byte* expertBase = experts;
  exec::BackArgs args;
  args.place = rows;
  args.place.packed = false;
  args.place.copies = copies.data();
  args.place.entries = entries.data();
  args.place.begin = 0;
  args.place.end = chosen.size();
  args.place.bases = &scaled;
  args.place.destinationStride = stride;
  args.place.streaming = false;
  args.weights = chosenWeights.data();
  args.expertBases = &expertBase;
  args.expertStride = stride;
  args.type = request_.type;
  args.dots = chosenDots.data();
  engine_.executor().back(args);
  lists(scaled, cell.memory[kRows]);
  fabric.vmWrite(rank, local, remote);
  for (std::size_t i = 0; i < chosen.size(); ++i) dots[chosen[i]] = chosenDots[i];
  engine_.statistics().processVmBytes += 2 * chosen.size() * stride;
}

Outcome CombineBackward::put() {
  const plan::View& view = plan_->view;
  const plan::Flow& own = view.flows[plan_->streams().ownFlow];
  const std::size_t bytes = engine_.executor().defers() ? kDeferredChunkBytes : kChunkBytes;
  const std::size_t chunk = std::max<std::size_t>(1, bytes / std::max<std::size_t>(1, rowBytes_));
  const std::size_t end = std::min<std::size_t>(own.copyEnd, at_ + chunk);
  if (at_ < end) {
    exec::PlaceArgs rows;
    rows.source = request_.outputGradient;
    rows.sourceStride = rows.destinationStride = rows.rowBytes = rowBytes_;
    rows.copies = view.copies;
    rows.entries = view.entries;
    rows.begin = at_;
    rows.end = end;
    const std::uint32_t firstEntry = view.copies[at_].firstEntry;
    const std::uint32_t endEntry = view.copies[end].firstEntry;
    ownDots_.assign(endEntry - firstEntry, 0.0f);
    back(rows, view.weights, 0, ownDots_.data() - firstEntry);
    for (std::size_t i = at_; i < end; ++i) {
      for (std::uint32_t e = view.copies[i].firstEntry; e < view.copies[i + 1].firstEntry; ++e) {
        const auto slot = static_cast<std::size_t>(view.entries[e].slot & kSlotMask);
        weightGradient_[view.copies[i].token * static_cast<std::size_t>(view.header->topk) + slot] =
            ownDots_[e - firstEntry];
      }
    }
    at_ = end;
  }
  return at_ >= own.copyEnd ? Outcome::complete : Outcome::moved;
}

Outcome CombineBackward::extract(std::size_t stream) {
  const SourceRows source{request_.outputGradient, rowBytes_};
  return extractSlice(stream, out_[stream], &source);
}

Outcome CombineBackward::place(std::size_t stream) {
  transport::PostedLink& link = linkTo(plan_->streams().in[stream]);
  const std::byte* slot = link.peek();
  if (slot == nullptr) return Outcome::idle;
  const Slice slice = readSlice(slot, link.slotBytes());
  // Dots of this rank's own rows may wait at the head of the same link: they are taken by receiveBack, later.
  if (slice.kind() == SliceKind::dots) return Outcome::idle;
  checkRows(slice, {{request_.outputGradient, rowBytes_}});
  StreamDots& dots = dots_[stream];
  const transport::SliceHeader& h = *slice.header;
  if (h.rows > 0) {
    exec::PlaceArgs rows;
    exec::Passage& way = passage(kIn, stream);
    rows.source = way.in(engine_.payloadIn(link, slice.payload), h.rows * sliceRowStride(h.rowBytes));
    rows.sourceStride = sliceRowStride(h.rowBytes);
    rows.packed = true;
    rows.copies = slice.copies;
    rows.entries = slice.entries;
    rows.end = h.rows;
    rows.destinationStride = rowBytes_;
    rows.rowBytes = h.rowBytes;
    if (h.rowOffset == 0) {
      dots.entries = dots.dots.size();
      dots.dots.resize(dots.entries + h.entries, 0.0f);
    } else if (dots.dots.size() != dots.entries + h.entries) {
      fail(Code::internalError,
           fmt::format("{} sent a later part of a row without its first", engine_.fabric().describeRank(h.source)));
    }
    std::vector<float> part(h.entries, 0.0f);
    // It has ended when it returns, on GPUs too: products are wanted on the host.
    back(rows, slice.weights, h.rowOffset, part.data());
    way.close();
    for (std::size_t e = 0; e < h.entries; ++e) dots.dots[dots.entries + e] += part[e];
  }
  const bool last = slice.last();
  link.release();
  return last ? Outcome::complete : Outcome::moved;
}

Outcome CombineBackward::sendBack(std::size_t stream) {
  StreamDots& dots = dots_[stream];
  if (dots.dots.empty()) return Outcome::complete;
  transport::PostedLink& link = linkTo(plan_->streams().in[stream]);
  std::byte* slot = link.acquire();
  if (slot == nullptr) return Outcome::idle;
  const std::size_t room = (link.slotBytes() - sliceHead(1, 0)) / sizeof(float) & ~std::size_t{15};
  const std::size_t count = std::min(room, dots.dots.size() - dots.sent);
  Slice slice = layOutSlice(slot, SliceKind::dots, 1, 0, count * sizeof(float));
  slice.copies[0] = slice.copies[1] = {0, 0};
  std::memcpy(slice.payload, dots.dots.data() + dots.sent, count * sizeof(float));
  const std::size_t offset = dots.sent * sizeof(float);
  dots.sent += count;
  const bool complete = dots.sent == dots.dots.size();
  post(link, slice, sliceBytes(1, 0, count * sizeof(float)), complete ? kLastSlice : 0, offset);
  return complete ? Outcome::complete : Outcome::moved;
}

Outcome CombineBackward::receiveBack(std::size_t stream) {
  const plan::View& view = plan_->view;
  const Stream& out = plan_->streams().out[stream];
  Home& home = home_[stream];
  const auto skipDone = [&] {
    while (home.flow < out.flows.size()) {
      const plan::Flow& flow = view.flows[out.flows[home.flow]];
      if (home.copy == 0) home.copy = flow.copyBegin;
      if (home.copy < flow.copyEnd) return true;
      ++home.flow;
      home.copy = 0;
    }
    return false;
  };
  if (!skipDone()) return Outcome::complete;
  transport::PostedLink& link = linkTo(out);
  const std::byte* slot = link.peek();
  if (slot == nullptr) return Outcome::idle;
  const Slice slice = readSlice(slot, link.slotBytes());
  if (slice.kind() != SliceKind::dots || slice.header->operation != number()) {
    fail(Code::internalError,
         fmt::format("{} sent a slice of kind {} of operation {}, expected the dots of operation {}",
                     engine_.fabric().describeRank(out.peer), slice.header->kind, slice.header->operation, number()));
  }
  const std::size_t count = slice.header->rowBytes / sizeof(float);
  const auto* values = reinterpret_cast<const float*>(slice.payload);
  for (std::size_t i = 0; i < count; ++i) {
    if (!skipDone()) {
      fail(Code::internalError,
           fmt::format("{} sent back more dots than rows were sent", engine_.fabric().describeRank(out.peer)));
    }
    const Copy& copy = view.copies[home.copy];
    const std::uint32_t e = copy.firstEntry + static_cast<std::uint32_t>(home.entry);
    const auto k = static_cast<std::size_t>(view.entries[e].slot & kSlotMask);
    weightGradient_[copy.token * static_cast<std::size_t>(view.header->topk) + k] = values[i];
    if (e + 1 == view.copies[home.copy + 1].firstEntry) {
      home.entry = 0;
      ++home.copy;
    } else {
      ++home.entry;
    }
  }
  link.release();
  return skipDone() ? Outcome::moved : Outcome::complete;
}

Outcome CombineBackward::finish() {
  if (engine_.deviceExecutor() != nullptr) {
    engine_.deviceExecutor()->copy(request_.weightGradient, weightGradient_, broughtGradient_.size() * sizeof(float));
    engine_.executor().fence();
  }
  if (staged_) {
    const std::size_t bytes = static_cast<std::size_t>(plan_->receiveRows()) * rowBytes_;
    std::memcpy(request_.inputGradient, landing_, bytes);
    engine_.statistics().stagedBytes += bytes;
  }
  return Outcome::complete;
}

std::unique_ptr<Operation> makeCombineBackward(Engine& engine, std::shared_ptr<PlanState> plan,
                                               const CombineBackwardRequest& request) {
  return std::make_unique<CombineBackward>(engine, std::move(plan), request);
}

}  // namespace fusco::engine
