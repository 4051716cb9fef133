// One rank's tensors in a made-up shuffle, and what must be in them: worked out from all routing maps (plan/world.h),
// value by value, without plan or engine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "comm/fabric.h"
#include "engine/engine.h"
#include "engine/plan_state.h"
#include "engine/shuffle.h"
#include "plan/world.h"

namespace fusco::engine::testing {

using plan::testing::Expected;
using plan::testing::Row;
using plan::testing::World;

// Floats in private memory or in a window, poisoned.
class Tensor {
 public:
  Tensor(std::size_t count, bool window) : count_(count), window_(window) {
    const std::size_t bytes = (count * 4 + 63) / 64 * 64 + 64;
    data_ = static_cast<float*>(window ? comm::windowAllocate(bytes) : std::aligned_alloc(64, bytes));
    poison();
  }
  ~Tensor() {
    if (window_) {
      comm::windowFree(data_);
    } else {
      std::free(data_);
    }
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  void poison() { std::memset(static_cast<void*>(data_), kPoison, count_ * 4); }
  float* data() { return data_; }
  std::byte* bytes() { return reinterpret_cast<std::byte*>(data_); }
  std::size_t count() const { return count_; }
  bool poisoned(std::size_t i) const {
    std::uint32_t word;
    std::memcpy(&word, data_ + i, 4);
    return word == 0x7b7b7b7bu;
  }

 private:
  static constexpr int kPoison = 0x7b;
  std::size_t count_;
  bool window_;
  float* data_ = nullptr;
};

// The numbers that are shuffled; `step` makes every replay different.
inline float inputValue(int step, int rank, std::int64_t token, std::size_t element) {
  const std::uint32_t mixed = static_cast<std::uint32_t>(step * 7919 + rank * 104729 + token * 1299709) +
                              static_cast<std::uint32_t>(element) * 15485863u;
  return static_cast<float>(static_cast<int>(mixed % 2001) - 1000) / 64.0f;
}
inline float secondValue(int step, int rank, std::int64_t token, std::size_t element) {
  return inputValue(step + 1000, rank, token, element);
}
// What the experts do to a row: depends on where it lies.
inline float expertScale(int rank, std::int64_t row) {
  return 0.5f + static_cast<float>((rank * 31 + row * 7) % 9) / 8.0f;
}

struct RankTensors {
  RankTensors(std::int64_t tokens, int topk, std::int64_t rows, std::size_t elements, std::size_t elements2,
              const std::vector<bool>& windows)
      : input(static_cast<std::size_t>(tokens) * elements, false),
        input2(static_cast<std::size_t>(tokens) * elements2, false),
        output(static_cast<std::size_t>(rows) * elements, windows[0]),
        output2(static_cast<std::size_t>(rows) * elements2, windows[1]),
        experts(static_cast<std::size_t>(rows) * elements, windows[2]),
        combined(static_cast<std::size_t>(tokens) * elements, false),
        gradient(static_cast<std::size_t>(tokens) * elements, false),
        rowGradient(static_cast<std::size_t>(rows) * elements, windows[3]),
        weightGradient(static_cast<std::size_t>(tokens) * static_cast<std::size_t>(topk), false) {}
  Tensor input, input2, output, output2, experts, combined, gradient, rowGradient, weightGradient;
};

struct ShuffleWorld {
  explicit ShuffleWorld(World w) : world(std::move(w)), expected(plan::testing::naive(world)) {}

  World world;
  Expected expected;
  std::size_t elements = 8;
  std::size_t elements2 = 0;
  int step = 0;

  void fillInput(int rank, RankTensors& t) const {
    for (std::int64_t token = 0; token < world.tokens[rank]; ++token) {
      for (std::size_t e = 0; e < elements; ++e) {
        t.input.data()[static_cast<std::size_t>(token) * elements + e] = inputValue(step, rank, token, e);
        t.gradient.data()[static_cast<std::size_t>(token) * elements + e] = inputValue(step + 77, rank, token, e);
      }
      for (std::size_t e = 0; e < elements2; ++e)
        t.input2.data()[static_cast<std::size_t>(token) * elements2 + e] = secondValue(step, rank, token, e);
    }
  }

  // The experts: rows that hold something are scaled, all others stay poisoned.
  void runExperts(int rank, std::int64_t rows, RankTensors& t) const {
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::size_t e = 0; e < elements; ++e) {
        const std::size_t at = static_cast<std::size_t>(row) * elements + e;
        if (!t.output.poisoned(at)) t.experts.data()[at] = expertScale(rank, row) * t.output.data()[at];
      }
    }
  }

  // Empty, or what is wrong. All rows of the tensor are looked at: what was not delivered must have stayed poisoned.
  std::string checkDispatch(int rank, const RankTensors& t) const {
    std::set<std::int64_t> delivered;
    for (const Row& row : expected.rows) {
      if (row.destination != rank) continue;
      delivered.insert(row.row);
      for (std::size_t e = 0; e < elements; ++e) {
        const float got = const_cast<RankTensors&>(t).output.data()[static_cast<std::size_t>(row.row) * elements + e];
        const float want = inputValue(step, row.source, row.token, e);
        if (got != want)
          return text("row ", row.row, " element ", e, " of rank ", rank, " (token ", row.token, " of rank ",
                      row.source, "): ", got, ", not ", want);
      }
      for (std::size_t e = 0; e < elements2; ++e) {
        const float got = const_cast<RankTensors&>(t).output2.data()[static_cast<std::size_t>(row.row) * elements2 + e];
        const float want = secondValue(step, row.source, row.token, e);
        if (got != want)
          return text("row ", row.row, " element ", e, " of rank ", rank, "'s second output: ", got, ", not ", want);
      }
    }
    return untouched(t.output, delivered, elements, "output") +
           untouched(t.output2, delivered, elements2, "second output");
  }

  // In rank order one row stands for all slots and is added as it is.
  std::string checkCombine(int rank, const RankTensors& t) const {
    const std::size_t count = static_cast<std::size_t>(world.tokens[rank]) * elements;
    std::vector<double> sum(count, 0), size(count, 0);
    for (const Row& row : expected.rows) {
      if (row.source != rank) continue;
      const double weight = weightOf(rank, row);
      for (std::size_t e = 0; e < elements; ++e) {
        const float given = expertScale(row.destination, row.row) * inputValue(step, rank, row.token, e);
        const double term = weight * static_cast<double>(given);
        sum[static_cast<std::size_t>(row.token) * elements + e] += term;
        size[static_cast<std::size_t>(row.token) * elements + e] += std::fabs(term);
      }
    }
    for (std::size_t i = 0; i < count; ++i) {
      const double got = static_cast<double>(const_cast<RankTensors&>(t).combined.data()[i]);
      if (!(std::fabs(got - sum[i]) <= 1e-6 * size[i])) {
        return text("combined token ", i / elements, " element ", i % elements, " of rank ", rank, ": ", got, ", not ",
                    sum[i]);
      }
    }
    return {};
  }

  std::string checkBackward(int rank, const RankTensors& t) const {
    RankTensors& mine = const_cast<RankTensors&>(t);
    std::set<std::int64_t> delivered;
    const auto topk = static_cast<std::size_t>(world.topk);
    std::vector<double> dots(static_cast<std::size_t>(world.tokens[rank]) * topk, 0), size(dots.size(), 0);
    for (const Row& row : expected.rows) {
      const double weight = weightOf(row.source, row);
      if (row.destination == rank) {
        delivered.insert(row.row);
        for (std::size_t e = 0; e < elements; ++e) {
          const double want = weight * static_cast<double>(inputValue(step + 77, row.source, row.token, e));
          const double got =
              static_cast<double>(mine.rowGradient.data()[static_cast<std::size_t>(row.row) * elements + e]);
          if (!(std::fabs(got - want) <= 1e-6 * std::fabs(want)))
            return text("gradient of row ", row.row, " of rank ", rank, ": ", got, ", not ", want);
        }
      }
      if (row.source != rank) continue;
      for (std::size_t e = 0; e < elements; ++e) {
        const double term =
            static_cast<double>(inputValue(step + 77, rank, row.token, e)) *
            static_cast<double>(expertScale(row.destination, row.row) * inputValue(step, rank, row.token, e));
        dots[static_cast<std::size_t>(row.token) * topk + static_cast<std::size_t>(row.slot)] += term;
        size[static_cast<std::size_t>(row.token) * topk + static_cast<std::size_t>(row.slot)] += std::fabs(term);
      }
    }
    for (std::size_t i = 0; i < dots.size(); ++i) {
      const double got = static_cast<double>(mine.weightGradient.data()[i]);
      if (!(std::fabs(got - dots[i]) <= 2e-6 * size[i]))
        return text("weight gradient ", i, " of rank ", rank, ": ", got, ", not ", dots[i]);
    }
    return untouched(t.rowGradient, delivered, elements, "row gradient");
  }

  std::string checkCounts(int rank, const PlanState& plan, bool tickets) const {
    const plan::ArenaHeader& h = *plan.view.header;
    if (h.receiveRows != expected.receiveRows[rank])
      return text("rank ", rank, " receives ", h.receiveRows, " rows, not ", expected.receiveRows[rank]);
    if (h.dropped != expected.dropped[rank])
      return text("rank ", rank, " dropped ", h.dropped, ", not ", expected.dropped[rank]);
    if (!tickets) return {};
    for (const Row& row : expected.rows) {
      if (row.destination != rank) continue;
      const Ticket& ticket = plan.tickets.as<Ticket>()[row.row];
      if (ticket.source != row.source || ticket.token != row.token || ticket.slot != row.slot) {
        return text("ticket of row ", row.row, " of rank ", rank, ": rank ", ticket.source, " token ", ticket.token,
                    " slot ", ticket.slot, ", not ", row.source, " ", row.token, " ", row.slot);
      }
    }
    return {};
  }

  PlanRequest planRequest(int rank) const {
    PlanRequest r;
    r.map = world.map(rank);
    r.options = world.options;
    r.dropBeyondCapacity = true;
    r.dedupAuto = false;
    return r;
  }
  DispatchRequest dispatchRequest(RankTensors& t) const {
    DispatchRequest r;
    r.input = t.input.bytes();
    r.output = t.output.bytes();
    r.rowBytes = elements * 4;
    if (elements2 > 0) {
      r.input2 = t.input2.bytes();
      r.output2 = t.output2.bytes();
      r.rowBytes2 = elements2 * 4;
    }
    return r;
  }
  CombineRequest combineRequest(RankTensors& t) const {
    CombineRequest r;
    r.input = t.experts.bytes();
    r.output = t.combined.bytes();
    r.elements = elements;
    r.type = exec::RowType::f32;
    return r;
  }
  CombineBackwardRequest backwardRequest(RankTensors& t) const {
    CombineBackwardRequest r;
    r.outputGradient = t.gradient.bytes();
    r.expertRows = t.experts.bytes();
    r.inputGradient = t.rowGradient.bytes();
    r.weightGradient = t.weightGradient.data();
    r.elements = elements;
    r.type = exec::RowType::f32;
    return r;
  }

 private:
  double weightOf(int source, const Row& row) const {
    if (!world.weighted || world.options.layout == plan::Layout::rankOrder) return 1.0;
    return static_cast<double>(world.weights[source][static_cast<std::size_t>(row.token * world.topk + row.slot)]);
  }
  template <class... Parts>
  static std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
  }
  static std::string untouched(const Tensor& tensor, const std::set<std::int64_t>& delivered, std::size_t width,
                               const char* name) {
    for (std::size_t i = 0; width > 0 && i < tensor.count(); ++i) {
      const auto row = static_cast<std::int64_t>(i / width);
      if (!delivered.contains(row) && !tensor.poisoned(i))
        return text(name, ": row ", row, " was written, nobody had sent it");
    }
    return {};
  }
};

}  // namespace fusco::engine::testing
