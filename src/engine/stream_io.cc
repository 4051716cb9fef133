#include "engine/stream_io.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/status.h"

namespace fusco::engine {

namespace {

std::vector<std::pair<std::size_t, std::size_t>> rangesOf(const plan::View& plan,
                                                          const std::vector<std::int32_t>& flows) {
  std::vector<std::pair<std::size_t, std::size_t>> ranges;
  for (const std::int32_t flow : flows) {
    const plan::Flow& f = plan.flows[flow];
    if (f.copyEnd > f.copyBegin) ranges.emplace_back(f.copyBegin, f.copyEnd);
  }
  return ranges;
}

}  // namespace

void StreamOut::begin(const plan::View& plan, const std::vector<std::int32_t>& flows, std::vector<std::size_t> rowBytes,
                      std::size_t slotBytes, std::size_t sliceBytes) {
  plan_ = plan;
  ranges_ = rangesOf(plan, flows);
  rowBytes_ = std::move(rowBytes);
  slotBytes_ = slotBytes;
  sliceBytes_ = std::min(sliceBytes, slotBytes);
  tensor_ = 0;
  range_ = 0;
  at_ = ranges_.empty() ? 0 : ranges_[0].first;
  offset_ = 0;
  finished_ = false;
}

StreamOut::Cut StreamOut::next() {
  Cut cut;
  cut.tensor = tensor_;
  if (ranges_.empty()) {
    cut.tensor = static_cast<int>(rowBytes_.size()) - 1;
    cut.last = true;
    finished_ = true;
    return cut;
  }
  const std::size_t bytes = rowBytes_[static_cast<std::size_t>(tensor_)];
  const std::size_t limit = ranges_[range_].second;
  const auto entriesTo = [&](std::size_t end) { return plan_.copies[end].firstEntry - plan_.copies[at_].firstEntry; };
  cut.begin = at_;
  cut.end = at_ + 1;
  cut.rowOffset = offset_;
  cut.partBytes = partBytes(bytes - offset_, entriesTo(at_ + 1), slotBytes_);
  if (offset_ == 0 && cut.partBytes == bytes) {
    while (cut.end < limit && sliceBytes(cut.end + 1 - at_, entriesTo(cut.end + 1), bytes) <= sliceBytes_) ++cut.end;
  }
  offset_ += cut.partBytes;
  if (offset_ < bytes) return cut;
  offset_ = 0;
  at_ = cut.end;
  if (at_ < limit) return cut;
  if (++range_ == ranges_.size()) {
    range_ = 0;
    if (++tensor_ == static_cast<int>(rowBytes_.size())) {
      cut.last = true;
      finished_ = true;
    }
  }
  at_ = ranges_[range_].first;
  return cut;
}

void StreamBack::begin(transport::PostedLink& link, const plan::View& plan, const std::vector<std::int32_t>& flows,
                       std::uint64_t signature, exec::Passage* passage) {
  link_ = &link;
  passage_ = passage;
  signature_ = signature;
  plan_ = plan;
  ranges_ = rangesOf(plan, flows);
  open_ = spent_ = closed_ = fromShelf_ = false;
  inSlice_ = 0;
  nextPass();
}

void StreamBack::nextPass() {
  range_ = 0;
  at_ = ranges_.empty() ? 0 : ranges_[0].first;
}

std::optional<std::uint32_t> StreamBack::nextToken() const {
  if (range_ >= ranges_.size()) return std::nullopt;
  return plan_.copies[at_].token;
}

const std::byte* StreamBack::row(SliceKind kind, std::uint64_t operation, std::size_t rowOffset, std::size_t part) {
  if (spent_) return nullptr;
  if (!open_) {
    fromShelf_ = !shelf_.empty();
    const std::byte* slot = fromShelf_ ? shelf_.front() : link_->peek();
    if (slot == nullptr) return nullptr;
    Slice slice = readSlice(slot, link_->slotBytes());
    // A slice of another kind on the same link belongs to another step, which takes it first.
    if (slice.kind() != kind) return nullptr;
    if (slice.header->signature != signature_) {
      fail(Code::invalidUsage,
           fmt::format(
               "rank {} sent back rows of an operation with other parameters (row parts of {} bytes, {} here); all "
               "ranks must make the same calls with the same parameters in the same order",
               slice.header->source, slice.header->rowBytes, part));
    }
    if (slice.header->operation != operation || slice.header->rowOffset != rowOffset ||
        slice.header->rowBytes != part || slice.header->rows == 0) {
      fail(Code::internalError,
           fmt::format("rank {} sent back rows of operation {} (part {} + {}), expected operation {} (part {} + {})",
                       slice.header->source, slice.header->operation, slice.header->rowOffset, slice.header->rowBytes,
                       operation, rowOffset, part));
    }
    slice_ = slice;
    payload_ = slice.payload;
    if (place_ && !fromShelf_) payload_ = place_(*link_, payload_);
    if (passage_ != nullptr) payload_ = passage_->in(payload_, slice.header->rows * sliceRowStride(part));
    open_ = true;
    inSlice_ = 0;
  }
  if (slice_.copies[inSlice_].token != plan_.copies[at_].token) {
    fail(Code::internalError, fmt::format("rank {} sent back token {}, expected token {}", slice_.header->source,
                                          slice_.copies[inSlice_].token, plan_.copies[at_].token));
  }
  return payload_ + inSlice_ * sliceRowStride(part);
}

bool StreamBack::take() {
  // Copies of one token that follow each other (dedup none) come back as one row.
  const std::uint32_t token = plan_.copies[at_].token;
  do {
    if (++at_ == ranges_[range_].second && ++range_ < ranges_.size()) at_ = ranges_[range_].first;
  } while (range_ < ranges_.size() && plan_.copies[at_].token == token);
  if (++inSlice_ < slice_.header->rows) return false;
  spent_ = true;
  return true;
}

void StreamBack::release() {
  if (!spent_) return;
  if (passage_ != nullptr) {
    if (!closed_) passage_->close();
    closed_ = true;
    if (!passage_->done()) return;
    closed_ = false;
  }
  if (fromShelf_) {
    shelf_.pop();
  } else {
    link_->release();
  }
  spent_ = open_ = false;
}

void StreamBack::setAside(SliceKind kind, std::uint64_t operation) {
  if (spent_ || !shelf_.hasRoom()) return;
  while (const std::byte* slot = link_->peek()) {
    const Slice slice = readSlice(slot, link_->slotBytes());
    if (slice.kind() != kind || slice.header->operation != operation ||
        !shelf_.put(slot, sliceBytes(slice.header->rows, 0, slice.header->rowBytes)))
      return;
    // The open one is the link's oldest, if it is the link's.
    if (open_ && !fromShelf_) {
      slice_ = readSlice(shelf_.front(), link_->slotBytes());
      payload_ = slice_.payload;
      fromShelf_ = true;
    }
    link_->release();
  }
}

bool Shelf::put(const std::byte* slice, std::size_t bytes) {
  // A ring: behind the newest, else at the start, as far as the oldest is not in the way.
  std::size_t at = 0, limit = room_;
  if (!slices_.empty()) {
    const std::size_t begin = slices_.front().at;
    at = slices_.back().at + slices_.back().bytes;
    if (slices_.back().at < begin) {
      limit = begin;
    } else if (at + bytes > room_) {
      at = 0;
      limit = begin;
    }
  }
  if (at + bytes > limit) return false;
  std::memcpy(memory_.need(room_) + at, slice, bytes);
  slices_.push_back({at, bytes});
  return true;
}

}  // namespace fusco::engine
