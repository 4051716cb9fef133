#include "engine/meeting.h"

#include <fmt/format.h>

#include "base/status.h"
#include "engine/engine.h"

namespace fusco::engine {

namespace {

struct Field {
  const char* name;
  std::uint64_t Parameters::*value;
};

constexpr Field kFields[] = {
    {"operation", &Parameters::kind},
    {"row bytes", &Parameters::rowBytes},
    {"second row bytes", &Parameters::rowBytes2},
    {"data type", &Parameters::type},
    {"experts", &Parameters::experts},
    {"topk", &Parameters::topk},
    {"layout", &Parameters::layout},
    {"alignment", &Parameters::alignment},
    {"capacity rows", &Parameters::capacity},
    {"max tokens", &Parameters::maxTokens},
    {"plan", &Parameters::planNumber},
    {"options", &Parameters::options},
};

}  // namespace

std::uint64_t hashOf(const Parameters& parameters) {
  std::uint64_t hash = 0x9e3779b97f4a7c15ull;
  for (const Field& field : kFields) {
    hash = (hash ^ parameters.*field.value) * 0xff51afd7ed558ccdull;
    hash ^= hash >> 32;
  }
  return hash;
}

std::string differingParameter(const Parameters& mine, const Parameters& theirs, int myRank, int theirRank) {
  for (const Field& field : kFields) {
    const std::uint64_t a = mine.*field.value;
    const std::uint64_t b = theirs.*field.value;
    if (a == b) continue;
    const auto show = [&](std::uint64_t v) {
      return field.value == &Parameters::kind ? std::string(operationName(static_cast<OperationKind>(v)))
                                              : fmt::format("{}", v);
    };
    return fmt::format("rank {} has {} {}, rank {} has {}", myRank, field.name, show(a), theirRank, show(b));
  }
  return {};
}

void Meeting::begin() { sequence_ = engine_.nextSequence(channel_); }

void Meeting::announce(const Announcement& a) {
  const int count = engine_.nodeRanks();
  for (int i = 0; i < count; ++i) {
    const int rank = engine_.nodeRank(i);
    PeerCells& theirs = cells(engine_.fabric().control(rank), count, channel_, engine_.localIndex());
    ReadyCell& cell = theirs.ready[sequence_ % kCellDepth];
    cell.flags = a.flags;
    cell.status = a.status;
    cell.bytes = a.bytes;
    cell.rows = a.rows;
    cell.parameters = a.parameters;
    for (int m = 0; m < kMemoryRoles; ++m) cell.memory[m] = a.memory[m];
    cell.sequence.store(sequence_ + 1, std::memory_order_release);
    if (i != engine_.localIndex()) engine_.fabric().ring(rank);
  }
}

const ReadyCell& Meeting::ready(int localIndex) const {
  std::byte* mine = engine_.fabric().control(engine_.fabric().rank());
  return cells(mine, engine_.nodeRanks(), channel_, localIndex).ready[sequence_ % kCellDepth];
}

bool Meeting::awaitsReady(int rank) const {
  return ready(engine_.topology().localIndex(rank)).sequence.load(std::memory_order_acquire) < sequence_ + 1;
}

bool Meeting::awaitsDone(int rank) const {
  std::byte* mine = engine_.fabric().control(engine_.fabric().rank());
  const PeerCells& theirs = cells(mine, engine_.nodeRanks(), channel_, engine_.topology().localIndex(rank));
  return theirs.done[sequence_ % kCellDepth].sequence.load(std::memory_order_acquire) < sequence_ + 1;
}

bool Meeting::allReady(OperationKind kind) {
  const int count = engine_.nodeRanks();
  for (int i = 0; i < count; ++i) {
    if (ready(i).sequence.load(std::memory_order_acquire) < sequence_ + 1) {
      missing_ = engine_.nodeRank(i);
      return false;
    }
  }
  missing_ = -1;
  const Parameters& mine = ready(engine_.localIndex()).parameters;
  for (int i = 0; i < count; ++i) {
    if (i == engine_.localIndex()) continue;
    const std::string difference =
        differingParameter(mine, ready(i).parameters, engine_.fabric().rank(), engine_.nodeRank(i));
    if (difference.empty()) continue;
    const std::string text =
        fmt::format("{}: {}; all ranks must make the same calls with the same parameters in the same order",
                    operationName(kind), difference);
    // On several nodes the other nodes have not seen it: they are told by the abort that follows.
    if (engine_.topology().nodes() == 1) throw CommonError(Code::invalidUsage, text);
    fail(Code::invalidUsage, text);
  }
  return true;
}

void Meeting::sayDone() {
  const int count = engine_.nodeRanks();
  for (int i = 0; i < count; ++i) {
    const int rank = engine_.nodeRank(i);
    PeerCells& theirs = cells(engine_.fabric().control(rank), count, channel_, engine_.localIndex());
    theirs.done[sequence_ % kCellDepth].sequence.store(sequence_ + 1, std::memory_order_release);
    if (i != engine_.localIndex()) engine_.fabric().ring(rank);
  }
}

bool Meeting::allDone() {
  const int count = engine_.nodeRanks();
  std::byte* mine = engine_.fabric().control(engine_.fabric().rank());
  for (int i = 0; i < count; ++i) {
    const DoneCell& cell = cells(mine, count, channel_, i).done[sequence_ % kCellDepth];
    if (cell.sequence.load(std::memory_order_acquire) < sequence_ + 1) {
      missing_ = engine_.nodeRank(i);
      return false;
    }
  }
  missing_ = -1;
  return true;
}

}  // namespace fusco::engine
