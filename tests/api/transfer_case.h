// Random transfers, of host and GPU alike.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace fusco::test {

// One transfer, as both ends know it from the seed.
struct Planned {
  int from, to;
  std::size_t sendRows, sendRowBytes, receiveRows, receiveRowBytes;
  bool sendListed, receiveListed, int32, plain, window;
  std::vector<std::int64_t> sendList, receiveList;
  std::uint64_t seed;

  std::size_t bytes() const { return sendRows * sendRowBytes; }
  static std::size_t span(const std::vector<std::int64_t>& list, std::size_t rows, bool listed) {
    if (!listed) return rows;
    return list.empty() ? 0 : static_cast<std::size_t>(*std::max_element(list.begin(), list.end())) + 1;
  }
  std::size_t sendSpan() const { return span(sendList, sendRows, sendListed) * sendRowBytes; }
  std::size_t receiveSpan() const { return span(receiveList, receiveRows, receiveListed) * receiveRowBytes; }
  // Byte `at` of what travels lies at this byte of a tensor.
  std::size_t sendAt(std::size_t at) const {
    return sendListed ? static_cast<std::size_t>(sendList[at / sendRowBytes]) * sendRowBytes + at % sendRowBytes : at;
  }
  std::size_t receiveAt(std::size_t at) const {
    return receiveListed
               ? static_cast<std::size_t>(receiveList[at / receiveRowBytes]) * receiveRowBytes + at % receiveRowBytes
               : at;
  }
};

inline Planned randomTransfer(std::mt19937_64& random, int ranks) {
  const auto pick = [&](std::size_t low, std::size_t high) {
    return std::uniform_int_distribution<std::size_t>(low, high)(random);
  };
  Planned t{};
  t.from = static_cast<int>(pick(0, static_cast<std::size_t>(ranks) - 1));
  t.to = static_cast<int>(pick(0, static_cast<std::size_t>(ranks) - 1));
  t.seed = random();
  t.plain = pick(0, 2) == 0;
  t.int32 = pick(0, 1) == 0;
  t.window = pick(0, 1) == 0;
  static constexpr std::size_t kRowBytes[] = {1, 3, 8, 64, 100, 512, 4096, 20000};
  t.sendRowBytes = kRowBytes[pick(0, 7)];
  t.sendRows = pick(0, 4) == 0 ? 0 : pick(1, 40);
  t.receiveRows = t.sendRows;
  t.receiveRowBytes = t.sendRowBytes;
  if (pick(0, 3) == 0 && t.sendRowBytes % 4 == 0) {  // the same bytes in rows of another size
    t.receiveRowBytes /= 4;
    t.receiveRows *= 4;
  }
  t.sendListed = !t.plain && pick(0, 3) != 0;
  t.receiveListed = !t.plain && pick(0, 3) != 0;
  if (t.sendListed) {
    for (std::size_t i = 0; i < t.sendRows; ++i)
      t.sendList.push_back(static_cast<std::int64_t>(pick(0, 2 * t.sendRows)));
    if (pick(0, 1) == 0) std::sort(t.sendList.begin(), t.sendList.end());
  }
  if (t.receiveListed) {
    t.receiveList.resize(2 * t.receiveRows);
    std::iota(t.receiveList.begin(), t.receiveList.end(), 0);
    if (pick(0, 1) == 0) std::shuffle(t.receiveList.begin(), t.receiveList.end(), random);
    t.receiveList.resize(t.receiveRows);
  }
  return t;
}

}  // namespace fusco::test
