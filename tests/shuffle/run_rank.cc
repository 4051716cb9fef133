#include <cmath>
#include <cstring>
#include <memory>
#include <sstream>

#include "shuffle/case.h"

namespace fusco::test {

namespace {

constexpr std::uint8_t kPoison = 0xa5;

struct Memory {
  explicit Memory(std::size_t bytes, bool isPrivate) : bytes_(bytes + 64), private_(isPrivate) {
    if (private_) {
      data_ = static_cast<std::uint8_t*>(std::aligned_alloc(64, (bytes_ + 63) / 64 * 64));
    } else {
      void* p = nullptr;
      ok(fuscoMemAlloc(&p, bytes_), "fuscoMemAlloc");
      data_ = static_cast<std::uint8_t*>(p);
    }
    std::memset(data_, kPoison, bytes_);
  }
  ~Memory() {
    if (private_) {
      std::free(data_);
    } else {
      fuscoMemFree(data_);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::uint8_t* data() { return data_; }
  float* floats() { return reinterpret_cast<float*>(data_); }

 private:
  std::size_t bytes_;
  bool private_;
  std::uint8_t* data_ = nullptr;
};

struct Checker {
  const Case& c;
  int rank;
  std::ostringstream out;
  bool bad = false;
  template <class... Parts>
  void wrong(const Parts&... parts) {
    if (bad) return;
    bad = true;
    out << c.describe() << "; rank " << rank << ": ";
    (out << ... << parts);
  }
};

// Rows in place, everything else untouched (or zero where gaps are filled).
void checkRows(Checker& check, const Expected& x, int tensor, std::size_t rowBytes, const std::uint8_t* output, bool gapsMayChange) {
  std::vector<char> written(static_cast<std::size_t>(x.rows), 0);
  for (const Arrival& a : x.arrivals) {
    written[static_cast<std::size_t>(a.row)] = 1;
    for (std::size_t b = 0; b < rowBytes; ++b) {
      const std::uint8_t expected = sentByte(check.c.seed, tensor, a.source, a.token, b);
      const std::uint8_t got = output[static_cast<std::size_t>(a.row) * rowBytes + b];
      if (got != expected) {
        check.wrong("tensor ", tensor, " row ", a.row, " byte ", b, " is ", int{got}, ", expected ", int{expected}, " of rank ", a.source, " token ",
                    a.token, " slot ", a.slot);
        return;
      }
    }
  }
  for (std::int64_t row = 0; row < x.rows; ++row) {
    if (written[static_cast<std::size_t>(row)]) continue;
    const std::uint8_t expected = check.c.zeroFill && check.c.alignment > 1 ? 0 : kPoison;
    if (expected == kPoison && gapsMayChange) continue;
    for (std::size_t b = 0; b < rowBytes; ++b) {
      if (output[static_cast<std::size_t>(row) * rowBytes + b] != expected) {
        check.wrong("tensor ", tensor, " gap row ", row, " byte ", b, " was changed");
        return;
      }
    }
  }
  for (std::size_t b = 0; b < 64; ++b) {
    if (output[static_cast<std::size_t>(x.rows) * rowBytes + b] != kPoison) check.wrong("bytes behind the output were written");
  }
}

float expertValue(std::uint64_t seed, int rank, std::int64_t row, std::size_t column) {
  return static_cast<float>(static_cast<int>(sentByte(seed, 5, rank, row, column)) - 128) / 16.0f;
}
float gradientValue(std::uint64_t seed, int rank, std::int64_t token, std::size_t column) {
  return static_cast<float>(static_cast<int>(sentByte(seed, 6, rank, token, column)) - 128) / 32.0f;
}

// For each (token, slot) of this rank: where its row lies.
struct Place {
  int rank = -1;
  std::int64_t row = -1;
};
std::vector<Place> placesOf(const Case& c, int rank, const std::vector<Expected>& all) {
  std::vector<Place> places(static_cast<std::size_t>(c.tokens[static_cast<std::size_t>(rank)] * c.topk));
  for (int r = 0; r < c.ranks; ++r) {
    for (const Arrival& a : all[static_cast<std::size_t>(r)].arrivals) {
      if (a.source == rank) places[static_cast<std::size_t>(a.token * c.topk + a.slot)] = {r, a.row};
    }
  }
  return places;
}

void checkCombine(Checker& check, fuscoPlan_t plan, const std::vector<Expected>& all, bool multiNode) {
  const Case& c = check.c;
  const int rank = check.rank;
  const std::size_t elements = std::max<std::size_t>(1, c.rowBytes / 4);
  const Expected& x = all[static_cast<std::size_t>(rank)];
  const std::int64_t tokens = c.tokens[static_cast<std::size_t>(rank)];
  const bool weighted = c.seed % 3 != 0;
  const bool biased = c.seed % 2 == 0;
  Memory input(static_cast<std::size_t>(x.rows) * elements * 4, c.privateMemory);
  Memory output(static_cast<std::size_t>(tokens) * elements * 4, c.seed % 5 != 0);
  std::vector<float> bias(static_cast<std::size_t>(tokens) * elements, 0.0f);
  for (std::int64_t row = 0; row < x.rows; ++row) {
    for (std::size_t i = 0; i < elements; ++i) input.floats()[static_cast<std::size_t>(row) * elements + i] = expertValue(c.seed, rank, row, i);
  }
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i % 17) - 8;
  fuscoCombineArgs_t args = FUSCO_COMBINE_INIT;
  args.input = input.data();
  args.output = output.data();
  args.elements = elements;
  args.datatype = fuscoFloat32;
  args.bias = biased ? bias.data() : nullptr;
  args.weighted = weighted;
  FUSCO_OK(fuscoCombineEx(plan, &args, nullptr));
  const std::vector<Place> places = placesOf(c, rank, all);
  const bool useWeights = weighted && c.layout != fuscoLayoutRankOrder;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::size_t i = 0; i < elements; ++i) {
      double sum = biased ? bias[static_cast<std::size_t>(t) * elements + i] : 0;
      double scale = std::abs(sum);
      for (int k = 0; k < c.topk; ++k) {
        const auto at = static_cast<std::size_t>(t * c.topk + k);
        if (places[at].rank < 0) continue;
        const double w = useWeights ? c.weights[static_cast<std::size_t>(rank)][at] : 1.0;
        const double v = w * expertValue(c.seed, places[at].rank, places[at].row, i);
        sum += v;
        scale += std::abs(v);
      }
      const double got = output.floats()[static_cast<std::size_t>(t) * elements + i];
      if (!(std::abs(got - sum) <= scale * 1e-6 * (multiNode ? 2 : 1) + 1e-30)) {
        check.wrong("combine of token ", t, " element ", i, " is ", got, ", expected ", sum);
        return;
      }
    }
  }
}

void checkBackward(Checker& check, fuscoPlan_t plan, const std::vector<Expected>& all) {
  const Case& c = check.c;
  const int rank = check.rank;
  const std::size_t elements = std::max<std::size_t>(1, c.rowBytes / 4);
  const Expected& x = all[static_cast<std::size_t>(rank)];
  const std::int64_t tokens = c.tokens[static_cast<std::size_t>(rank)];
  Memory expert(static_cast<std::size_t>(x.rows) * elements * 4, c.privateMemory);
  Memory inputGradient(static_cast<std::size_t>(x.rows) * elements * 4, c.privateMemory);
  std::vector<float> gradient(static_cast<std::size_t>(tokens) * elements + 1);
  std::vector<float> weightGradient(static_cast<std::size_t>(tokens * c.topk) + 1, NAN);
  for (std::int64_t row = 0; row < x.rows; ++row) {
    for (std::size_t i = 0; i < elements; ++i) expert.floats()[static_cast<std::size_t>(row) * elements + i] = expertValue(c.seed, rank, row, i);
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::size_t i = 0; i < elements; ++i) gradient[static_cast<std::size_t>(t) * elements + i] = gradientValue(c.seed, rank, t, i);
  }
  fuscoCombineBackwardArgs_t args = FUSCO_COMBINE_BACKWARD_INIT;
  args.outputGradient = gradient.data();
  args.expertRows = expert.data();
  args.inputGradient = inputGradient.data();
  args.weightGradient = weightGradient.data();
  args.elements = elements;
  args.datatype = fuscoFloat32;
  FUSCO_OK(fuscoCombineBackward(plan, &args, nullptr));
  for (const Arrival& a : x.arrivals) {
    const float w = c.weights[static_cast<std::size_t>(a.source)][static_cast<std::size_t>(a.token * c.topk + a.slot)];
    for (std::size_t i = 0; i < elements; ++i) {
      const float expected = w * gradientValue(c.seed, a.source, a.token, i);
      const float got = inputGradient.floats()[static_cast<std::size_t>(a.row) * elements + i];
      if (got != expected) {
        check.wrong("input gradient of row ", a.row, " element ", i, " is ", got, ", expected ", expected);
        return;
      }
    }
  }
  const std::vector<Place> places = placesOf(c, rank, all);
  for (std::size_t at = 0; at < places.size(); ++at) {
    double dot = 0;
    double scale = 0;
    for (std::size_t i = 0; i < elements && places[at].rank >= 0; ++i) {
      const double v = static_cast<double>(gradientValue(c.seed, rank, static_cast<std::int64_t>(at) / c.topk, i)) *
                       expertValue(c.seed, places[at].rank, places[at].row, i);
      dot += v;
      scale += std::abs(v);
    }
    if (!(std::abs(weightGradient[at] - dot) <= scale * 1e-5 + 1e-30)) {
      check.wrong("weight gradient of slot ", at, " is ", weightGradient[at], ", expected ", dot);
      return;
    }
  }
}

}  // namespace

std::string runRank(const Case& c, fuscoComm_t comm, int rank, bool multiNode) {
  Checker check{c, rank, {}, false};
  const auto at = static_cast<std::size_t>(rank);
  std::vector<std::int32_t> ids32(c.ids[at].begin(), c.ids[at].end());
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  config.expertIds = c.int32Ids ? static_cast<const void*>(ids32.data()) : c.ids[at].data();
  config.idType = c.int32Ids ? fuscoInt32 : fuscoInt64;
  config.weights = c.weights[at].data();
  config.tokens = c.tokens[at];
  config.topk = c.topk;
  config.experts = c.experts;
  config.layout = c.layout;
  config.alignment = c.alignment;
  config.zeroFill = c.zeroFill;
  config.maxTokens = c.maxTokens;
  config.dedup = c.dedup;
  config.tickets = c.tickets;
  config.expertCounters = c.counters;
  fuscoPlan_t plan = nullptr;
  FUSCO_OK(fuscoPlanCreate(&plan, &config, comm, nullptr));
  const std::unique_ptr<fuscoPlan, void (*)(fuscoPlan_t)> guard(plan, [](fuscoPlan_t p) { fuscoPlanDestroy(p); });

  std::vector<Expected> all;
  for (int r = 0; r < c.ranks; ++r) all.push_back(expectedAt(c, r));
  const Expected& x = all[at];
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  FUSCO_OK(fuscoPlanGetInfo(plan, &info));
  if (info.receiveRows != x.rows) check.wrong("receiveRows is ", info.receiveRows, ", expected ", x.rows);
  for (int e = 0; e < info.localExperts && c.layout == fuscoLayoutExpertOrder; ++e) {
    if (info.localExpertRows[e] != x.rowsOfExpert[static_cast<std::size_t>(e)]) check.wrong("rows of local expert ", e);
  }

  // Twice: the first dispatch of a plan also brings its tickets, the second only rows.
  for (int round = 0; round < 2 && !check.bad; ++round) {
    std::vector<std::uint8_t> input(static_cast<std::size_t>(c.tokens[at]) * c.rowBytes + 1);
    std::vector<std::uint8_t> input2(static_cast<std::size_t>(c.tokens[at]) * c.rowBytes2 + 1);
    for (std::int64_t t = 0; t < c.tokens[at]; ++t) {
      for (std::size_t b = 0; b < c.rowBytes; ++b) input[static_cast<std::size_t>(t) * c.rowBytes + b] = sentByte(c.seed, 0, rank, t, b);
      for (std::size_t b = 0; b < c.rowBytes2; ++b) input2[static_cast<std::size_t>(t) * c.rowBytes2 + b] = sentByte(c.seed, 1, rank, t, b);
    }
    Memory output(static_cast<std::size_t>(x.rows) * c.rowBytes, c.privateMemory);
    Memory output2(static_cast<std::size_t>(x.rows) * c.rowBytes2, c.privateMemory);
    fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
    args.input = input.data();
    args.output = output.data();
    args.rowBytes = c.rowBytes;
    args.input2 = c.rowBytes2 > 0 ? input2.data() : nullptr;
    args.output2 = c.rowBytes2 > 0 ? output2.data() : nullptr;
    args.rowBytes2 = c.rowBytes2;
    FUSCO_OK(fuscoDispatchEx(plan, &args, nullptr));
    checkRows(check, x, 0, c.rowBytes, output.data(), false);
    if (c.rowBytes2 > 0) checkRows(check, x, 1, c.rowBytes2, output2.data(), false);
  }
  if (c.tickets || c.layout != fuscoLayoutExpertOrder) {
    const fuscoTicket_t* tickets = nullptr;
    FUSCO_OK(fuscoPlanTickets(plan, &tickets));
    std::vector<char> used(static_cast<std::size_t>(x.rows), 0);
    for (const Arrival& a : x.arrivals) {
      const fuscoTicket_t& ticket = tickets[a.row];
      used[static_cast<std::size_t>(a.row)] = 1;
      if (ticket.source != a.source || ticket.token != a.token || ticket.slot != a.slot) check.wrong("ticket of row ", a.row);
      if (c.layout != fuscoLayoutRankOrder &&
          ticket.weight != c.weights[static_cast<std::size_t>(a.source)][static_cast<std::size_t>(a.token * c.topk + a.slot)]) {
        check.wrong("weight in the ticket of row ", a.row);
      }
    }
    for (std::int64_t row = 0; row < x.rows; ++row) {
      if (!used[static_cast<std::size_t>(row)] && tickets[row].source != -1) check.wrong("a ticket for gap row ", row);
    }
  }
  if ((c.counters && c.layout == fuscoLayoutExpertOrder) || c.layout == fuscoLayoutSlotted) {
    const volatile std::uint64_t* counters = nullptr;
    FUSCO_OK(fuscoPlanExpertCounters(plan, &counters));
    for (std::size_t e = 0; e < x.rowsOfExpert.size(); ++e) {
      if (static_cast<std::int64_t>(counters[e]) != x.rowsOfExpert[e]) check.wrong("counter of expert ", e, " is ", counters[e]);
    }
  }
  if (c.layout == fuscoLayoutRankOrder) {
    const std::int32_t* localIds = nullptr;
    const float* weights = nullptr;
    FUSCO_OK(fuscoPlanRankOrder(plan, &localIds, &weights));
    for (const Arrival& a : x.arrivals) {
      for (int k = 0; k < c.topk; ++k) {
        const auto from = static_cast<std::size_t>(a.token * c.topk + k);
        const std::int64_t id = c.ids[static_cast<std::size_t>(a.source)][from] - c.firstExpert(rank);
        const bool here = c.ids[static_cast<std::size_t>(a.source)][from] >= 0 && id >= 0 && id < c.localExperts(rank);
        const auto got = static_cast<std::size_t>(a.row * c.topk + k);
        if (localIds[got] != (here ? id : -1)) check.wrong("local expert id of row ", a.row, " slot ", k, " is ", localIds[got]);
        if (weights[got] != (here ? c.weights[static_cast<std::size_t>(a.source)][from] : 0)) check.wrong("weight of row ", a.row, " slot ", k);
      }
    }
  }
  checkCombine(check, plan, all, multiNode);
  if (c.layout != fuscoLayoutRankOrder) checkBackward(check, plan, all);
  return check.out.str();
}

}  // namespace fusco::test
