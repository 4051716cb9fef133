#include "engine/shuffle_operation.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace fusco::engine {

namespace {
// A row that is written to its place costs a NIC a request: smaller ones are worth more as parts of a slice.
constexpr std::size_t kLeastPlacedBytes = 4096;
}  // namespace

ShuffleOperation::ShuffleOperation(OperationKind kind, Engine& engine, std::shared_ptr<PlanState> plan)
    : Operation(kind), engine_(engine), plan_(std::move(plan)), meeting_(engine, slot_) {
  program_ = lower(kind, plan_->streams());
}

void ShuffleOperation::takePlace() {
  slot_ = plan_->request.slot >= 0 ? plan_->request.slot : engine_.takeSlot();
  meeting_.setChannel(slot_);
}

std::string ShuffleOperation::describe() const {
  std::string text = fmt::format("{} {}", operationName(kind()),
                                 meeting_.sequence() * kOperationSlots + static_cast<std::uint64_t>(slot_));
  if (meeting_.missing() >= 0)
    text += fmt::format(", waiting for {}", engine_.fabric().describeRank(meeting_.missing()));
  return text;
}

void ShuffleOperation::reset() {
  meeting_.begin();
  leaving_.assign(std::max(plan_->streams().out.size(), plan_->streams().in.size()), {});
}

bool ShuffleOperation::needs(const Step& step, int rank) const {
  const plan::Topology& topology = engine_.topology();
  const bool ownNode = topology.nodeOf(rank) == topology.nodeOf(engine_.fabric().rank());
  const auto index = static_cast<std::size_t>(step.index);
  switch (step.kind) {
    case StepKind::waitReady:
      return ownNode && meeting_.awaitsReady(rank);
    case StepKind::waitDone:
      return ownNode && meeting_.awaitsDone(rank);
    // Slices, or room for them.
    case StepKind::place:
    case StepKind::sendBack:
      return plan_->streams().in[index].peer == rank;
    case StepKind::extract:
    case StepKind::receiveBack:
      return plan_->streams().out[index].peer == rank;
    default:
      return false;
  }
}

Outcome ShuffleOperation::announceDone() {
  engine_.executor().fence();
  meeting_.sayDone();
  return Outcome::complete;
}

Parameters ShuffleOperation::parameters(std::size_t rowBytes, std::size_t rowBytes2, std::uint64_t type,
                                        std::uint64_t options) {
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
  signature_ = hashOf(p);
  return p;
}

ShuffleOperation::Reach ShuffleOperation::reachOf(const void* address, std::size_t bytes) const {
  if (engine_.device() != nullptr || engine_.fabric().oneProcess() || engine_.nodeRanks() == 1 || bytes == 0 ||
      comm::windowContains(address, bytes))
    return Reach::mapped;
  return engine_.fabric().processVm() ? Reach::processVm : Reach::staged;
}

// Rows that links would take from the caller's memory, or write there, are the caller's again.
void ShuffleOperation::giveUp() {
  if (engine_.deviceExecutor() != nullptr) {
    try {
      engine_.executor().fence();
    } catch (const Error&) {
      // The GPU has failed.
    }
  }
  for (const Stream& stream : plan_->streams().out) {
    try {
      transport::PostedLink& link = linkTo(stream);
      if (link.gathers()) link.abandon();
    } catch (const Error&) {
      // There is no link any more.
    }
  }
  for (const Stream& stream : plan_->streams().in) {
    try {
      transport::PostedLink& link = linkTo(stream);
      if (link.opensPlaces()) link.abandon();
    } catch (const Error&) {
      // The same.
    }
  }
}

// Of a token that several of the node's ranks or experts want, the first one's: the peer copies it from there.
bool ShuffleOperation::findTargets(transport::PostedLink& link, const Stream& stream, const StreamOut::Cut& cut,
                                   std::size_t rowBytes) {
  targets_.clear();
  if (!link.opensPlaces() || cut.partBytes < kLeastPlacedBytes) return false;
  const std::span<const std::uint64_t> sizes = link.placesOf(placesTag());
  if (sizes.empty()) return false;
  const plan::View& view = plan_->view;
  const plan::Topology& topology = engine_.topology();
  const std::size_t ranks = topology.ranksOf(topology.nodeOf(stream.peer)).size();
  for (std::size_t i = cut.begin; i < cut.end; ++i) {
    if (view.copies[i].firstEntry == view.copies[i + 1].firstEntry) return false;
    const plan::Entry& entry = view.entries[view.copies[i].firstEntry];
    const std::size_t piece = static_cast<std::size_t>(cut.tensor) * ranks + entry.rank;
    const std::uint64_t offset = entry.row * rowBytes + cut.rowOffset;
    if (piece >= sizes.size() || offset + cut.partBytes > sizes[piece]) return false;
    targets_.push_back({static_cast<std::uint32_t>(piece), offset});
  }
  return true;
}

Outcome ShuffleOperation::postWhenFilled(Leaving& leaving, exec::Passage& passage, transport::PostedLink& link) {
  if (!leaving.open) return Outcome::complete;
  if (!passage.done()) return Outcome::moved;
  leaving.open = false;
  post(link, leaving.slice, leaving.bytes, leaving.flags, leaving.rowOffset, leaving.mirrored);
  return Outcome::complete;
}

Outcome ShuffleOperation::extractSlice(std::size_t stream, StreamOut& out, const SourceRows* tensors) {
  transport::PostedLink& link = linkTo(plan_->streams().out[stream]);
  const auto outcome = [&] {
    if (!out.finished()) return Outcome::moved;
    return link.gathers() && !link.drained() ? Outcome::idle : Outcome::complete;
  };
  exec::Passage& way = passage(kOut, stream);
  Leaving& leaving = leaving_[stream];
  if (leaving.open) return postWhenFilled(leaving, way, link) == Outcome::complete ? outcome() : Outcome::moved;
  if (out.finished()) return outcome();
  std::byte* slot = link.acquire();
  if (slot == nullptr) return Outcome::idle;
  StageTimer timer(engine_.statistics().extractNs);
  const plan::View& view = plan_->view;
  const StreamOut::Cut cut = out.next();
  const std::size_t rows = cut.end - cut.begin;
  const std::uint32_t firstEntry = view.copies[cut.begin].firstEntry;
  const std::size_t entries = rows == 0 ? 0 : view.copies[cut.end].firstEntry - firstEntry;
  Slice slice = layOutSlice(slot, SliceKind::rows, rows, entries, cut.partBytes);
  std::vector<std::int64_t> tokens(rows);
  for (std::size_t i = 0; i < rows; ++i) {
    const plan::Copy& copy = view.copies[cut.begin + i];
    slice.copies[i] = {copy.token, copy.firstEntry - firstEntry};
    tokens[i] = copy.token;
  }
  slice.copies[rows] = {0, static_cast<std::uint32_t>(entries)};
  if (entries > 0) {
    std::memcpy(slice.entries, view.entries + firstEntry, entries * sizeof(plan::Entry));
    std::memcpy(slice.weights, view.weights + firstEntry, entries * sizeof(float));
  }
  const std::uint32_t flags = (static_cast<std::uint32_t>(cut.tensor) << 8) | (cut.last ? kLastSlice : 0);
  const std::size_t bytes = sliceBytes(rows, entries, cut.partBytes);
  if (rows == 0) {
    post(link, slice, bytes, flags, cut.rowOffset);
    return outcome();
  }
  const SourceRows& tensor = tensors[cut.tensor];
  const bool deferred = !tensor.ofLibrary && engine_.executor().defers();
  // The link copies anyway: from where the rows lie, if they follow each other there as they do in a slice.
  if (link.gathers() && !deferred && cut.partBytes == sliceRowStride(cut.partBytes)) {
    gathered_.clear();
    for (const std::int64_t token : tokens) {
      const std::byte* row = tensor.rows + static_cast<std::size_t>(token) * tensor.rowBytes + cut.rowOffset;
      gathered_.push_back({const_cast<std::byte*>(row), cut.partBytes});
    }
    complete(slice, flags, cut.rowOffset);
    if (findTargets(link, plan_->streams().out[stream], cut, tensor.rowBytes)) {
      link.postPlaced(slice.header->payloadOffset, gathered_, targets_);
    } else {
      link.postRows(slice.header->payloadOffset, gathered_);
    }
    count(bytes);
    return outcome();
  }
  exec::MoveArgs move;
  move.source = tensor.rows + cut.rowOffset;
  move.sourceStride = tensor.rowBytes;
  move.sourceRows = tokens.data();
  move.destinationStride = sliceRowStride(cut.partBytes);
  std::byte* const payload = deferred ? engine_.payloadOut(link, slice.payload) : slice.payload;
  move.destination = deferred ? way.out(payload, rows * move.destinationStride) : payload;
  move.rowBytes = cut.partBytes;
  move.rows = rows;
  executorOf(tensor.ofLibrary).move(move);
  leaving = {true, slice, bytes, cut.rowOffset, flags, payload != slice.payload};
  if (deferred) {
    way.close();
    return Outcome::moved;
  }
  return postWhenFilled(leaving, way, link) == Outcome::complete ? outcome() : Outcome::moved;
}

void ShuffleOperation::checkRows(const Slice& slice, const std::vector<SourceRows>& tensors) const {
  const transport::SliceHeader& h = *slice.header;
  const auto sender = [&] { return engine_.fabric().describeRank(h.source); };
  if (slice.kind() != SliceKind::rows || h.signature != signature_ || h.operation != number() ||
      slice.tensor() >= tensors.size() || h.rowBytes > tensors[slice.tensor()].rowBytes ||
      h.rowOffset > tensors[slice.tensor()].rowBytes - h.rowBytes) {
    fail(Code::invalidUsage,
         fmt::format("rank {}: {} sent a slice of kind {}, operation {}, tensor {}, bytes {} + {} of a row during {}, "
                     "whose rows have {} "
                     "bytes here; all ranks must make the same calls with the same parameters in the same order",
                     engine_.fabric().rank(), sender(), h.kind, h.operation, slice.tensor(), h.rowOffset, h.rowBytes,
                     describe(), tensors[std::min<std::size_t>(slice.tensor(), tensors.size() - 1)].rowBytes));
  }
  for (std::uint32_t e = 0; e < h.entries; ++e) {
    const plan::Entry& entry = slice.entries[e];
    if (entry.rank >= engine_.nodeRanks() || entry.row >= meeting_.ready(entry.rank).rows) {
      fail(Code::internalError,
           fmt::format("{} sent a row for local rank {}, row {}, which does not exist; the plans of the ranks do not "
                       "fit together",
                       sender(), entry.rank, entry.row));
    }
  }
}

void ShuffleOperation::complete(Slice& slice, std::uint32_t flags, std::size_t rowOffset) {
  slice.header->operation = number();
  slice.header->signature = signature_;
  slice.header->flags = flags;
  slice.header->rowOffset = rowOffset;
  slice.header->source = engine_.fabric().rank();
}

void ShuffleOperation::count(std::size_t bytes) {
  engine_.statistics().wireBytes += bytes;
  ++engine_.statistics().wireSlices;
}

void ShuffleOperation::post(transport::PostedLink& link, Slice& slice, std::size_t bytes, std::uint32_t flags,
                            std::size_t rowOffset, bool mirrored) {
  complete(slice, flags, rowOffset);
  engine_.hostExecutor().fence();
  if (mirrored) {
    link.postMirrored(slice.header->payloadOffset, bytes);
  } else {
    link.post(bytes);
  }
  count(bytes);
}

}  // namespace fusco::engine
