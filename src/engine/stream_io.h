// The two ends of a stream of slices: which row goes into the next slice, and how a stream that comes back is read.
// State machines over the PostedLink interface alone, so that they can be tested without IO.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "engine/slice.h"
#include "engine/workspace.h"
#include "exec/executor.h"
#include "plan/plan.h"
#include "transport/transport.h"

namespace fusco::engine {

// Walks the copies of a stream (its flows one after the other), tensor by tensor, cutting slices.
class StreamOut {
 public:
  // A run of copies that fits one slice: whole rows [begin, end) of tensor `tensor`, or a part of one row.
  struct Cut {
    int tensor = 0;
    std::size_t begin = 0, end = 0;
    std::size_t rowOffset = 0, partBytes = 0;
    bool last = false;
  };

  // `rowBytes[t]` for each tensor. The plan's arrays must stay. A row is cut into parts if it does not fit a slot;
  // slices of several rows have at most `sliceBytes`.
  void begin(const plan::View& plan, const std::vector<std::int32_t>& flows, std::vector<std::size_t> rowBytes,
             std::size_t slotBytes, std::size_t sliceBytes);
  bool finished() const { return finished_; }
  // The next slice's contents; advances. A stream without rows yields one empty last slice.
  Cut next();

 private:
  void skipEmpty();
  plan::View plan_{};
  std::vector<std::pair<std::size_t, std::size_t>> ranges_;
  std::vector<std::size_t> rowBytes_;
  std::size_t slotBytes_ = 0, sliceBytes_ = 0;
  int tensor_ = 0;
  std::size_t range_ = 0, at_ = 0, offset_ = 0;
  bool finished_ = false;
};

// Slices that were taken out of a link before anybody wanted their rows, first in, first out. Its memory is bounded,
// and taken with the first of them.
class Shelf {
 public:
  static constexpr std::size_t kBytes = std::size_t{2} << 20;

  Shelf() = default;  // holds nothing
  explicit Shelf(Buffer memory, std::size_t room = kBytes) : memory_(std::move(memory)), room_(room) {}
  bool hasRoom() const { return room_ > 0; }
  bool empty() const { return slices_.empty(); }
  const std::byte* front() const { return memory_.data() + slices_.front().at; }
  // False: there is no room.
  bool put(const std::byte* slice, std::size_t bytes);
  void pop() { slices_.pop_front(); }

 private:
  struct Place {
    std::size_t at, bytes;
  };
  Buffer memory_;
  std::size_t room_ = 0;
  std::deque<Place> slices_;
};

// Rows of partials that come home in the order of a stream's copies: a cursor over slices, one row at a time.
class StreamBack {
 public:
  // `passage`: how whoever reads the rows sees their slices; null: as they lie.
  void begin(transport::PostedLink& link, const plan::View& plan, const std::vector<std::int32_t>& flows,
             std::uint64_t signature = 0, exec::Passage* passage = nullptr);
  // Where the payload of a slice lies, asked once for each that has arrived: in the slot, unless `place` says
  // otherwise.
  using Place = std::function<const std::byte*(transport::PostedLink& link, const std::byte* inSlot)>;
  void setPlace(Place place) { place_ = std::move(place); }
  // Token of the next row to come, or none when all rows of the pass were taken.
  std::optional<std::uint32_t> nextToken() const;
  // Starts over with the copies for the next part of the rows.
  void nextPass();
  // The next row's memory, if its slice has arrived; checks that slice against kind, operation and part.
  const std::byte* row(SliceKind kind, std::uint64_t operation, std::size_t rowOffset, std::size_t partBytes);
  // Moves past the row; true when it was the last of its slice, which then must be released before the next row() call.
  bool take();
  // Once what was made of its rows has been launched; the slice is spent until the reading has ended.
  void release();
  bool holdsSpent() const { return spent_; }
  // While another stream is waited for: what has come goes to the shelf, so that the link has room for what comes next.
  // Rows that were given out before are not where they were.
  void setAside(SliceKind kind, std::uint64_t operation);
  // Where to: before the first row, and not with a passage that leaves slices where they lie.
  void setShelf(Shelf shelf) { shelf_ = std::move(shelf); }

 private:
  transport::PostedLink* link_ = nullptr;
  Shelf shelf_;
  bool fromShelf_ = false;  // the open slice
  exec::Passage* passage_ = nullptr;
  Place place_;
  const std::byte* payload_ = nullptr;
  bool closed_ = false;
  std::uint64_t signature_ = 0;
  plan::View plan_{};
  std::vector<std::pair<std::size_t, std::size_t>> ranges_;
  std::size_t range_ = 0, at_ = 0;
  Slice slice_;
  bool open_ = false;
  bool spent_ = false;
  std::size_t inSlice_ = 0;
};

}  // namespace fusco::engine
