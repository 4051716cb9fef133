#include "engine/planning.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "plan/planner.h"

namespace fusco::engine {

void NodeScan::begin(std::uint64_t operation, int peerIndex, const Parameters& parameters, int statusCode,
                     int statusRank, const std::vector<std::int32_t>& sums, const std::vector<std::int32_t>& records,
                     const std::vector<std::size_t>& recordWords) {
  operation_ = operation;
  peerIndex_ = peerIndex;
  parameters_ = parameters;
  disagreement_.clear();
  distance_ = 1;
  mine_.assign(kHead + sums.size(), 0);
  mine_[0] = statusCode;
  mine_[1] = statusRank;
  std::memcpy(&mine_[kParameters], &parameters, sizeof parameters);
  std::copy(sums.begin(), sums.end(), mine_.begin() + kHead);
  recordsAt_ = mine_.size();
  recordWords_ = recordWords;
  mine_.insert(mine_.end(), records.begin(), records.end());
  prefix_ = suffix_ = mine_;
  expect();
}

// Words of the records of nodes [first, last).
std::size_t NodeScan::recordsOf(int first, int last) const {
  std::size_t words = 0;
  for (int node = std::max(0, first); node < std::min(engine_.topology().nodes(), last); ++node)
    words += recordWords_[static_cast<std::size_t>(node)];
  return words;
}

// A round begins: what comes from `distance_` nodes below is of so many nodes, and so from above.
void NodeScan::expect() {
  const int node = engine_.topology().nodeOf(engine_.fabric().rank());
  prefixSent_ = suffixSent_ = prefixReceived_ = suffixReceived_ = 0;
  prefixIn_.assign(recordsAt_ + recordsOf(node - 2 * distance_ + 1, node - distance_ + 1), 0);
  suffixIn_.assign(recordsAt_ + recordsOf(node + distance_, node + 2 * distance_), 0);
}

transport::PostedLink& NodeScan::homeLink(int peer) {
  return engine_.fabric().link(peer, channel_, engine_.topology().homePath(engine_.fabric().rank(), peer));
}

bool NodeScan::send(int node, const std::vector<std::int32_t>& vector, std::size_t& sent) {
  const int peer = engine_.topology().ranksOf(node)[static_cast<std::size_t>(peerIndex_)];
  transport::PostedLink& link = homeLink(peer);
  const std::size_t room = (link.slotBytes() - sliceHead(1, 0)) / 64 * 16;
  while (sent < vector.size()) {
    std::byte* slot = link.acquire();
    waitingFor_ = slot == nullptr ? peer : -1;
    if (slot == nullptr) return false;
    const std::size_t count = std::min(room, vector.size() - sent);
    Slice slice = layOutSlice(slot, SliceKind::counts, 1, 0, count * 4);
    slice.copies[0] = slice.copies[1] = {0, 0};
    slice.header->operation = operation_;
    slice.header->rowOffset = sent * 4;
    slice.header->source = engine_.fabric().rank();
    std::memcpy(slice.payload, vector.data() + sent, count * 4);
    sent += count;
    const std::size_t bytes = sliceBytes(1, 0, count * 4);
    link.post(bytes);
    engine_.statistics().wireBytes += bytes;
    ++engine_.statistics().wireSlices;
  }
  return true;
}

bool NodeScan::receive(int node, std::vector<std::int32_t>& into, std::size_t& received) {
  const int peer = engine_.topology().ranksOf(node)[static_cast<std::size_t>(peerIndex_)];
  transport::PostedLink& link = homeLink(peer);
  while (received < into.size()) {
    const std::byte* slot = link.peek();
    waitingFor_ = slot == nullptr ? peer : -1;
    if (slot == nullptr) return false;
    const Slice slice = readSlice(slot, link.slotBytes());
    const std::size_t count = slice.header->rowBytes / 4;
    if (slice.kind() != SliceKind::counts || slice.header->operation != operation_ ||
        slice.header->rowOffset != received * 4 || received + count > into.size()) {
      if (slice.kind() == SliceKind::counts && slice.header->rowOffset == 0 && count >= kHead) {
        const std::vector<std::int32_t> head(reinterpret_cast<const std::int32_t*>(slice.payload),
                                             reinterpret_cast<const std::int32_t*>(slice.payload) + kHead);
        compare(node, head);
        if (!disagreement_.empty()) fail(Code::invalidUsage, disagreement_);
      }
      fail(Code::invalidUsage, fmt::format("rank {}: {} sent counts of plan operation {} that do not fit this rank's "
                                           "operation {}; all ranks must make the same "
                                           "plans (experts, topk, layout) in the same order",
                                           engine_.fabric().rank(), engine_.fabric().describeRank(peer),
                                           slice.header->operation, operation_));
    }
    std::memcpy(into.data() + received, slice.payload, count * 4);
    received += count;
    link.release();
  }
  return true;
}

// A failure goes both ways, so that every node hears of it.
void NodeScan::mergeStatus(const std::vector<std::int32_t>& from) {
  for (auto* into : {&prefix_, &suffix_}) {
    if (from[0] != 0 && ((*into)[0] == 0 || from[1] < (*into)[1])) {
      (*into)[0] = from[0];
      (*into)[1] = from[1];
    }
  }
}

// If any two nodes differ, two neighbours do, which meet in the first round.
void NodeScan::compare(int node, const std::vector<std::int32_t>& from) {
  Parameters theirs;
  std::memcpy(static_cast<void*>(&theirs), &from[kParameters], sizeof theirs);
  const int peer = engine_.topology().ranksOf(node)[static_cast<std::size_t>(peerIndex_)];
  const std::string difference = differingParameter(parameters_, theirs, engine_.fabric().rank(), peer);
  if (difference.empty()) return;
  disagreement_ = fmt::format("plan: {}; all ranks must make the same plans in the same order", difference);
  mergeStatus({static_cast<std::int32_t>(Code::invalidUsage), engine_.fabric().rank()});
}

Outcome NodeScan::advance() {
  const int nodes = engine_.topology().nodes();
  const int node = engine_.topology().nodeOf(engine_.fabric().rank());
  bool moved = false;
  while (distance_ < nodes) {
    const int up = node + distance_;
    const int down = node - distance_;
    const std::size_t before = prefixSent_ + suffixSent_ + prefixReceived_ + suffixReceived_;
    bool complete = true;
    if (up < nodes) complete &= send(up, prefix_, prefixSent_) & receive(up, suffixIn_, suffixReceived_);
    if (down >= 0) complete &= send(down, suffix_, suffixSent_) & receive(down, prefixIn_, prefixReceived_);
    moved |= prefixSent_ + suffixSent_ + prefixReceived_ + suffixReceived_ != before;
    if (!complete) return moved ? Outcome::moved : Outcome::idle;
    if (down >= 0) {
      if (distance_ == 1) compare(down, prefixIn_);
      mergeStatus(prefixIn_);
      for (std::size_t i = kHead; i < recordsAt_; ++i) prefix_[i] += prefixIn_[i];
      prefix_.insert(prefix_.begin() + static_cast<std::ptrdiff_t>(recordsAt_),
                     prefixIn_.begin() + static_cast<std::ptrdiff_t>(recordsAt_), prefixIn_.end());
    }
    if (up < nodes) {
      if (distance_ == 1) compare(up, suffixIn_);
      mergeStatus(suffixIn_);
      for (std::size_t i = kHead; i < recordsAt_; ++i) suffix_[i] += suffixIn_[i];
      suffix_.insert(suffix_.end(), suffixIn_.begin() + static_cast<std::ptrdiff_t>(recordsAt_), suffixIn_.end());
    }
    distance_ *= 2;
    expect();
  }
  return Outcome::complete;
}

std::vector<std::int32_t> NodeScan::before() const {
  std::vector<std::int32_t> result(prefix_.begin() + kHead, prefix_.begin() + static_cast<std::ptrdiff_t>(recordsAt_));
  for (std::size_t i = 0; i < result.size(); ++i) result[i] -= mine_[i + kHead];
  return result;
}

std::vector<std::int32_t> NodeScan::total() const {
  std::vector<std::int32_t> result = before();
  for (std::size_t i = 0; i < result.size(); ++i) result[i] += suffix_[i + kHead];
  return result;
}

std::vector<std::int32_t> NodeScan::records() const {
  std::vector<std::int32_t> all(prefix_.begin() + static_cast<std::ptrdiff_t>(recordsAt_), prefix_.end());
  const std::size_t own = recordWords_[static_cast<std::size_t>(engine_.topology().nodeOf(engine_.fabric().rank()))];
  all.insert(all.end(), suffix_.begin() + static_cast<std::ptrdiff_t>(recordsAt_ + own), suffix_.end());
  return all;
}

int NodeScan::statusCode() const { return prefix_[0]; }
int NodeScan::statusRank() const { return prefix_[1]; }

Planning::Planning(Engine& engine, std::shared_ptr<PlanState> plan)
    : Operation(OperationKind::plan),
      engine_(engine),
      plan_(std::move(plan)),
      exchanges_(plan_->request.options.layout != plan::Layout::slotted),
      counts_(engine, slot_),
      sums_(engine, slot_),
      scan_(engine) {
  const plan::Topology& topology = engine.topology();
  parts_ = engine.nodeRanks();
  for (int node = 0; node < topology.nodes(); ++node)
    parts_ = std::min(parts_, static_cast<int>(topology.ranksOf(node).size()));
  for (int rank = 1; rank < topology.ranks(); ++rank)
    nodesInOrder_ &= topology.nodeOf(rank) >= topology.nodeOf(rank - 1);
  keys_ = static_cast<std::size_t>(plan::keyCount(plan_->request.map, topology, plan_->request.options));
  if (exchanges_ && plan_->request.slot < 0) recordWords_ = engine.balancer().recordWords();
  const auto add = [&](StepKind kind, int stage) {
    program_.push_back({kind, static_cast<std::uint8_t>(stage), static_cast<std::uint8_t>(stage), 0});
  };
  add(StepKind::ready, 0);
  if (exchanges_) {
    add(StepKind::waitReady, 1);
    if (acrossNodes()) add(StepKind::put, 2);
  }
  add(StepKind::finish, 3);
  if (exchanges_) add(StepKind::waitDone, 4);
}

void Planning::takePlace() {
  slot_ = plan_->request.slot >= 0 ? plan_->request.slot : engine_.takeSlot();
  counts_.setChannel(slot_);
  sums_.setChannel(slot_);
  scan_.setChannel(slot_);
  plan_->number = plan_->request.slot >= 0 ? engine_.nextPlanNumber() : engine_.turn();
}

std::string Planning::describe() const {
  std::string text = fmt::format("plan {}", plan_->number);
  const int missing = counts_.missing() >= 0 ? counts_.missing()
                      : sums_.missing() >= 0 ? sums_.missing()
                                             : scan_.waitingFor();
  if (missing >= 0) text += fmt::format(", waiting for {}", engine_.fabric().describeRank(missing));
  return text;
}

void Planning::reset() {
  if (exchanges_) {
    counts_.begin();
    if (acrossNodes()) sums_.begin();
  }
  scanning_ = announcedSums_ = false;
  failure_.clear();
  failed_ = nullptr;
  plan_->dispatched = false;
  records_.clear();
  if (balanced()) plan_->routes = engine_.balancer().current();
}

// A plan that is bound to a slot has no place in the order of the others, and copies of one token must not part on
// their way to one node: such plans keep to the default flows.
bool Planning::balanced() const { return plan_->request.slot < 0 && plan_->request.options.dedup != plan::Dedup::none; }

Outcome Planning::run(const Step& step) {
  StageTimer timer(engine_.statistics().planNs);
  switch (step.kind) {
    case StepKind::ready:
      return announceCounts();
    case StepKind::waitReady:
      return counts_.allReady(kind()) ? Outcome::complete : Outcome::idle;
    case StepKind::put:
      return scanNodes();
    case StepKind::finish:
      return plan();
    case StepKind::waitDone:
      return finish();
    default:
      return Outcome::complete;
  }
}

Parameters Planning::parameters() const {
  const PlanRequest& r = plan_->request;
  Parameters p;
  p.kind = static_cast<std::uint64_t>(kind());
  p.planNumber = plan_->number;
  p.experts = static_cast<std::uint64_t>(r.map.experts);
  p.topk = static_cast<std::uint64_t>(r.map.topk);
  p.layout = static_cast<std::uint64_t>(r.options.layout);
  p.alignment = static_cast<std::uint64_t>(r.options.alignment);
  p.capacity = static_cast<std::uint64_t>(r.options.capacityRows);
  p.maxTokens = static_cast<std::uint64_t>(r.options.maxTokens);
  p.options = (r.dropBeyondCapacity ? 1u : 0u) | (r.dedupAuto ? 2u : 0u) |
              static_cast<std::uint64_t>(r.options.dedup) << 2 | plan_->topology().version() << 8;
  return p;
}

void Planning::copyRouting() {
  PlanState& p = *plan_;
  const plan::RoutingMap& from = p.request.map;
  const auto slots = static_cast<std::size_t>(from.tokens) * static_cast<std::size_t>(from.topk);
  std::memcpy(p.ids.data(), from.ids, slots * static_cast<std::size_t>(from.idBytes));
  if (from.weights != nullptr) std::memcpy(p.weights.data(), from.weights, slots * 4);
}

std::size_t Planning::partBegin(int part) const {
  return keys_ * static_cast<std::size_t>(part) / static_cast<std::size_t>(parts_);
}

// Window of a rank: counts [keys], then of its part only: all ranks' sums [keys], and the lower nodes' sums [keys], or
// where nodes do not hold ranks in order, the lower ranks' sums of each rank of the node [node's ranks, keys]. Then
// this rank's record for the balancer, and its part of all ranks' records.
const std::int32_t* Planning::published(const Meeting& meeting, int localIndex) const {
  return reinterpret_cast<const std::int32_t*>(
      engine_.fabric().reach(engine_.nodeRank(localIndex), meeting.ready(localIndex).memory[kExtra]));
}

Outcome Planning::announceCounts() {
  PlanState& p = *plan_;
  Meeting::Announcement a;
  a.parameters = parameters();
  try {
    if (p.request.map.tokens > 0) copyRouting();
    engine_.planner().use(p.topology());
    engine_.planner().analyse(p.kept(), p.request.options, p.analysis);
  } catch (const Error& e) {
    if (!exchanges_) throw CommonError(e.code(), e.what());
    a.status = static_cast<std::uint32_t>(e.code());
    failure_ = e.what();
    p.analysis.rowsOfKey.assign(keys_, 0);
    p.analysis.copiesOfNode.assign(static_cast<std::size_t>(engine_.topology().nodes()), 0);
  }
  if (!exchanges_) return Outcome::complete;
  WindowBuffer& window = engine_.countsWindow(slot_);
  const std::size_t words = countWords() + (recordWords_ > 0 ? recordWords_ + recordsOfPart(engine_.localIndex()) : 0);
  auto* counts = reinterpret_cast<std::int32_t*>(window.need(std::max<std::size_t>(4096, words * 4)));
  std::memcpy(counts, p.analysis.rowsOfKey.data(), keys_ * 4);
  if (recordWords_ > 0) engine_.balancer().fillRecord(p.analysis.copiesOfNode, counts + countWords());
  a.memory[kExtra] = engine_.fabric().describe(window.data(), window.size());
  counts_.announce(a);
  return Outcome::complete;
}

void Planning::beginScan() {
  const int self = engine_.localIndex();
  const std::size_t begin = partBegin(self);
  const std::size_t count = partBegin(self + 1) - begin;
  const std::size_t tables = nodesInOrder_ ? 1 : static_cast<std::size_t>(engine_.topology().ranks());
  std::vector<std::int32_t> sums(count * tables, 0);
  int code = 0;
  int failed = 0;
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    const std::int32_t* counts = published(counts_, i) + begin;
    std::int32_t* into = sums.data() + (nodesInOrder_ ? 0 : count * static_cast<std::size_t>(engine_.nodeRank(i)));
    for (std::size_t k = 0; k < count; ++k) into[k] += counts[k];
    if (code == 0 && counts_.ready(i).status != 0) {
      code = static_cast<int>(counts_.ready(i).status);
      failed = engine_.nodeRank(i);
    }
  }
  std::vector<std::int32_t> records;
  std::vector<std::size_t> recordWords(static_cast<std::size_t>(engine_.topology().nodes()), 0);
  if (recordWords_ > 0) {
    for (int node = 0; node < engine_.topology().nodes(); ++node) {
      recordWords[static_cast<std::size_t>(node)] =
          recordWords_ * static_cast<std::size_t>(recordBegin(node, self + 1) - recordBegin(node, self));
    }
    const int node = engine_.topology().nodeOf(engine_.fabric().rank());
    for (int i = recordBegin(node, self); i < recordBegin(node, self + 1); ++i) {
      const std::int32_t* record = published(counts_, i) + countWords();
      records.insert(records.end(), record, record + recordWords_);
    }
  }
  scan_.begin(counts_.sequence(), self, parameters(), code, failed, sums, records, recordWords);
}

// Members of a node whose records part `part` gathers: local indices from here to that of the next part.
int Planning::recordBegin(int node, int part) const {
  return static_cast<int>(engine_.topology().ranksOf(node).size()) * part / parts_;
}

std::size_t Planning::recordsOfPart(int part) const {
  if (part >= parts_) return 0;
  int records = 0;
  for (int node = 0; node < engine_.topology().nodes(); ++node)
    records += recordBegin(node, part + 1) - recordBegin(node, part);
  return recordWords_ * static_cast<std::size_t>(records);
}

void Planning::readRecords() {
  if (recordWords_ == 0) return;
  const plan::Topology& topology = engine_.topology();
  records_.resize(recordWords_ * static_cast<std::size_t>(topology.ranks()));
  for (int part = 0; part < parts_; ++part) {
    const std::int32_t* from = published(sums_, part) + countWords() + recordWords_;
    for (int node = 0; node < topology.nodes(); ++node) {
      for (int i = recordBegin(node, part); i < recordBegin(node, part + 1); ++i, from += recordWords_) {
        const int rank = topology.ranksOf(node)[static_cast<std::size_t>(i)];
        std::copy_n(from, recordWords_, records_.begin() + static_cast<std::ptrdiff_t>(recordWords_) * rank);
      }
    }
  }
}

void Planning::publishSums() {
  const std::size_t begin = partBegin(engine_.localIndex());
  const std::size_t count = partBegin(engine_.localIndex() + 1) - begin;
  auto* total = engine_.countsWindow(slot_).as<std::int32_t>() + keys_ + begin;
  auto* before = total + keys_;
  const std::vector<std::int32_t> sums = scan_.total();
  const std::vector<std::int32_t> records = scan_.records();
  std::copy(records.begin(), records.end(),
            engine_.countsWindow(slot_).as<std::int32_t>() + countWords() + recordWords_);
  if (nodesInOrder_) {
    const std::vector<std::int32_t> lower = scan_.before();
    std::copy(sums.begin(), sums.end(), total);
    std::copy(lower.begin(), lower.end(), before);
    return;
  }
  std::fill_n(total, count, 0);
  for (int rank = 0; rank < engine_.topology().ranks(); ++rank) {
    if (engine_.topology().nodeOf(rank) == engine_.topology().nodeOf(engine_.fabric().rank())) {
      std::copy_n(total, count, before + keys_ * static_cast<std::size_t>(engine_.topology().localIndex(rank)));
    }
    for (std::size_t k = 0; k < count; ++k) total[k] += sums[count * static_cast<std::size_t>(rank) + k];
  }
}

Outcome Planning::scanNodes() {
  const int self = engine_.localIndex();
  if (self < parts_ && !scanning_) {
    beginScan();
    scanning_ = true;
  }
  if (!announcedSums_) {
    Meeting::Announcement a;
    a.parameters = parameters();
    if (self < parts_) {
      const Outcome outcome = scan_.advance();
      if (outcome != Outcome::complete) return outcome;
      publishSums();
      a.status = static_cast<std::uint32_t>(scan_.statusCode());
      a.bytes = static_cast<std::uint64_t>(scan_.statusRank());
    }
    a.memory[kExtra] =
        engine_.fabric().describe(engine_.countsWindow(slot_).data(), engine_.countsWindow(slot_).size());
    sums_.announce(a);
    announcedSums_ = true;
  }
  return sums_.allReady(kind()) ? Outcome::complete : Outcome::idle;
}

void Planning::readExchanged() {
  plan::Exchanged& x = plan_->exchanged;
  x.before.assign(keys_, 0);
  x.total.assign(keys_, 0);
  if (!acrossNodes() || nodesInOrder_) {
    for (int i = 0; i < engine_.nodeRanks(); ++i) {
      const std::int32_t* counts = published(counts_, i);
      const bool lower = i < engine_.localIndex();
      for (std::size_t k = 0; k < keys_; ++k) {
        x.total[k] += counts[k];
        if (lower) x.before[k] += counts[k];
      }
    }
  }
  if (!acrossNodes()) return;
  for (int part = 0; part < parts_; ++part) {
    const std::int32_t* total = published(sums_, part) + keys_;
    const std::int32_t* before =
        total + keys_ * (nodesInOrder_ ? 1 : 1 + static_cast<std::size_t>(engine_.localIndex()));
    for (std::size_t k = partBegin(part); k < partBegin(part + 1); ++k) {
      x.before[k] += before[k];
      x.total[k] = total[k];
    }
  }
}

void Planning::checkCapacity() {
  const plan::Options& options = plan_->request.options;
  if (options.capacityRows == 0 || plan_->request.dropBeyondCapacity || !exchanges_) return;
  const plan::Topology& topology = engine_.topology();
  const int experts = plan_->request.map.experts;
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    std::int64_t rows = 0;
    if (options.layout == plan::Layout::rankOrder) {
      rows = plan_->exchanged.total[static_cast<std::size_t>(rank)];
    } else {
      const int first = topology.firstExpert(rank, experts);
      for (int e = first; e < first + topology.expertsOf(rank, experts); ++e) {
        const std::int64_t a = options.alignment;
        rows += (plan_->exchanged.total[static_cast<std::size_t>(e)] + a - 1) / a * a;
      }
    }
    if (rows > options.capacityRows) {
      failLater(Code::invalidArgument,
                fmt::format("rank {} needs {} rows, has {}: raise capacityRows, or choose fuscoCapacityDrop", rank,
                            rows, options.capacityRows));
      return;
    }
  }
}

// An error that all ranks share is thrown when all have read what they need of this rank's window, not before: the next
// plan writes there.
void Planning::failLater(Code code, const std::string& text) {
  failed_ = std::make_exception_ptr(CommonError(code, text));
}

Outcome Planning::finish() {
  if (!counts_.allDone()) return Outcome::idle;
  if (!records_.empty()) engine_.balancer().learn(records_);
  if (failed_) std::rethrow_exception(failed_);
  return Outcome::complete;
}

Outcome Planning::plan() {
  PlanState& p = *plan_;
  if (exchanges_) {
    int code = 0;
    int rank = -1;
    if (acrossNodes()) {
      for (int part = 0; part < parts_ && code == 0; ++part) {
        code = static_cast<int>(sums_.ready(part).status);
        rank = static_cast<int>(sums_.ready(part).bytes);
      }
    } else {
      for (int i = 0; i < engine_.nodeRanks() && code == 0; ++i) {
        code = static_cast<int>(counts_.ready(i).status);
        rank = engine_.nodeRank(i);
      }
    }
    if (code == 0) {
      readExchanged();
      readRecords();
    }
    counts_.sayDone();
    if (failure_.empty()) failure_ = scan_.disagreement();
    if (!failure_.empty()) {
      failLater(static_cast<Code>(code), failure_);
    } else if (code == static_cast<int>(Code::invalidUsage)) {
      failLater(
          Code::invalidUsage,
          fmt::format("plan {}: ranks of different nodes gave different parameters, {} tells which; nothing was moved",
                      p.number, engine_.fabric().describeRank(rank)));
    } else if (code != 0) {
      failLater(static_cast<Code>(code),
                fmt::format("plan {}: {} could not read its routing map; its own error says why. Nothing was moved",
                            p.number, engine_.fabric().describeRank(rank)));
    } else {
      checkCapacity();
    }
    if (failed_) return Outcome::complete;
  }
  try {
    engine_.planner().use(p.topology());
    p.arena.need(engine_.planner().arenaBytes(p.kept(), p.request.options));
    engine_.planner().makePlan(p.kept(), p.request.options, p.analysis, p.exchanged, p.arena.data());
  } catch (const Error& e) {
    // It follows from what all ranks have exchanged: all of them see it.
    throw CommonError(e.code(), e.what());
  }
  p.view = plan::view(p.arena.data());
  if (!exchanges_ && p.view.header->dropped > 0 && !p.request.dropBeyondCapacity) {
    const std::int64_t capacity = p.request.options.capacityRows;
    throw CommonError(
        Code::invalidArgument,
        fmt::format("rank {}: {} rows have no slot, with capacityRows {} and maxTokens {}: {}raise maxTokens where "
                    "tokens name an expert more than once, or choose fuscoCapacityDrop",
                    engine_.fabric().rank(), p.view.header->dropped, capacity, p.request.options.maxTokens,
                    capacity > 0 ? "set capacityRows to 0, " : ""));
  }
  prepare();
  return Outcome::complete;
}

void Planning::prepare() {
  if (plan_->request.options.layout == plan::Layout::rankOrder) plan_->packRankOrder();
  plan_->prepareWindows();
}

std::unique_ptr<Operation> makePlanning(Engine& engine, std::shared_ptr<PlanState> plan) {
  return std::make_unique<Planning>(engine, std::move(plan));
}

}  // namespace fusco::engine
