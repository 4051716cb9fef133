#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <sstream>

#include "shuffle/case.h"
#include "shuffle/numbers.h"

namespace fusco::test {

namespace {

constexpr std::uint8_t kPoison = 0xa5;

// A tensor: a window or private memory, poisoned, with poison behind it, and `skew` bytes off its alignment. The
// library is handed given(); the test works on data(), which is the same where the host can look at it.
class Memory {
 public:
  Memory(Space& space, std::size_t bytes, bool isPrivate, std::size_t skew = 0)
      : space_(space), bytes_(bytes), skew_(skew), private_(isPrivate), all_((bytes + skew + 127) / 64 * 64) {
    there_ = static_cast<std::uint8_t*>(space.allocate(all_, private_));
    if (!space.direct()) here_.resize(all_);
    base_ = space.direct() ? there_ : here_.data();
    std::memset(base_, kPoison, all_);
  }
  ~Memory() { space_.release(there_, private_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::uint8_t* data() { return base_ + skew_; }
  std::uint8_t* row(std::int64_t index, std::size_t rowBytes) {
    return data() + static_cast<std::size_t>(index) * rowBytes;
  }
  // For the library, with what the test has written.
  void* given() {
    if (!space_.direct()) space_.write(there_, base_, all_);
    return there_ + skew_;
  }
  // Brings what the library has written, once that has ended.
  void fetch() {
    if (!space_.direct()) space_.read(base_, there_, all_);
  }
  bool intactAround() const {
    const std::uint8_t* begin = base_;
    const std::uint8_t* end = begin + skew_ + bytes_;
    return std::all_of(begin, begin + skew_, isPoison) && std::all_of(end, end + 64, isPoison);
  }

 private:
  static bool isPoison(std::uint8_t b) { return b == kPoison; }
  Space& space_;
  std::size_t bytes_;
  std::size_t skew_;
  bool private_;
  std::size_t all_;
  std::uint8_t* there_ = nullptr;
  std::vector<std::uint8_t> here_;
  std::uint8_t* base_ = nullptr;
};

// For each (token, slot) of a rank: where its row lies.
struct Place {
  int rank = -1;
  std::int64_t row = -1;
};

class CaseRun {
 public:
  CaseRun(const Case& c, fuscoComm_t comm, int rank, Space& space);
  ~CaseRun() { fuscoPlanDestroy(plan_); }
  CaseRun(const CaseRun&) = delete;
  CaseRun& operator=(const CaseRun&) = delete;

  void dispatch(bool start);
  void checkDispatch();
  void checkBeside();
  void combine(bool start);
  void checkCombine();
  void backward();
  void finish() { FUSCO_OK(fuscoFinish(plan_)); }
  bool bad() const { return bad_; }
  std::string wrong() const { return out_.str(); }

 private:
  template <class... Parts>
  void report(const Parts&... parts) {
    if (bad_) return;
    bad_ = true;
    out_.precision(9);
    out_ << c_.describe() << "; rank " << rank_ << ": ";
    (out_ << ... << parts);
  }
  const Expected& own() const { return all_[static_cast<std::size_t>(rank_)]; }
  // What was called for has happened. A GPU that waited in vain says so only afterwards, and left its outputs alone; on
  // the host a call that succeeded has its outputs, and who dies after it is told of by the next one.
  void settle() {
    space_.settle();
    if (!space_.gpu()) return;
    fuscoResult_t state = fuscoSuccess;
    FUSCO_OK(fuscoCommGetAsyncError(comm_, &state));
    if (state != fuscoSuccess) throw std::runtime_error(c_.describe() + ": " + fuscoGetLastError(comm_));
  }
  std::int64_t tokens() const { return c_.tokens[static_cast<std::size_t>(rank_)]; }
  float weightOf(int source, std::int64_t token, int slot) const {
    return c_.weights[static_cast<std::size_t>(source)][static_cast<std::size_t>(token * c_.topk + slot)];
  }
  void checkRows(int tensor, std::size_t rowBytes, Memory& output);
  void checkTickets();
  void checkRankOrder();
  // Rows of numbers, as the type has them: the experts' results, gradients, bias.
  std::vector<float> numbers(int tensor, int rank, std::int64_t row) const;
  void putRow(std::uint8_t* to, const std::vector<float>& values) const;
  bool bringsSum(int rank) const {
    return nodes_[static_cast<std::size_t>(rank)] == nodes_[static_cast<std::size_t>(rank_)] &&
           c_.dedup == fuscoDedupFull && c_.layout != fuscoLayoutRankOrder &&
           (!partialsFp32_ || type_ == fuscoFloat32) && space_.apart(rank_, rank);
  }

  // What a plan holds, on the host.
  template <class T>
  std::vector<T> brought(const T* there, std::size_t count) {
    std::vector<T> here(count);
    if (count > 0) space_.read(here.data(), there, count * sizeof(T));
    return here;
  }

  void checkInfo(std::int64_t dropped);
  // Where the host does not learn the counts: as they stand in GPU memory.
  bool countsOnDevice() const { return space_.gpu() && (c_.capacityRows > 0 || c_.layout == fuscoLayoutSlotted); }

  const Case& c_;
  const fuscoComm_t comm_;
  int rank_;
  std::int64_t held_ = 0;  // rows of a tensor of expert rows
  Space& space_;
  fuscoPlan_t plan_ = nullptr;
  std::vector<int> nodes_;     // by rank
  std::vector<Expected> all_;  // by rank
  std::vector<Place> places_;
  fuscoDataType_t type_ = fuscoFloat32;
  std::size_t elements_ = 1;
  bool weighted_ = true, biased_ = false, partialsFp32_ = false;
  std::unique_ptr<Memory> ids_, weights_, input_[2];
  std::unique_ptr<Memory> output_[2];
  std::unique_ptr<Memory> expertRows_, combined_, bias_;
  bool bad_ = false;
  std::ostringstream out_;
};

CaseRun::CaseRun(const Case& c, fuscoComm_t comm, int rank, Space& space)
    : c_(c), comm_(comm), rank_(rank), space_(space) {
  static constexpr fuscoDataType_t kTypes[] = {fuscoFloat32, fuscoBfloat16, fuscoFloat32, fuscoFloat16};
  type_ = kTypes[c.seed / 7 % 4];
  elements_ = std::max<std::size_t>(1, c.rowBytes / 4);
  weighted_ = c.seed % 3 != 0 && c.layout != fuscoLayoutRankOrder;
  biased_ = c.seed % 2 == 0;
  partialsFp32_ = c.seed / 28 % 2 == 1;
  const auto at = static_cast<std::size_t>(rank);
  std::vector<std::int32_t> ids32(c.ids[at].begin(), c.ids[at].end());
  const std::size_t slots = c.ids[at].size();
  ids_ = std::make_unique<Memory>(space, slots * 8, true);
  weights_ = std::make_unique<Memory>(space, slots * 4, true);
  if (slots > 0) {
    if (c.int32Ids) {
      std::memcpy(ids_->data(), ids32.data(), slots * 4);
    } else {
      std::memcpy(ids_->data(), c.ids[at].data(), slots * 8);
    }
    std::memcpy(weights_->data(), c.weights[at].data(), slots * 4);
  }
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  config.expertIds = ids_->given();
  config.idType = c.int32Ids ? fuscoInt32 : fuscoInt64;
  config.weights = static_cast<const float*>(weights_->given());
  config.tokens = c.tokens[at];
  config.topk = c.topk;
  config.experts = c.experts;
  config.layout = c.layout;
  config.alignment = c.alignment;
  config.zeroFill = c.zeroFill;
  config.maxTokens = c.maxTokens;
  config.capacityRows = c.capacityRows;
  config.capacityPolicy = fuscoCapacityDrop;
  config.dedup = c.dedup;
  config.tickets = c.tickets;
  config.expertCounters = c.counters;
  FUSCO_OK(fuscoPlanCreate(&plan_, &config, comm, space.stream()));
  places_.resize(static_cast<std::size_t>(tokens() * c.topk));
  std::int64_t dropped = 0;
  for (int r = 0; r < c.ranks; ++r) {
    int node = -1;
    FUSCO_OK(fuscoCommNode(comm, r, &node));
    nodes_.push_back(node);
    all_.push_back(expectedAt(c, r));
    dropped += all_.back().dropped[at];
    for (const Arrival& a : all_.back().arrivals) {
      if (a.source == rank) places_[static_cast<std::size_t>(a.token * c.topk + a.slot)] = {r, a.row};
    }
  }
  checkInfo(dropped);
}

void CaseRun::checkInfo(std::int64_t dropped) {
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  FUSCO_OK(fuscoPlanGetInfo(plan_, &info));
  if (info.localExperts != c_.localExperts(rank_)) report("localExperts is ", info.localExperts);
  held_ = std::max(info.receiveRows, own().rows);
  const bool expertOrder = c_.layout == fuscoLayoutExpertOrder;
  if (countsOnDevice()) {
    fuscoPlanDeviceInfo_t device = FUSCO_PLAN_DEVICE_INFO_INIT;
    FUSCO_OK(fuscoPlanGetDeviceInfo(plan_, &device));
    settle();
    const auto experts = static_cast<std::size_t>(info.localExperts);
    std::vector<std::int32_t> rows(experts + 1), starts(experts + 1);
    std::int64_t droppedThere = -1, rowsThere = -1;
    space_.read(rows.data(), device.localExpertRows, experts * 4);
    space_.read(starts.data(), device.localExpertStart, (experts + 1) * 4);
    space_.read(&droppedThere, device.droppedRows, 8);
    space_.read(&rowsThere, device.receiveRows, 8);
    if (droppedThere != dropped) report("droppedRows is ", droppedThere, ", expected ", dropped);
    if (rowsThere != own().rows) report("rows are ", rowsThere, ", expected ", own().rows);
    if (starts[experts] != own().rows && c_.layout != fuscoLayoutRankOrder)
      report("the last start is ", starts[experts], ", expected ", own().rows);
    for (std::size_t e = 0; e < experts && expertOrder; ++e) {
      if (rows[e] != own().rowsOfExpert[e]) report("rows of local expert ", e, ": ", rows[e]);
    }
    return;
  }
  if (info.receiveRows != own().rows) report("receiveRows is ", info.receiveRows, ", expected ", own().rows);
  if (info.droppedRows != dropped) report("droppedRows is ", info.droppedRows, ", expected ", dropped);
  if (info.tokens != tokens()) report("tokens is ", info.tokens);
  for (int e = 0; e < info.localExperts && expertOrder; ++e) {
    if (info.localExpertRows[e] != own().rowsOfExpert[static_cast<std::size_t>(e)])
      report("rows of local expert ", e, ": ", info.localExpertRows[e]);
  }
}

void CaseRun::dispatch(bool start) {
  const std::size_t rowBytes[2] = {c_.rowBytes, c_.rowBytes2};
  const std::size_t skew = c_.seed % 4 == 1 ? 1 + c_.seed % 63 : 0;
  for (int tensor = 0; tensor < 2; ++tensor) {
    input_[tensor] = std::make_unique<Memory>(space_, static_cast<std::size_t>(tokens()) * rowBytes[tensor], true);
    for (std::int64_t t = 0; t < tokens(); ++t) {
      fillRow(c_.seed, tensor, rank_, t, input_[tensor]->row(t, rowBytes[tensor]), rowBytes[tensor]);
    }
    output_[tensor] =
        std::make_unique<Memory>(space_, static_cast<std::size_t>(held_) * rowBytes[tensor], c_.privateMemory, skew);
  }
  fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
  args.input = input_[0]->given();
  args.output = output_[0]->given();
  args.rowBytes = c_.rowBytes;
  args.input2 = c_.rowBytes2 > 0 ? input_[1]->given() : nullptr;
  args.output2 = c_.rowBytes2 > 0 ? output_[1]->given() : nullptr;
  args.rowBytes2 = c_.rowBytes2;
  if (start) {
    FUSCO_OK(fuscoDispatchStart(plan_, &args, space_.stream()));
  } else {
    FUSCO_OK(fuscoDispatchEx(plan_, &args, space_.stream()));
  }
}

// Rows in place, everything else untouched (or zero where gaps are filled).
void CaseRun::checkRows(int tensor, std::size_t rowBytes, Memory& output) {
  std::vector<char> written(static_cast<std::size_t>(held_), 0);
  std::vector<std::uint8_t> expected(rowBytes);
  const auto compare = [&](std::int64_t row, const auto&... whose) {
    const std::uint8_t* got = output.row(row, rowBytes);
    if (std::memcmp(got, expected.data(), rowBytes) == 0) return;
    const auto byte =
        static_cast<std::size_t>(std::mismatch(expected.begin(), expected.end(), got).first - expected.begin());
    report("tensor ", tensor, " row ", row, " byte ", byte, " is ", int{got[byte]}, ", expected ", int{expected[byte]},
           whose...);
  };
  for (const Arrival& a : own().arrivals) {
    written[static_cast<std::size_t>(a.row)] = 1;
    fillRow(c_.seed, tensor, a.source, a.token, expected.data(), rowBytes);
    compare(a.row, " of rank ", a.source, " token ", a.token, " slot ", a.slot);
  }
  std::fill(expected.begin(), expected.end(), c_.zeroFill && c_.alignment > 1 ? std::uint8_t{0} : kPoison);
  for (std::int64_t row = 0; row < held_; ++row) {
    if (row == own().rows) std::fill(expected.begin(), expected.end(), kPoison);
    if (!written[static_cast<std::size_t>(row)]) compare(row, ", for no row belongs there");
  }
  if (!output.intactAround()) report("bytes around tensor ", tensor, " were written");
}

void CaseRun::checkDispatch() {
  settle();
  for (auto& output : output_) output->fetch();
  checkRows(0, c_.rowBytes, *output_[0]);
  if (c_.rowBytes2 > 0) checkRows(1, c_.rowBytes2, *output_[1]);
}

void CaseRun::checkTickets() {
  const fuscoTicket_t* there = nullptr;
  FUSCO_OK(fuscoPlanTickets(plan_, &there));
  const auto tickets = brought(there, static_cast<std::size_t>(own().rows));
  std::vector<char> used(static_cast<std::size_t>(own().rows), 0);
  std::vector<std::vector<std::int64_t>> primaries;
  for (int s = 0; s < c_.ranks; ++s)
    primaries.emplace_back(static_cast<std::size_t>(c_.tokens[static_cast<std::size_t>(s)]), -1);
  // The first row of a token on this rank is that of its lowest slot here.
  std::vector<std::vector<int>> slots;
  for (int s = 0; s < c_.ranks; ++s)
    slots.emplace_back(static_cast<std::size_t>(c_.tokens[static_cast<std::size_t>(s)]), c_.topk);
  for (const Arrival& a : own().arrivals) {
    int& lowest = slots[static_cast<std::size_t>(a.source)][static_cast<std::size_t>(a.token)];
    if (a.slot < lowest) {
      lowest = a.slot;
      primaries[static_cast<std::size_t>(a.source)][static_cast<std::size_t>(a.token)] = a.row;
    }
  }
  for (const Arrival& a : own().arrivals) {
    const fuscoTicket_t& ticket = tickets[static_cast<std::size_t>(a.row)];
    used[static_cast<std::size_t>(a.row)] = 1;
    if (ticket.source != a.source || ticket.token != a.token || ticket.slot != a.slot) report("ticket of row ", a.row);
    if (c_.layout != fuscoLayoutRankOrder && ticket.weight != weightOf(a.source, a.token, a.slot))
      report("weight in the ticket of row ", a.row);
    if (ticket.primary != primaries[static_cast<std::size_t>(a.source)][static_cast<std::size_t>(a.token)]) {
      report("primary in the ticket of row ", a.row, " is ", ticket.primary);
    }
  }
  for (std::int64_t row = 0; row < own().rows; ++row) {
    if (!used[static_cast<std::size_t>(row)] && tickets[static_cast<std::size_t>(row)].source != -1)
      report("a ticket for row ", row, ", where no row belongs");
  }
}

void CaseRun::checkRankOrder() {
  const std::int32_t* idsThere = nullptr;
  const float* weightsThere = nullptr;
  FUSCO_OK(fuscoPlanRankOrder(plan_, &idsThere, &weightsThere));
  const auto slots = static_cast<std::size_t>(own().rows * c_.topk);
  const auto localIds = brought(idsThere, slots);
  const auto weights = brought(weightsThere, slots);
  for (const Arrival& a : own().arrivals) {
    for (int k = 0; k < c_.topk; ++k) {
      const std::int64_t id =
          c_.ids[static_cast<std::size_t>(a.source)][static_cast<std::size_t>(a.token * c_.topk + k)];
      const std::int64_t local = id - c_.firstExpert(rank_);
      const bool here = id >= 0 && local >= 0 && local < c_.localExperts(rank_);
      const auto got = static_cast<std::size_t>(a.row * c_.topk + k);
      if (localIds[got] != (here ? local : -1))
        report("local expert id of row ", a.row, " slot ", k, " is ", localIds[got]);
      if (weights[got] != (here ? weightOf(a.source, a.token, k) : 0)) report("weight of row ", a.row, " slot ", k);
    }
  }
}

// What lies beside the rows after a dispatch.
void CaseRun::checkBeside() {
  if (c_.tickets || c_.layout != fuscoLayoutExpertOrder) checkTickets();
  if ((c_.counters && c_.layout == fuscoLayoutExpertOrder) || c_.layout == fuscoLayoutSlotted) {
    const volatile std::uint64_t* there = nullptr;
    FUSCO_OK(fuscoPlanExpertCounters(plan_, &there));
    const auto counters = brought(const_cast<const std::uint64_t*>(there), own().rowsOfExpert.size());
    for (std::size_t e = 0; e < own().rowsOfExpert.size(); ++e) {
      if (static_cast<std::int64_t>(counters[e]) != own().rowsOfExpert[e])
        report("counter of expert ", e, " is ", counters[e]);
    }
  }
  if (c_.layout == fuscoLayoutRankOrder) checkRankOrder();
}

std::vector<float> CaseRun::numbers(int tensor, int rank, std::int64_t row) const {
  std::vector<std::uint8_t> bytes(elements_);
  fillRow(c_.seed, tensor, rank, row, bytes.data(), elements_);
  std::vector<float> values(elements_);
  // Sums of these are rounded at every step: their order shows in the bits.
  for (std::size_t i = 0; i < elements_; ++i)
    values[i] = roundElement(type_, (static_cast<float>(bytes[i]) - 128.0f) / 17.0f);
  return values;
}

void CaseRun::putRow(std::uint8_t* to, const std::vector<float>& values) const {
  for (std::size_t i = 0; i < elements_; ++i) putElement(type_, to, i, values[i]);
}

void CaseRun::combine(bool start) {
  const std::size_t rowBytes = elements_ * elementSize(type_);
  const std::size_t skew = c_.seed % 8 == 1 ? 2 : 0;
  expertRows_ = std::make_unique<Memory>(space_, static_cast<std::size_t>(held_) * rowBytes, c_.privateMemory, skew);
  combined_ = std::make_unique<Memory>(space_, static_cast<std::size_t>(tokens()) * rowBytes, c_.seed % 5 != 0, skew);
  bias_ = std::make_unique<Memory>(space_, static_cast<std::size_t>(tokens()) * rowBytes, true);
  for (const Arrival& a : own().arrivals) putRow(expertRows_->row(a.row, rowBytes), numbers(5, rank_, a.row));
  for (std::int64_t t = 0; t < tokens(); ++t) putRow(bias_->row(t, rowBytes), numbers(7, rank_, t));
  fuscoCombineArgs_t args = FUSCO_COMBINE_INIT;
  args.input = expertRows_->given();
  args.output = combined_->given();
  args.elements = elements_;
  args.datatype = type_;
  args.bias = biased_ ? bias_->given() : nullptr;
  args.weighted = weighted_;
  args.partialsFp32 = partialsFp32_;
  if (start) {
    FUSCO_OK(fuscoCombineStart(plan_, &args, space_.stream()));
  } else {
    FUSCO_OK(fuscoCombineEx(plan_, &args, space_.stream()));
  }
}

// Bit by bit: FP32 sums node by node, within a node by rank, then slot; another node's sum is rounded to the row's type
// before it is added, and so is that of a rank on another GPU where rows cross links once. And the bound that goes with
// it, against a sum in float64.
void CaseRun::checkCombine() {
  settle();
  combined_->fetch();
  const std::size_t rowBytes = elements_ * elementSize(type_);
  const double unit = type_ == fuscoFloat32 ? 0x1p-24 : type_ == fuscoBfloat16 ? 0x1p-8 : 0x1p-11;
  const int home = nodes_[static_cast<std::size_t>(rank_)];
  std::vector<int> order;
  for (std::int64_t t = 0; t < tokens() && !bad_; ++t) {
    const Place* places = places_.data() + t * c_.topk;
    order.clear();
    for (int k = 0; k < c_.topk; ++k) {
      if (places[k].rank >= 0) order.push_back(k);
    }
    const auto nodeOf = [&](int k) { return nodes_[static_cast<std::size_t>(places[k].rank)]; };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return nodeOf(a) != nodeOf(b) ? nodeOf(a) < nodeOf(b) : places[a].rank < places[b].rank;
    });
    std::vector<float> sum(elements_, 0.0f), partial;
    std::vector<double> exact(elements_, 0), scale(elements_, 0);
    if (biased_) {
      sum = numbers(7, rank_, t);
      for (std::size_t i = 0; i < elements_; ++i) exact[i] = sum[i], scale[i] = std::fabs(exact[i]);
    }
    for (std::size_t n = 0; n < order.size();) {
      const int node = nodeOf(order[n]), brings = bringsSum(places[order[n]].rank) ? places[order[n]].rank : -1;
      const bool rounded = node != home || brings >= 0;
      if (rounded) partial.assign(elements_, 0.0f);
      std::vector<float>& into = rounded ? partial : sum;
      for (; n < order.size() && nodeOf(order[n]) == node; ++n) {
        const int rank = places[order[n]].rank;
        if (rank != brings && (brings >= 0 || bringsSum(rank))) break;
        const Place& place = places[order[n]];
        const float weight = weighted_ ? weightOf(rank_, t, order[n]) : 1.0f;
        const std::vector<float> row = numbers(5, place.rank, place.row);
        for (std::size_t i = 0; i < elements_; ++i) {
          into[i] = std::fmaf(weight, row[i], into[i]);
          exact[i] += static_cast<double>(weight) * row[i];
          scale[i] += std::fabs(static_cast<double>(weight) * row[i]);
        }
      }
      if (!rounded) continue;
      for (std::size_t i = 0; i < elements_; ++i)
        sum[i] += partialsFp32_ ? partial[i] : roundElement(type_, partial[i]);
    }
    for (std::size_t i = 0; i < elements_; ++i) {
      const float got = getElement(type_, combined_->row(t, rowBytes), i);
      const float expected = roundElement(type_, sum[i]);
      if (got != expected) return report("combine of token ", t, " element ", i, " is ", got, ", expected ", expected);
      // The levels' roundings, and those of FP32 inside each sum.
      const double bound = (2 * unit + static_cast<double>(c_.topk + 2) * 0x1p-24) * scale[i] + 1e-30;
      if (!(std::fabs(got - exact[i]) <= bound))
        return report("combine of token ", t, " element ", i, " is off by ", got - exact[i]);
    }
  }
  if (!combined_->intactAround()) report("bytes around combine's output were written");
}

void CaseRun::backward() {
  const std::size_t rowBytes = elements_ * elementSize(type_);
  if (!expertRows_) combine(false);
  Memory gradient(space_, static_cast<std::size_t>(tokens()) * rowBytes, true);
  Memory inputGradient(space_, static_cast<std::size_t>(held_) * rowBytes, c_.privateMemory);
  const auto slots = static_cast<std::size_t>(tokens() * c_.topk);
  Memory dots(space_, slots * 4, true);
  for (std::int64_t t = 0; t < tokens(); ++t) putRow(gradient.row(t, rowBytes), numbers(6, rank_, t));
  fuscoCombineBackwardArgs_t args = FUSCO_COMBINE_BACKWARD_INIT;
  args.outputGradient = gradient.given();
  args.expertRows = expertRows_->given();
  args.inputGradient = inputGradient.given();
  args.weightGradient = static_cast<float*>(dots.given());
  args.elements = elements_;
  args.datatype = type_;
  FUSCO_OK(fuscoCombineBackward(plan_, &args, space_.stream()));
  settle();
  inputGradient.fetch();
  dots.fetch();
  std::vector<float> weightGradient(slots);
  if (slots > 0) std::memcpy(weightGradient.data(), dots.data(), slots * 4);
  for (const Arrival& a : own().arrivals) {
    const float weight = weightOf(a.source, a.token, a.slot);
    const std::vector<float> row = numbers(6, a.source, a.token);
    for (std::size_t i = 0; i < elements_; ++i) {
      const float got = getElement(type_, inputGradient.row(a.row, rowBytes), i);
      const float expected = roundElement(type_, weight * row[i]);
      if (got != expected)
        return report("input gradient of row ", a.row, " element ", i, " is ", got, ", expected ", expected);
    }
  }
  if (!inputGradient.intactAround()) report("bytes around the input gradient were written");
  for (std::int64_t t = 0; t < tokens(); ++t) {
    const std::vector<float> row = numbers(6, rank_, t);
    for (int k = 0; k < c_.topk; ++k) {
      const auto at = static_cast<std::size_t>(t * c_.topk + k);
      double dot = 0, scale = 0;
      if (places_[at].rank >= 0) {
        const std::vector<float> expert = numbers(5, places_[at].rank, places_[at].row);
        for (std::size_t i = 0; i < elements_; ++i) {
          dot += static_cast<double>(row[i]) * expert[i];
          scale += std::fabs(static_cast<double>(row[i]) * expert[i]);
        }
      }
      if (!(std::fabs(weightGradient[at] - dot) <= scale * 1e-5)) {
        return report("weight gradient of token ", t, " slot ", k, " is ", weightGradient[at], ", expected ", dot);
      }
    }
  }
  if (!dots.intactAround()) report("bytes around the weight gradient were written");
}

}  // namespace

void* Space::allocate(std::size_t bytes, bool isPrivate) {
  void* p = nullptr;
  if (isPrivate) {
    p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
  } else {
    FUSCO_OK(fuscoMemAlloc(&p, bytes));
  }
  return p;
}

void Space::release(void* pointer, bool isPrivate) {
  if (isPrivate) {
    std::free(pointer);
  } else {
    fuscoMemFree(pointer);
  }
}

void Space::read(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

void Space::write(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

std::string runRank(const Case& c, fuscoComm_t comm, int rank) {
  Space host;
  return runRank(c, comm, rank, host);
}

std::string runRank(const Case& c, fuscoComm_t comm, int rank, Space& space) {
  CaseRun run(c, comm, rank, space);
  // Twice: the first dispatch of a plan also brings its tickets, the second only rows.
  for (int round = 0; round < 2; ++round) {
    run.dispatch(false);
    run.checkDispatch();
  }
  run.checkBeside();
  run.combine(false);
  run.checkCombine();
  if (c.layout != fuscoLayoutRankOrder) run.backward();
  return run.wrong();
}

std::string runAround(const Case& kept, const std::vector<Case>& between, fuscoComm_t comm, int rank) {
  Space host;
  CaseRun run(kept, comm, rank, host);
  run.dispatch(false);
  run.checkDispatch();
  for (const Case& c : between) {
    const std::string wrong = runRank(c, comm, rank);
    if (!wrong.empty()) return wrong;
  }
  run.combine(false);
  run.checkCombine();
  run.dispatch(false);
  run.checkDispatch();
  run.checkBeside();
  if (kept.layout != fuscoLayoutRankOrder) run.backward();
  return run.wrong();
}

std::string runTwo(const Case& first, const Case& second, fuscoComm_t comm, int rank) {
  Space host;
  CaseRun a(first, comm, rank, host), b(second, comm, rank, host);
  a.dispatch(true);
  b.dispatch(true);
  a.finish();
  a.checkDispatch();
  a.checkBeside();
  a.combine(true);
  b.finish();
  b.checkDispatch();
  b.checkBeside();
  b.combine(true);
  a.finish();
  b.finish();
  a.checkCombine();
  b.checkCombine();
  return a.bad() ? a.wrong() : b.wrong();
}

}  // namespace fusco::test
