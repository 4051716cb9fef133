#include "shuffle/case.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace fusco::test {

std::string Case::describe() const {
  std::ostringstream s;
  s << "seed " << seed << ": " << ranks << " ranks, " << experts << " experts, topk " << topk << ", rowBytes " << rowBytes << " + " << rowBytes2
    << ", layout " << layout << ", alignment " << alignment << ", dedup " << dedup << ", capacity " << capacityRows << ", maxTokens " << maxTokens
    << ", tokens";
  for (const auto t : tokens) s << ' ' << t;
  return s.str();
}

int Case::firstExpert(int rank) const { return rank * (experts / ranks) + std::min(rank, experts % ranks); }
int Case::localExperts(int rank) const { return experts / ranks + (rank < experts % ranks ? 1 : 0); }
int Case::rankOfExpert(int expert) const {
  for (int r = 0; r < ranks; ++r) {
    if (expert < firstExpert(r) + localExperts(r)) return r;
  }
  return -1;
}

std::uint8_t sentByte(std::uint64_t seed, int tensor, int rank, std::int64_t token, std::size_t column) {
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ull + static_cast<std::uint64_t>(tensor) * 77 + static_cast<std::uint64_t>(rank) * 1000003 +
                    static_cast<std::uint64_t>(token) * 8191 + column;
  x ^= x >> 31;
  x *= 0xbf58476d1ce4e5b9ull;
  return static_cast<std::uint8_t>(x >> 56);
}

Case randomCase(std::uint64_t seed, int ranks) {
  std::mt19937_64 random(seed);
  const auto pick = [&](std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  Case c;
  c.seed = seed;
  c.ranks = ranks;
  c.experts = static_cast<int>(pick(1, 3) == 1 ? pick(1, 4) : pick(1, 24));
  c.topk = static_cast<int>(pick(1, 8));
  c.int32Ids = pick(0, 1) == 1;
  const int layout = static_cast<int>(pick(0, 9));
  c.layout = layout < 6 ? fuscoLayoutExpertOrder : layout < 8 ? fuscoLayoutRankOrder : fuscoLayoutSlotted;
  c.dedup = static_cast<int>(pick(0, 3));
  const std::int64_t most = pick(0, 5) == 0 ? 0 : pick(1, 40);
  const int style = static_cast<int>(pick(0, 4));
  for (int r = 0; r < ranks; ++r) {
    c.tokens.push_back(pick(0, 3) == 0 ? most : pick(0, most));
    std::vector<std::int64_t> ids;
    std::vector<float> weights;
    for (std::int64_t t = 0; t < c.tokens.back(); ++t) {
      std::vector<std::int64_t> chosen;
      for (int k = 0; k < c.topk; ++k) {
        std::int64_t id = pick(0, c.experts - 1);
        if (style == 0) id = c.experts - 1;                      // all to one expert
        if (style == 1 && pick(0, 3) == 0) id = -1;              // masked
        if (style >= 2) {                                        // distinct where possible
          for (int tries = 0; tries < 20 && std::count(chosen.begin(), chosen.end(), id) > 0; ++tries) id = pick(0, c.experts - 1);
        }
        // A slot of the slotted layout holds one row per (expert, rank, token): no repeats there.
        if (c.layout == fuscoLayoutSlotted && std::count(chosen.begin(), chosen.end(), id) > 0) id = -1;
        chosen.push_back(id);
        weights.push_back(static_cast<float>(pick(-100, 100)) / 64.0f);
      }
      ids.insert(ids.end(), chosen.begin(), chosen.end());
    }
    c.ids.push_back(std::move(ids));
    c.weights.push_back(std::move(weights));
  }
  if (c.layout == fuscoLayoutExpertOrder) {
    c.alignment = static_cast<int>(pick(0, 2) == 0 ? pick(2, 16) : 1);
    c.zeroFill = static_cast<int>(pick(0, 1));
  }
  if (c.layout == fuscoLayoutSlotted) c.maxTokens = std::max<std::int64_t>(1, most);
  static constexpr std::size_t kSizes[] = {1, 2, 7, 16, 64, 100, 256, 1000, 1024, 4096, 14336};
  c.rowBytes = kSizes[static_cast<std::size_t>(pick(0, 10))];
  if (pick(0, 3) == 0) c.rowBytes2 = kSizes[static_cast<std::size_t>(pick(0, 6))];
  c.tickets = pick(0, 2) == 0;
  c.counters = pick(0, 2) == 0;
  c.privateMemory = pick(0, 1) == 0;
  return c;
}

Expected expectedAt(const Case& c, int rank) {
  Expected x;
  const int first = c.firstExpert(rank);
  const int count = c.localExperts(rank);
  x.rowsOfExpert.assign(static_cast<std::size_t>(count), 0);
  if (c.layout == fuscoLayoutRankOrder) {
    for (int s = 0; s < c.ranks; ++s) {
      for (std::int64_t t = 0; t < c.tokens[static_cast<std::size_t>(s)]; ++t) {
        for (int k = 0; k < c.topk; ++k) {
          const std::int64_t id = c.ids[static_cast<std::size_t>(s)][static_cast<std::size_t>(t * c.topk + k)];
          if (id < first || id >= first + count) continue;
          x.arrivals.push_back({s, t, k, x.rows++, static_cast<int>(id - first)});
          break;
        }
      }
    }
    return x;
  }
  for (int e = 0; e < count; ++e) {
    if (c.layout == fuscoLayoutExpertOrder) x.rows = (x.rows + c.alignment - 1) / c.alignment * c.alignment;
    for (int s = 0; s < c.ranks; ++s) {
      std::int64_t n = 0;
      for (std::int64_t t = 0; t < c.tokens[static_cast<std::size_t>(s)]; ++t) {
        for (int k = 0; k < c.topk; ++k) {
          if (c.ids[static_cast<std::size_t>(s)][static_cast<std::size_t>(t * c.topk + k)] != first + e) continue;
          const std::int64_t row = c.layout == fuscoLayoutSlotted ? (static_cast<std::int64_t>(e) * c.ranks + s) * c.maxTokens + n : x.rows;
          x.arrivals.push_back({s, t, k, row, e});
          ++x.rowsOfExpert[static_cast<std::size_t>(e)];
          ++n;
          ++x.rows;
        }
      }
    }
  }
  if (c.layout == fuscoLayoutExpertOrder) x.rows = (x.rows + c.alignment - 1) / c.alignment * c.alignment;
  if (c.layout == fuscoLayoutSlotted) x.rows = static_cast<std::int64_t>(count) * c.ranks * c.maxTokens;
  return x;
}

void runThreads(int ranks, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  std::mutex mutex;
  std::exception_ptr error;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(r);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

void ok(fuscoResult_t result, const char* what) {
  if (result != fuscoSuccess) throw std::runtime_error(std::string(what) + ": " + fuscoGetLastError(nullptr));
}

}  // namespace fusco::test
