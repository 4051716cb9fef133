// What every posted link does, whatever it is made of. A program that includes this instantiates Link with its media.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <ostream>
#include <random>
#include <thread>
#include <vector>

#include "base/status.h"
#include "transport/link_pair.h"

namespace fusco::transport {

using testing::LinkPair;

struct Medium {
  const char* name;
  std::unique_ptr<LinkPair> (*make)(int slots, std::size_t slotBytes);
  int part = 1;  // a slow medium gets one of so many slices
};

inline void PrintTo(const Medium& medium, std::ostream* out) { *out << medium.name; }

class Link : public ::testing::TestWithParam<Medium> {
 protected:
  std::unique_ptr<LinkPair> pair(int slots, std::size_t slotBytes) { return GetParam().make(slots, slotBytes); }
};

TEST_P(Link, CreditsEndAndComeBack) {
  const auto made = pair(3, 256);
  LinkPair& pair = *made;
  EXPECT_EQ(pair.b().peek(), nullptr);
  EXPECT_TRUE(pair.a().drained());
  for (int i = 0; i < 3; ++i) {
    std::byte* slot = pair.a().acquire();
    ASSERT_NE(slot, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(slot) % 64, 0u);
    EXPECT_EQ(pair.a().acquire(), slot) << "the same slot until it is posted";
    slot[0] = static_cast<std::byte>(i);
    pair.a().post(i == 1 ? 256 : 1);
  }
  EXPECT_EQ(pair.a().acquire(), nullptr);
  for (int i = 0; i < 3; ++i) {
    const std::byte* slot = nullptr;
    ASSERT_TRUE(pair.await(1, [&] { return (slot = pair.b().peek()) != nullptr; }));
    EXPECT_EQ(slot[0], static_cast<std::byte>(i));
    EXPECT_EQ(pair.b().peek(), slot) << "the same slice until it is released";
    pair.b().release();
  }
  EXPECT_EQ(pair.b().peek(), nullptr);
  ASSERT_TRUE(pair.await(0, [&] { return pair.a().acquire() != nullptr; })) << "no credit came back";
  pair.a().post(256);
  ASSERT_TRUE(pair.await(1, [&] { return pair.b().peek() != nullptr; }));
  pair.b().release();
  ASSERT_TRUE(pair.await(0, [&] { return pair.a().drained(); }));
}

TEST_P(Link, MisuseIsRefused) {
  const auto made = pair(1, 128);
  EXPECT_THROW(made->a().post(1), Error);
  ASSERT_NE(made->a().acquire(), nullptr);
  EXPECT_THROW(made->a().post(129), Error);
  EXPECT_THROW(made->b().release(), Error);
  if (made->a().gathers()) {
    EXPECT_THROW(made->b().receiveRows({}), Error);
    EXPECT_THROW(made->a().postRows(0, {}), Error);
    std::byte row[65];
    const Segment segment{row, sizeof(row)};
    EXPECT_THROW(made->a().postRows(64, {&segment, 1}), Error);
  } else {
    EXPECT_THROW(made->a().postRows(64, {}), Error);
  }
}

// Both ends send and receive at once, each on a thread of its own that sleeps when there is nothing to do. Slices have
// random sizes; where the link can, some are gathered from rows, and some of these scattered into rows again.
inline void exchange(LinkPair& pair, int end, int count, std::size_t slotBytes, unsigned seed, std::string& wrong) {
  PostedLink& link = *pair.ends[end];
  // Both ends know what either sends.
  std::mt19937 mine(seed + static_cast<unsigned>(end)), theirs(seed + static_cast<unsigned>(1 - end));
  struct Shape {
    std::size_t head, bytes;
    std::uint32_t first;
  };
  const auto next = [&](std::mt19937& random) {
    Shape shape;
    shape.bytes = 64 + random() % (slotBytes - 63);
    shape.head = random() % 2 == 0 ? 0 : 16 + random() % 48;
    shape.first = random();
    return shape;
  };
  const auto content = [](const Shape& shape, std::size_t at) {
    return static_cast<std::byte>((shape.first + at * 2654435761u) >> 13);
  };
  int sent = 0, received = 0;
  std::vector<std::byte> rows(slotBytes), into(slotBytes);
  Shape incoming = next(theirs);
  std::mt19937 cuts(seed + 7 + static_cast<unsigned>(end));
  std::vector<Segment> places;
  bool scattering = false;
  const auto compare = [&](const std::byte* at, std::size_t begin, std::size_t end_) {
    for (std::size_t i = begin; i < end_ && wrong.empty(); ++i) {
      if (at[i - begin] != content(incoming, i))
        wrong = "end " + std::to_string(end) + ", slice " + std::to_string(received) + ", byte " + std::to_string(i);
    }
  };
  const auto cut = [&](std::byte* memory, std::size_t bytes) {
    std::vector<Segment> list;
    for (std::size_t at = 0; at < bytes;) {
      const std::size_t step = std::min<std::size_t>(bytes - at, 1 + cuts() % 300);
      list.push_back({memory + at, step});
      at += step;
    }
    return list;
  };
  const auto work = [&] {
    bool moved = false;
    // Gathered rows stay where they are until they have left: the next slice waits for that.
    if (sent < count && link.drained()) {
      if (std::byte* slot = link.acquire()) {
        const Shape shape = next(mine);
        const std::size_t head = link.gathers() ? shape.head : 0;
        const std::size_t inSlot = head == 0 ? shape.bytes : head;
        for (std::size_t i = 0; i < inSlot; ++i) slot[i] = content(shape, i);
        for (std::size_t i = inSlot; i < shape.bytes; ++i) rows[i - inSlot] = content(shape, i);
        if (head == 0) {
          link.post(shape.bytes);
        } else {
          link.postRows(head, cut(rows.data(), shape.bytes - head));
        }
        ++sent;
        moved = true;
      }
    }
    while (received < count) {
      const bool takesHeads = incoming.first % 3 != 0;
      const PostedLink::Arrival arrival = takesHeads ? link.peekHead() : PostedLink::Arrival{link.peek(), true};
      if (arrival.slot == nullptr && scattering) {
        wrong = "a slice whose payload is on its way has no head any more";
      }
      if (arrival.slot == nullptr) break;
      if (arrival.whole) {
        compare(arrival.slot, 0, incoming.bytes);
      } else {
        if (!scattering) {
          compare(arrival.slot, 0, incoming.head);
          places = cut(into.data(), incoming.bytes - incoming.head);
          scattering = true;
        }
        if (!link.receiveRows(places)) break;
        scattering = false;
        compare(into.data(), incoming.head, incoming.bytes);
      }
      link.release();
      ++received;
      incoming = next(theirs);
      moved = true;
    }
    return moved;
  };
  while (wrong.empty() && (sent < count || received < count || !link.drained())) {
    if (!pair.await(end, [&] { return work() || (sent == count && received == count && link.drained()); })) {
      wrong = "end " + std::to_string(end) + " stood still: sent " + std::to_string(sent) + ", received " +
              std::to_string(received);
    }
  }
}

TEST_P(Link, BothWaysAtOnceNothingIsLostOrMixedUp) {
  for (const auto& [slots, slotBytes, count] :
       {std::tuple{1, std::size_t{256}, 300}, {4, std::size_t{4096}, 1000}, {3, std::size_t{1} << 20, 30}}) {
    const auto made = pair(slots, slotBytes);
    const int some = count / GetParam().part;
    std::string wrong[2];
    std::thread other([&] { exchange(*made, 1, some, slotBytes, 42, wrong[1]); });
    exchange(*made, 0, some, slotBytes, 42, wrong[0]);
    other.join();
    EXPECT_EQ(wrong[0], "");
    EXPECT_EQ(wrong[1], "");
  }
}

}  // namespace fusco::transport
