// What the executor tests share: every executor of this CPU, poisoned memory at chosen alignments, random copies.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "exec/executor.h"

namespace fusco::exec {

inline constexpr std::byte kPoison{0xa5};

// The executors that this CPU has, the scalar one first; the others are named once on standard output.
inline const std::vector<Executor*>& executors() {
  static const std::vector<Executor*> all = [] {
    std::vector<Executor*> found;
    for (const char* name : {"scalar", "avx2", "avx512"}) {
      Executor* executor = hostExecutor(name);
      if (executor != nullptr)
        found.push_back(executor);
      else
        std::cout << "not tested: this CPU has no " << name << "\n";
    }
    return found;
  }();
  return all;
}

// Poisoned bytes that begin `skew` bytes after a line, with a margin that must stay as it was.
class Memory {
 public:
  Memory(std::size_t bytes, std::size_t skew) : bytes_(bytes), all_(bytes + 2 * kMargin + 64, kPoison) {
    const std::size_t past = reinterpret_cast<std::uintptr_t>(all_.data() + kMargin) % 64;
    begin_ = all_.data() + kMargin + (64 - past) % 64 + skew % 64;
    if (begin_ + bytes_ > all_.data() + all_.size()) begin_ -= 64;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* data() { return begin_; }
  std::size_t size() const { return bytes_; }
  bool sameAs(const Memory& other) const { return std::memcmp(begin_, other.begin_, bytes_) == 0; }
  bool marginsIntact() const {
    for (const std::byte* p = all_.data(); p < begin_; ++p)
      if (*p != kPoison) return false;
    for (const std::byte* p = begin_ + bytes_; p < all_.data() + all_.size(); ++p)
      if (*p != kPoison) return false;
    return true;
  }

 private:
  static constexpr std::size_t kMargin = 128;
  std::size_t bytes_;
  std::vector<std::byte> all_;
  std::byte* begin_;
};

inline void randomize(Memory& memory, std::mt19937& random) {
  for (std::size_t i = 0; i < memory.size(); ++i) memory.data()[i] = static_cast<std::byte>(random());
}

// Copies of random tokens to random distinct rows of `ranks` ranks.
struct Copies {
  std::vector<plan::Copy> copies;
  std::vector<plan::Entry> entries;
  std::size_t rowsPerRank = 0;
};

inline Copies randomCopies(std::size_t tokens, std::size_t ranks, std::size_t mostEntries, std::mt19937& random) {
  Copies result;
  std::vector<std::uint32_t> rows(ranks, 0);
  for (std::size_t c = 0; c < tokens; ++c) {
    const std::uint32_t token = static_cast<std::uint32_t>(random() % tokens);
    result.copies.push_back({token, static_cast<std::uint32_t>(result.entries.size())});
    const std::size_t count = random() % (mostEntries + 1);
    for (std::size_t k = 0; k < count; ++k) {
      const std::uint16_t rank = static_cast<std::uint16_t>(random() % ranks);
      const std::uint16_t mark = random() % 4 == 0 ? plan::kDuplicate : 0;
      result.entries.push_back({rank, static_cast<std::uint16_t>(k | mark), rows[rank]++});
    }
  }
  result.copies.push_back({0, static_cast<std::uint32_t>(result.entries.size())});
  for (std::uint32_t used : rows) result.rowsPerRank = std::max<std::size_t>(result.rowsPerRank, used);
  for (plan::Entry& entry : result.entries)  // not in the order of the copies: mirrored within each rank
    entry.row = rows[entry.rank] - 1 - entry.row;
  return result;
}

inline std::size_t pick(std::mt19937& random, std::initializer_list<std::size_t> choices) {
  return choices.begin()[random() % choices.size()];
}

}  // namespace fusco::exec
