#include "shuffle/case.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace fusco::test {

std::string Case::describe() const {
  std::ostringstream s;
  s << "seed " << seed << ": " << ranks << " ranks, " << experts << " experts, topk " << topk << ", rowBytes "
    << rowBytes << " + " << rowBytes2 << ", layout " << layout << ", alignment " << alignment << ", dedup " << dedup
    << ", capacity " << capacityRows << ", maxTokens " << maxTokens << ", tokens";
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

void fillRow(std::uint64_t seed, int tensor, int rank, std::int64_t row, std::uint8_t* bytes, std::size_t count) {
  std::uint64_t state = seed * 0x9e3779b97f4a7c15ull + static_cast<std::uint64_t>(tensor) * 0xd1b54a32d192ed03ull +
                        static_cast<std::uint64_t>(rank) * 0x8cb92ba72f3d8dd7ull +
                        static_cast<std::uint64_t>(row) * 0xaef17502108ef2d9ull;
  for (std::size_t i = 0; i < count; i += 8) {
    std::uint64_t x = state += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    std::memcpy(bytes + i, &x, std::min<std::size_t>(8, count - i));
  }
}

Case randomCase(std::uint64_t seed, int ranks, std::int64_t mostTokens) {
  std::mt19937_64 random(seed);
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  Case c;
  c.seed = seed;
  c.ranks = ranks;
  c.experts = static_cast<int>(pick(1, 3) == 1 ? pick(1, 4) : pick(1, 24));
  c.topk = static_cast<int>(pick(1, 8));
  c.int32Ids = pick(0, 1) == 1;
  const int layout = static_cast<int>(pick(0, 9));
  c.layout = layout < 6 ? fuscoLayoutExpertOrder : layout < 8 ? fuscoLayoutRankOrder : fuscoLayoutSlotted;
  c.dedup = static_cast<int>(pick(0, 3));
  const std::int64_t most = pick(0, 5) == 0 ? 0 : pick(1, mostTokens);
  const int style = static_cast<int>(pick(0, 4));
  for (int r = 0; r < ranks; ++r) {
    c.tokens.push_back(pick(0, 3) == 0 ? most : pick(0, most));
    std::vector<std::int64_t> ids;
    std::vector<float> weights;
    for (std::int64_t t = 0; t < c.tokens.back(); ++t) {
      std::vector<std::int64_t> chosen;
      for (int k = 0; k < c.topk; ++k) {
        std::int64_t id = pick(0, c.experts - 1);
        if (style == 0) id = c.experts - 1;          // all to one expert
        if (style == 1 && pick(0, 3) == 0) id = -1;  // masked
        if (style >= 2) {                            // distinct where possible
          for (int tries = 0; tries < 20 && std::count(chosen.begin(), chosen.end(), id) > 0; ++tries)
            id = pick(0, c.experts - 1);
        }
        chosen.push_back(id);
        weights.push_back(static_cast<float>(pick(-100, 100)) / 77.0f);
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
  if (pick(0, 4) == 0) c.capacityRows = pick(1, 2 + most * c.topk);
  return c;
}

Case longCase(std::uint64_t seed, int ranks) {
  Case c = randomCase(seed, ranks, 9000);
  c.rowBytes = std::min<std::size_t>(c.rowBytes, 64);
  c.rowBytes2 = std::min<std::size_t>(c.rowBytes2, 16);
  return c;
}

Case gpuCase(std::uint64_t seed, int ranks) {
  return seed / 1000 % 8 == 5 ? longCase(seed, ranks) : randomCase(seed, ranks);
}

Expected expectedAt(const Case& c, int rank) {
  Expected x;
  const int first = c.firstExpert(rank);
  const int count = c.localExperts(rank);
  const std::int64_t capacity = c.capacityRows > 0 ? c.capacityRows : INT64_MAX;
  x.rowsOfExpert.assign(static_cast<std::size_t>(count), 0);
  x.dropped.assign(static_cast<std::size_t>(c.ranks), 0);
  const auto idAt = [&](int source, std::int64_t token, int slot) {
    return c.ids[static_cast<std::size_t>(source)][static_cast<std::size_t>(token * c.topk + slot)];
  };
  const auto arrive = [&](int source, std::int64_t token, int slot, std::int64_t row, int expert) {
    if (row >= capacity) {
      ++x.dropped[static_cast<std::size_t>(source)];
      return;
    }
    x.arrivals.push_back({source, token, slot, row, expert});
    ++x.rowsOfExpert[static_cast<std::size_t>(expert)];
  };
  if (c.layout == fuscoLayoutRankOrder) {
    for (int s = 0; s < c.ranks; ++s) {
      for (std::int64_t t = 0; t < c.tokens[static_cast<std::size_t>(s)]; ++t) {
        for (int k = 0; k < c.topk; ++k) {
          const std::int64_t id = idAt(s, t, k);
          if (id < first || id >= first + count) continue;
          arrive(s, t, k, x.rows++, static_cast<int>(id - first));
          break;
        }
      }
    }
    x.rows = std::min(x.rows, capacity);
    return x;
  }
  const bool slotted = c.layout == fuscoLayoutSlotted;
  const auto align = [&] { x.rows = (x.rows + c.alignment - 1) / c.alignment * c.alignment; };
  for (int e = 0; e < count; ++e) {
    if (!slotted) align();
    for (int s = 0; s < c.ranks; ++s) {
      std::int64_t n = 0;
      for (std::int64_t t = 0; t < c.tokens[static_cast<std::size_t>(s)]; ++t) {
        for (int k = 0; k < c.topk; ++k) {
          if (idAt(s, t, k) != first + e) continue;
          // A block of the slotted layout has room for as many rows as a rank has tokens: repeats may be too many.
          const std::int64_t row = !slotted          ? x.rows
                                   : n < c.maxTokens ? (static_cast<std::int64_t>(e) * c.ranks + s) * c.maxTokens + n
                                                     : INT64_MAX;
          arrive(s, t, k, row, e);
          ++n;
          ++x.rows;
        }
      }
    }
  }
  if (slotted) {
    x.rows = static_cast<std::int64_t>(count) * c.ranks * c.maxTokens;
  } else {
    align();
  }
  x.rows = std::min(x.rows, capacity);
  return x;
}

namespace {
std::int64_t fromEnvironment(const char* name, std::int64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoll(text);
}
}  // namespace

Cases::Cases(std::int64_t cases, int offset)
    : count(fromEnvironment("FUSCO_TEST_CASES", std::max<std::int64_t>(1, cases / SHUFFLE_CASES_DIVISOR))),
      first_(fromEnvironment("FUSCO_TEST_FIRST", 0)),
      only_(fromEnvironment("FUSCO_TEST_SEED", -1)),
      offset_(offset) {
  if (only_ >= 0) count = 1;
  std::printf("%lld shuffles, seeds %llu to %llu in steps of 1000\n", static_cast<long long>(count),
              static_cast<unsigned long long>(seed(0)), static_cast<unsigned long long>(seed(count - 1)));
}

std::uint64_t Cases::seed(std::int64_t i) const {
  return static_cast<std::uint64_t>(only_ >= 0 ? only_ + i : (first_ + i) * 1000 + offset_);
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
  if (result != fuscoSuccess) throw CallFailed(result, std::string(what) + ": " + fuscoGetLastError(nullptr));
}

}  // namespace fusco::test
