// The two ends of a stream of slices over a link with few credits: every copy exactly once and in order, whatever the
// size of slots and rows.
#include "engine/stream_io.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "base/status.h"
#include "engine/fake_fabric.h"

namespace fusco::engine::testing {
namespace {

int pick(std::mt19937& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

// Lists of copies cut into flows, some of which belong to the stream; without dedup a token may have several copies.
struct Lists {
  std::vector<plan::Flow> flows;
  std::vector<plan::Copy> copies;
  std::vector<plan::Entry> entries;
  std::vector<std::int32_t> ofStream;
  std::vector<std::size_t> inOrder;  // copies of the stream
  plan::View view{};
};

void fill(Lists& lists, std::mt19937& random, bool dedup) {
  std::uint32_t token = 0;
  for (int flow = pick(random, 1, 4); flow > 0; --flow) {
    plan::Flow f{};
    f.copyBegin = static_cast<std::uint32_t>(lists.copies.size());
    const bool mine = pick(random, 0, 2) > 0;
    for (int n = pick(random, 0, 12); n > 0; --n) {
      if (!dedup && pick(random, 0, 1) != 0 && !lists.copies.empty()) --token;
      if (mine) lists.inOrder.push_back(lists.copies.size());
      lists.copies.push_back({token, static_cast<std::uint32_t>(lists.entries.size())});
      for (int e = dedup ? pick(random, 1, 5) : 1; e > 0; --e)
        lists.entries.push_back({0, 0, static_cast<std::uint32_t>(lists.entries.size())});
      token += static_cast<std::uint32_t>(pick(random, 1, 3));
      if (!dedup) token = lists.copies.back().token + 1;
    }
    f.copyEnd = static_cast<std::uint32_t>(lists.copies.size());
    if (mine) lists.ofStream.push_back(static_cast<std::int32_t>(lists.flows.size()));
    lists.flows.push_back(f);
  }
  lists.copies.push_back({0, static_cast<std::uint32_t>(lists.entries.size())});
  lists.view.flows = lists.flows.data();
  lists.view.copies = lists.copies.data();
  lists.view.entries = lists.entries.data();
}

TEST(StreamOut, EveryCopyOnceAndInOrder) {
  for (unsigned seed = 1; seed <= 4000; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    Lists lists;
    fill(lists, random, pick(random, 0, 1) != 0);
    std::vector<std::size_t> rowBytes(static_cast<std::size_t>(pick(random, 1, 3)));
    for (std::size_t& bytes : rowBytes)
      bytes = static_cast<std::size_t>(pick(random, 0, 3) == 0 ? pick(random, 500, 5000) : pick(random, 1, 100));
    const std::size_t slotBytes = 64 * static_cast<std::size_t>(pick(random, 4, 30));
    const std::size_t mostBytes = pick(random, 0, 1) != 0 ? slotBytes : static_cast<std::size_t>(pick(random, 1, 2000));
    StreamOut out;
    out.begin(lists.view, lists.ofStream, rowBytes, slotBytes, mostBytes);
    std::size_t tensor = 0, at = 0, offset = 0;
    bool last = false;
    while (!out.finished()) {
      ASSERT_FALSE(last);
      const StreamOut::Cut cut = out.next();
      last = cut.last;
      ASSERT_EQ(cut.last, out.finished());
      if (cut.begin == cut.end) {
        ASSERT_TRUE(lists.inOrder.empty());  // one empty slice, which is the last
        ASSERT_TRUE(cut.last);
        ASSERT_EQ(static_cast<std::size_t>(cut.tensor), rowBytes.size() - 1);
        continue;
      }
      const std::size_t entries = lists.copies[cut.end].firstEntry - lists.copies[cut.begin].firstEntry;
      ASSERT_LE(sliceBytes(cut.end - cut.begin, entries, cut.partBytes),
                cut.end - cut.begin == 1 ? slotBytes : std::min(slotBytes, mostBytes));
      ASSERT_EQ(static_cast<std::size_t>(cut.tensor), tensor);
      ASSERT_EQ(cut.rowOffset, offset);
      for (std::size_t copy = cut.begin; copy < cut.end; ++copy) ASSERT_EQ(copy, lists.inOrder[at + copy - cut.begin]);
      offset += cut.partBytes;
      ASSERT_LE(offset, rowBytes[tensor]);
      if (offset < rowBytes[tensor]) {
        ASSERT_EQ(cut.end - cut.begin, 1u);  // only parts of one row leave a row open
        continue;
      }
      offset = 0;
      at += cut.end - cut.begin;
      if (at == lists.inOrder.size()) {
        at = 0;
        ++tensor;
      }
    }
    ASSERT_TRUE(last);
    ASSERT_EQ(offset, 0u);
    if (!lists.inOrder.empty()) {
      ASSERT_EQ(tensor, rowBytes.size());
    }
  }
}

TEST(StreamOut, SlotsTooSmallForOneRowsPlacesAreNamed) {
  std::mt19937 random(1);
  Lists lists;
  lists.flows.push_back({0, 0, 0, 0, 1});
  lists.copies = {{0, 0}, {0, 40}};
  lists.view.flows = lists.flows.data();
  lists.view.copies = lists.copies.data();
  StreamOut out;
  out.begin(lists.view, {0}, {100}, 512, 512);
  EXPECT_THROW(out.next(), Error);
}

// The way back: the forwarder sends one row for each run of copies of a token, the home end takes them pass by pass.
class BackSender {
 public:
  BackSender(const Lists& lists, FakePipe& pipe, std::vector<std::pair<std::size_t, std::size_t>> parts)
      : pipe_(pipe), parts_(std::move(parts)) {
    for (const std::size_t copy : lists.inOrder) {
      const std::uint32_t token = lists.copies[copy].token;
      if (tokens_.empty() || tokens_.back() != token) tokens_.push_back(token);
    }
  }
  const std::vector<std::uint32_t>& tokens() const { return tokens_; }
  bool finished() const { return tokens_.empty() || part_ == parts_.size(); }
  void step(std::mt19937& random) {
    if (finished()) return;
    std::byte* slot = pipe_.acquire();
    if (slot == nullptr) return;
    const auto [offset, bytes] = parts_[part_];
    std::size_t rows = 1;
    while (at_ + rows < tokens_.size() && sliceBytes(rows + 1, 0, bytes) <= pipe_.slotBytes() &&
           pick(random, 0, 5) != 0)
      ++rows;
    Slice slice = layOutSlice(slot, SliceKind::partials, rows, 0, bytes);
    slice.header->operation = 9;
    slice.header->rowOffset = offset;
    for (std::size_t i = 0; i < rows; ++i) {
      slice.copies[i] = {tokens_[at_ + i], 0};
      std::memset(slice.payload + i * sliceRowStride(bytes), static_cast<int>((tokens_[at_ + i] + part_) & 0xff),
                  bytes);
    }
    slice.copies[rows] = {0, 0};
    pipe_.post(sliceBytes(rows, 0, bytes));
    at_ += rows;
    if (at_ == tokens_.size()) {
      at_ = 0;
      ++part_;
    }
  }

 private:
  FakePipe& pipe_;
  std::vector<std::pair<std::size_t, std::size_t>> parts_;
  std::vector<std::uint32_t> tokens_;
  std::size_t at_ = 0, part_ = 0;
};

TEST(StreamBack, EveryRowOnceInEveryPass) {
  for (unsigned seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    Lists lists;
    fill(lists, random, pick(random, 0, 1) != 0);
    Adversary adversary(seed);
    const std::size_t slotBytes = 64 * static_cast<std::size_t>(pick(random, 3, 12));
    FakePipe home(slotBytes, pick(random, 1, 3), adversary), away(slotBytes, 1, adversary);
    FakeLink link(away, home);
    const auto rowBytes = static_cast<std::size_t>(pick(random, 1, 900));
    std::vector<std::pair<std::size_t, std::size_t>> parts;
    const std::size_t most = partBytes(rowBytes, 0, slotBytes);
    for (std::size_t at = 0; at < rowBytes; at += most) parts.emplace_back(at, std::min(most, rowBytes - at));
    BackSender sender(lists, home, parts);
    StreamBack back;
    back.begin(link, lists.view, lists.ofStream);
    // Of every second seed some slices are set aside, as far as there is room.
    const bool aside = seed % 2 == 0;
    if (aside) back.setShelf(Shelf(Buffer(), slotBytes * static_cast<std::size_t>(pick(random, 1, 6)) / 2));
    for (std::size_t part = 0; part < parts.size(); ++part) {
      if (part > 0) back.nextPass();
      for (const std::uint32_t token : sender.tokens()) {
        ASSERT_EQ(back.nextToken(), token);
        const std::byte* row = nullptr;
        for (int tries = 0; row == nullptr; ++tries) {
          ASSERT_LT(tries, 10000);
          sender.step(random);
          if (aside && pick(random, 0, 2) == 0) back.setAside(SliceKind::partials, 9);
          row = back.row(SliceKind::partials, 9, parts[part].first, parts[part].second);
        }
        for (std::size_t b = 0; b < parts[part].second; ++b)
          ASSERT_EQ(row[b], static_cast<std::byte>((token + part) & 0xff));
        const bool spent = back.take();
        ASSERT_EQ(spent, back.holdsSpent());
        if (spent) {
          // The slot stays until it is released; nothing new is seen before.
          ASSERT_EQ(back.row(SliceKind::partials, 9, 0, 0), nullptr);
          back.release();
        }
      }
      ASSERT_EQ(back.nextToken(), std::nullopt);
    }
    ASSERT_TRUE(sender.finished());
    ASSERT_TRUE(home.empty());
  }
}

// What is set aside is no longer the link's: as much comes as the shelf and the link hold, and all of it is kept.
TEST(StreamBack, WhatIsSetAsideMakesRoomInTheLink) {
  Adversary calm(1);
  calm.on = false;
  constexpr std::size_t kSlot = 256, kRow = 100, kShelved = 5, kTokens = 8;
  FakePipe home(kSlot, 2, calm), away(kSlot, 1, calm);
  FakeLink link(away, home);
  Lists lists;
  lists.flows.push_back({0, 0, 0, 0, kTokens});
  for (std::uint32_t token = 0; token <= kTokens; ++token) lists.copies.push_back({token, token});
  lists.view.flows = lists.flows.data();
  lists.view.copies = lists.copies.data();
  const std::size_t bytes = sliceBytes(1, 0, kRow);
  StreamBack back;
  back.begin(link, lists.view, {0});
  back.setShelf(Shelf(Buffer(), kShelved * bytes));
  std::uint32_t sent = 0;
  const auto send = [&] {
    for (; sent < kTokens; ++sent) {
      std::byte* slot = home.acquire();
      if (slot == nullptr) return;
      Slice slice = layOutSlice(slot, SliceKind::partials, 1, 0, kRow);
      slice.header->operation = 3;
      slice.copies[0] = {sent, 0};
      slice.copies[1] = {0, 0};
      std::memset(slice.payload, static_cast<int>(sent), kRow);
      home.post(bytes);
    }
  };
  const auto row = [&] { return back.row(SliceKind::partials, 3, 0, kRow); };
  send();
  EXPECT_EQ(sent, 2u);
  ASSERT_NE(row(), nullptr);
  back.setAside(SliceKind::partials, 4);
  send();
  EXPECT_EQ(sent, 2u) << "slices of another operation are left where they are";
  for (int turn = 0; turn < 10; ++turn) {
    back.setAside(SliceKind::partials, 3);
    send();
  }
  EXPECT_EQ(sent, kShelved + 2);
  for (std::uint32_t token = 0; token < kTokens; ++token) {
    send();
    const std::byte* at = row();
    ASSERT_NE(at, nullptr);
    EXPECT_EQ(at[kRow - 1], static_cast<std::byte>(token));
    EXPECT_TRUE(back.take());
    back.release();
  }
  EXPECT_TRUE(home.empty());
}

// Payloads that are elsewhere than in the slot: asked for once a slice, when it has arrived.
TEST(StreamBack, WhoeverKnowsSaysWhereAPayloadLies) {
  Adversary calm(1);
  calm.on = false;
  constexpr std::size_t kSlot = 512, kRow = 32, kSlices = 3;
  FakePipe home(kSlot, 1, calm), away(kSlot, 1, calm);
  FakeLink link(away, home);
  Lists lists;
  lists.flows.push_back({0, 0, 0, 0, 2 * kSlices});
  for (std::uint32_t token = 0; token <= 2 * kSlices; ++token) lists.copies.push_back({token, token});
  lists.view.flows = lists.flows.data();
  lists.view.copies = lists.copies.data();
  std::vector<std::byte> elsewhere(kSlot);
  std::size_t asked = 0;
  StreamBack back;
  back.begin(link, lists.view, {0});
  back.setPlace([&](transport::PostedLink& from, const std::byte* inSlot) {
    EXPECT_EQ(&from, &link);
    EXPECT_NE(inSlot, nullptr);
    ++asked;
    return elsewhere.data();
  });
  EXPECT_EQ(back.row(SliceKind::partials, 3, 0, kRow), nullptr);
  EXPECT_EQ(asked, 0u);
  for (std::uint32_t first = 0; first < 2 * kSlices; first += 2) {
    Slice slice = layOutSlice(home.acquire(), SliceKind::partials, 2, 0, kRow);
    slice.header->operation = 3;
    for (std::uint32_t i = 0; i <= 2; ++i) slice.copies[i] = {first + i, 0};
    home.post(sliceBytes(2, 0, kRow));
    EXPECT_EQ(back.row(SliceKind::partials, 3, 0, kRow), elsewhere.data());
    EXPECT_FALSE(back.take());
    EXPECT_EQ(back.row(SliceKind::partials, 3, 0, kRow), elsewhere.data() + sliceRowStride(kRow));
    EXPECT_TRUE(back.take());
    back.release();
  }
  EXPECT_EQ(asked, kSlices);
}

TEST(StreamBack, AStrangerIsNotTakenForARow) {
  const auto offer = [](const std::function<void(Slice&)>& change) {
    Adversary calm(1);
    calm.on = false;
    FakePipe home(1024, 1, calm), away(1024, 1, calm);
    FakeLink link(away, home);
    Lists lists;
    lists.flows.push_back({0, 0, 0, 0, 1});
    lists.copies = {{5, 0}, {0, 1}};
    lists.view.flows = lists.flows.data();
    lists.view.copies = lists.copies.data();
    StreamBack back;
    back.begin(link, lists.view, {0});
    Slice slice = layOutSlice(home.acquire(), SliceKind::partials, 1, 0, 100);
    slice.header->operation = 3;
    slice.copies[0] = {5, 0};
    slice.copies[1] = {0, 0};
    change(slice);
    home.post(1024);
    return back.row(SliceKind::partials, 3, 0, 100) != nullptr;
  };
  EXPECT_TRUE(offer([](Slice&) {}));
  // Another step's slice is left where it is.
  EXPECT_FALSE(offer([](Slice& s) { s.header->kind = static_cast<std::uint32_t>(SliceKind::dots); }));
  EXPECT_THROW(offer([](Slice& s) { s.header->operation = 4; }), Error);
  EXPECT_THROW(offer([](Slice& s) { s.header->rowOffset = 64; }), Error);
  EXPECT_THROW(offer([](Slice& s) { s.header->rowBytes = 99; }), Error);
  EXPECT_THROW(offer([](Slice& s) { s.copies[0].token = 6; }), Error);
}

}  // namespace
}  // namespace fusco::engine::testing
