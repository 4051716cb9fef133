#include "engine/operation.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <string>

#include "base/point.h"
#include "exec/ranges.h"

namespace fusco::engine {

namespace {

// What a profiler shows of a step: "dispatch: place".
const char* rangeName(OperationKind operation, StepKind step) {
  static constexpr const char* kSteps[] = {"ready",     "wait for ready", "put",  "extract",       "place",
                                           "send back", "receive back",   "done", "wait for done", "finish"};
  constexpr std::size_t kOperations = static_cast<std::size_t>(OperationKind::transfers) + 1;
  using Names = std::array<std::array<std::string, std::size(kSteps)>, kOperations>;
  static const Names names = [] {
    Names all;
    for (std::size_t o = 1; o < kOperations; ++o) {
      for (std::size_t s = 0; s < std::size(kSteps); ++s)
        all[o][s] = std::string(operationName(static_cast<OperationKind>(o))) + ": " + kSteps[s];
    }
    return all;
  }();
  return names[static_cast<std::size_t>(operation)][static_cast<std::size_t>(step)].c_str();
}

}  // namespace

void Operation::enter() {
  if (entered_) return;
  entered_ = true;
  takePlace();
}

void Operation::begin() {
  enter();
  reset();
  finished_.assign(program_.size(), 0);
  for (int& open : openOfStage_) open = 0;
  for (const Step& step : program_) ++openOfStage_[step.stage];
  openSteps_ = static_cast<int>(program_.size());
  passPoint(operationName(kind_), -1);
}

bool Operation::mayRun(const Step& step) const {
  for (int stage = 0; stage < step.needs; ++stage) {
    if (openOfStage_[stage] > 0) return false;
  }
  return true;
}

bool Operation::runSteps(int stageOnly) {
  bool moved = false;
  for (std::size_t i = 0; i < program_.size(); ++i) {
    const Step& step = program_[i];
    if (finished_[i] || (stageOnly >= 0 && step.stage != stageOnly) || !mayRun(step)) continue;
    const exec::Range range(rangeName(kind_, step.kind));
    const Outcome outcome = run(step);
    if (outcome == Outcome::idle) continue;
    moved = true;
    if (outcome == Outcome::complete) {
      finished_[i] = 1;
      --openOfStage_[step.stage];
      --openSteps_;
      if (openOfStage_[step.stage] == 0) passPoint(operationName(kind_), step.stage);
    }
  }
  return moved;
}

bool Operation::waitsForLinks() const {
  for (std::size_t i = 0; i < program_.size(); ++i) {
    const StepKind kind = program_[i].kind;
    const bool ofLinks = kind == StepKind::extract || kind == StepKind::place || kind == StepKind::sendBack ||
                         kind == StepKind::receiveBack;
    if (ofLinks && !finished_[i] && mayRun(program_[i])) return true;
  }
  return false;
}

bool Operation::waitsFor(int rank) const {
  for (std::size_t i = 0; i < program_.size(); ++i) {
    if (!finished_[i] && mayRun(program_[i]) && needs(program_[i], rank)) return true;
  }
  return false;
}

bool Operation::advance() { return runSteps(-1); }

Outcome Operation::advanceStage(int stage) {
  const bool moved = runSteps(stage);
  if (openOfStage_[stage] == 0) return Outcome::complete;
  return moved ? Outcome::moved : Outcome::idle;
}

std::vector<int> Operation::stages() const {
  std::vector<int> stages;
  for (int stage = 0; stage < kStages; ++stage) {
    const auto ofStage = [&](const Step& step) { return step.stage == stage; };
    if (std::any_of(program_.begin(), program_.end(), ofStage)) stages.push_back(stage);
  }
  return stages;
}

}  // namespace fusco::engine
