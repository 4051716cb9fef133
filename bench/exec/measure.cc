#include "measure.h"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <thread>

#include "exec/executor.h"
#include "region.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusco::bench {
namespace {

using exec::Executor;
using exec::RowType;

double now(bool cpuTime) {
  if (cpuTime) {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Two ranks on one core would halve the rates, and the scheduler does that when it is not told otherwise.
void pinTo(int rank) {
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  int left = rank % std::max(1, CPU_COUNT(&allowed));
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || left-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);
    return;
  }
}

// Runs `work(rank)` on all ranks at once; seconds from the first start to the last end, or those of the slowest rank's
// CPU.
double together(int ranks, bool cpuTime, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::vector<double> begin(ranks), end(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&, rank] {
      pinTo(rank);
      ++ready;
      while (ready < ranks) std::this_thread::yield();
      begin[rank] = now(cpuTime);
      work(rank);
      end[rank] = now(cpuTime);
    });
  for (std::thread& thread : threads) thread.join();
  if (cpuTime) {
    double slowest = 0;
    for (int rank = 0; rank < ranks; ++rank) slowest = std::max(slowest, end[rank] - begin[rank]);
    return slowest;
  }
  return *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
}

// The fill that limits are stated against: this machine's widest non-temporal stores, and not the executor's code.
#if defined(__x86_64__)
[[gnu::target("avx512f")]] void fillWide(std::byte* to, std::size_t bytes) {
  const __m512i value = _mm512_set1_epi32(1);
  for (std::size_t i = 0; i < bytes; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), value);
  _mm_sfence();
}

void fillNarrow(std::byte* to, std::size_t bytes) {
  const __m128i value = _mm_set1_epi32(1);
  for (std::size_t i = 0; i < bytes; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), value);
  _mm_sfence();
}

void plainFill(std::byte* to, std::size_t bytes) {
  if (__builtin_cpu_supports("avx512f"))
    fillWide(to, bytes);
  else
    fillNarrow(to, bytes);
}
#else
void plainFill(std::byte* to, std::size_t bytes) { std::memset(to, 1, bytes); }
#endif

// One memory kind and number of ranks: windows of topk rows a token, sources, and a random row for every (token, slot).
class Ranks {
 public:
  Ranks(const Options& options, const std::string& kind, int ranks) : o_(options), ranks_(ranks) {
    const std::size_t rows = o_.tokens * o_.topk, all = rows * ranks;
    windows_ = makeRegion(kind, all * o_.rowBytes);
    extra_ = makeRegion(kind, all * o_.rowBytes);
    sources_ = makeRegion(kind, 2 * ranks * o_.tokens * o_.rowBytes);
    scales_.resize(ranks, std::vector<float>(rows * (o_.rowBytes / 256 + 1)));
    dots_.resize(all);
    weights_.assign(all, 0.125f);
    std::vector<std::uint32_t> order(all);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    for (int r = 0; r < ranks; ++r) {
      bases_.push_back(windows_.data + r * rows * o_.rowBytes);
      expertBases_.push_back(extra_.data + r * rows * o_.rowBytes);
      scaleBases_.push_back(reinterpret_cast<std::byte*>(scales_[r].data()));
    }
    entries_.resize(ranks), copies_.resize(ranks), terms_.resize(ranks), out_.resize(ranks);
    for (int r = 0; r < ranks; ++r) {
      for (std::size_t i = 0; i < rows; ++i) {
        const std::uint32_t place = order[r * rows + i];
        entries_[r].push_back({static_cast<std::uint16_t>(place / rows), static_cast<std::uint16_t>(i % o_.topk),
                               static_cast<std::uint32_t>(place % rows)});
        terms_[r].push_back({bases_[place / rows] + place % rows * o_.rowBytes, 0.125f, RowType::bf16});
      }
      for (std::size_t t = 0; t <= o_.tokens; ++t) {
        copies_[r].push_back({static_cast<std::uint32_t>(t), static_cast<std::uint32_t>(t * o_.topk)});
        if (t < o_.tokens) out_[r].push_back(sources_.data + ((ranks_ + r) * o_.tokens + t) * o_.rowBytes);
      }
    }
    first_.resize(o_.tokens + 1);
    for (std::size_t t = 0; t <= o_.tokens; ++t) first_[t] = static_cast<std::uint32_t>(t * o_.topk);
  }
  ~Ranks() { freeRegion(windows_), freeRegion(extra_), freeRegion(sources_); }
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  const Region& windows() const { return windows_; }
  bool complete() const { return windows_.data && extra_.data && sources_.data; }

  // Small BF16 numbers: 1 to 2.
  void fillSources() {
    std::mt19937 random(3);
    for (Region* region : {&sources_, &extra_})
      for (std::size_t i = 0; i + 2 <= region->bytes; i += 2) {
        const std::uint16_t value = static_cast<std::uint16_t>(0x3f80 | (random() & 0x7f));
        std::memcpy(region->data + i, &value, 2);
      }
  }

  exec::PlaceArgs placeArgs(int rank) {
    exec::PlaceArgs args;
    args.source = sources_.data + rank * o_.tokens * o_.rowBytes;
    args.sourceStride = args.destinationStride = args.rowBytes = o_.rowBytes;
    args.copies = copies_[rank].data();
    args.entries = entries_[rank].data();
    args.end = o_.tokens;
    args.bases = bases_.data();
    return args;
  }

  void run(const std::string& op, Executor& executor, int rank) {
    const std::size_t rows = o_.tokens * o_.topk;
    if (op == "place") {
      executor.place(placeArgs(rank));
    } else if (op == "cast") {
      exec::CastArgs args;
      args.place = placeArgs(rank);
      args.elements = o_.rowBytes / 2;
      args.place.destinationStride = args.elements;
      args.scaleBases = scaleBases_.data();
      args.scaleStride = args.elements / 128 * 4;
      executor.cast(args);
    } else if (op == "sum") {
      exec::SumArgs args;
      args.out = out_[rank].data();
      args.terms = terms_[rank].data();
      args.first = first_.data();
      args.rows = o_.tokens;
      args.elements = o_.rowBytes / 2;
      executor.sum(args);
    } else if (op == "back") {
      exec::BackArgs args;
      args.place = placeArgs(rank);
      args.weights = weights_.data();
      args.expertBases = expertBases_.data();
      args.expertStride = o_.rowBytes;
      args.dots = dots_.data() + rank * rows;
      executor.back(args);
    } else if (op == "move") {
      exec::MoveArgs args;
      args.source = extra_.data + rank * rows * o_.rowBytes;
      args.destination = windows_.data + rank * rows * o_.rowBytes;
      args.sourceStride = args.destinationStride = args.rowBytes = o_.rowBytes;
      args.rows = rows;
      moveLists_.resize(ranks_);
      args.destinationRows = moveLists_[rank].data();
      args.streaming = true;
      executor.move(args);
    } else {
      executor.fill(windows_.data + rank * rows * o_.rowBytes, rows * o_.rowBytes);
    }
    executor.fence();
  }

  void makeMoveLists() {
    moveLists_.assign(ranks_, std::vector<std::int64_t>(o_.tokens * o_.topk));
    for (auto& list : moveLists_) {
      std::iota(list.begin(), list.end(), 0);
      std::shuffle(list.begin(), list.end(), std::mt19937(11));
    }
  }

  // Bytes that all ranks read and write.
  double bytes(const std::string& op) const {
    const double row = static_cast<double>(o_.rowBytes), t = static_cast<double>(o_.tokens) * ranks_;
    const double k = static_cast<double>(o_.topk);
    if (op == "cast") return t * row * (1 + k / 2);
    if (op == "back") return t * row * (1 + 2 * k);
    if (op == "move") return t * row * 2 * k;
    if (op == "fill") return t * row * k;
    return t * row * (1 + k);
  }

  // Rows (or elements of them) that are not what they should be after `op`.
  std::size_t wrong(const std::string& op) {
    std::size_t count = 0;
    for (int rank = 0; rank < ranks_; ++rank)
      for (std::size_t i = 0; i < entries_[rank].size(); ++i) {
        const plan::Entry entry = entries_[rank][i];
        const std::byte* row = sources_.data + (rank * o_.tokens + i / o_.topk) * o_.rowBytes;
        const std::byte* at = bases_[entry.rank] + entry.row * o_.rowBytes;
        if (op == "place") count += std::memcmp(at, row, o_.rowBytes) != 0;
        if (op == "move") {
          const std::size_t to = static_cast<std::size_t>(moveLists_[rank][i]);
          count += std::memcmp(bases_[rank] + to * o_.rowBytes, expertBases_[rank] + i * o_.rowBytes, o_.rowBytes) != 0;
        }
        if (op == "fill") count += std::any_of(at, at + o_.rowBytes, [](std::byte b) { return b != std::byte{0}; });
        if (op == "back") count += std::fabs(element(at, 5) - 0.125f * element(row, 5)) > 1e-3f;
        if (op == "cast") {
          const std::byte* code = bases_[entry.rank] + entry.row * (o_.rowBytes / 2);
          const int bits = static_cast<int>(code[5]);
          const float value = std::ldexp(8.0f + static_cast<float>(bits & 7), ((bits >> 3) & 15) - 10) *
                              scales_[entry.rank][entry.row * (o_.rowBytes / 256)];
          count += std::fabs(value - element(row, 5)) > element(row, 5) / 16 * 1.001f;
        }
      }
    if (op == "sum")  // of topk equal or different rows, weight 1/8 each
      for (int rank = 0; rank < ranks_; ++rank)
        for (std::size_t t = 0; t < o_.tokens; ++t)
          for (std::size_t i = 0; i < o_.rowBytes / 2; i += 97) {
            double exact = 0;
            for (std::size_t k = 0; k < o_.topk; ++k)
              exact += 0.125 * element(static_cast<const std::byte*>(terms_[rank][t * o_.topk + k].row), i);
            count += std::fabs(element(out_[rank][t], i) - exact) > exact * 0x1p-8;
          }
    return count;
  }

 private:
  static float element(const std::byte* row, std::size_t i) {
    std::uint32_t bits = 0;
    std::memcpy(reinterpret_cast<std::byte*>(&bits) + 2, row + 2 * i, 2);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  const Options& o_;
  int ranks_;
  Region windows_, extra_, sources_;
  std::vector<std::vector<plan::Entry>> entries_;
  std::vector<std::vector<plan::Copy>> copies_;
  std::vector<std::vector<exec::Term>> terms_;
  std::vector<std::vector<std::byte*>> out_;
  std::vector<std::byte*> bases_, scaleBases_;
  std::vector<const std::byte*> expertBases_;
  std::vector<std::vector<float>> scales_;
  std::vector<std::vector<std::int64_t>> moveLists_;
  std::vector<float> dots_, weights_;
  std::vector<std::uint32_t> first_;
};

}  // namespace

std::size_t measure(const Options& o, const std::string& kind, int threads) {
  Ranks ranks(o, kind, threads);
  if (!ranks.complete()) {
    std::printf("# %s: not available here: %s\n", kind.c_str(), ranks.windows().error.c_str());
    return 0;
  }
  std::printf("# %s: %.0f MB of windows touched in %.1f ms, %.0f MB of them in huge pages\n", kind.c_str(),
              static_cast<double>(ranks.windows().bytes) / 1e6, ranks.windows().touchMs,
              static_cast<double>(ranks.windows().hugeBytes) / 1e6);
  if (!ranks.windows().error.empty()) std::printf("# %s: %s\n", kind.c_str(), ranks.windows().error.c_str());
  ranks.makeMoveLists();
  struct Row {
    std::string op, impl;
    Executor* executor;
    std::size_t wrong;
    std::vector<double> seconds;
  };
  std::vector<Row> rows;
  for (const std::string& op : o.ops)
    for (const std::string& impl : o.impl) {
      Executor* executor = exec::hostExecutor(impl.c_str());
      if (executor == nullptr) std::printf("# %s: this CPU has not got it\n", impl.c_str());
      if (executor != nullptr) rows.push_back({op, impl, executor, 0, {}});
    }
  for (Row& row : rows) {
    ranks.fillSources();
    if (row.op == "sum") together(threads, o.cpuTime, [&](int rank) { ranks.run("place", *row.executor, rank); });
    together(threads, o.cpuTime, [&](int rank) { ranks.run(row.op, *row.executor, rank); });
    row.wrong = ranks.wrong(row.op);
  }
  std::vector<double> fill;
  const std::size_t window = ranks.windows().bytes / threads / 64 * 64;
  for (int round = 0; round < o.rounds; ++round) {  // in turns, so that a disturbance hits all alike
    fill.push_back(
        together(threads, o.cpuTime, [&](int rank) { plainFill(ranks.windows().data + rank * window, window); }));
    for (Row& row : rows)
      row.seconds.push_back(together(threads, o.cpuTime, [&](int rank) { ranks.run(row.op, *row.executor, rank); }));
  }
  auto rate = [&](std::vector<double>& seconds, double bytes, bool best) {
    std::sort(seconds.begin(), seconds.end());
    return bytes / seconds[best ? 0 : seconds.size() / 2] / 1e9;
  };
  const double fillRate = rate(fill, static_cast<double>(window) * threads, false);
  std::printf("%-13s %7d %-6s %-7s %8.2f %8.2f %6.0f%% %6d\n", kind.c_str(), threads, "limit", "fill", fillRate,
              rate(fill, static_cast<double>(window) * threads, true), 100.0, 0);
  std::size_t wrong = 0;
  for (Row& row : rows) {
    const double median = rate(row.seconds, ranks.bytes(row.op), false);
    std::printf("%-13s %7d %-6s %-7s %8.2f %8.2f %6.0f%% %6zu\n", kind.c_str(), threads, row.op.c_str(),
                row.impl.c_str(), median, rate(row.seconds, ranks.bytes(row.op), true), 100 * median / fillRate,
                row.wrong);
    wrong += row.wrong;
  }
  return wrong;
}

}  // namespace fusco::bench
