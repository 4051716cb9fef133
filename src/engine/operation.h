// An operation under way: a program and how far it has come. Never blocks: advance() runs what can run. Drivers decide
// who calls it and when (engine.h: host driver; stream.h: stream driver).
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/program.h"

namespace fusco::engine {

enum class Outcome { idle, moved, complete };

// An error that every rank of the communicator meets at the same point, before anything was moved: the communicator
// stays usable.
class CommonError : public Error {
 public:
  using Error::Error;
};

class Operation {
 public:
  explicit Operation(OperationKind kind) : kind_(kind) {}
  virtual ~Operation() = default;
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  OperationKind kind() const { return kind_; }
  // Takes this operation's place in the order that all ranks share (its slot, its number). Once, when it is queued or
  // encoded: an operation that was made and dropped has taken nothing.
  void enter();
  // Takes its sequence and starts over; an operation may be run again and again (a replayed graph does).
  void begin();
  // Runs steps that can run; true if anything moved. Throws Error when the operation has failed.
  bool advance();
  // Runs the steps of one stage only, as a kernel of the stream driver does; complete when the stage is.
  Outcome advanceStage(int stage);
  // The stages that have steps, rising: known from the program alone.
  std::vector<int> stages() const;
  // After a failure: whoever reads this operation's counts finds none.
  virtual void clearCounts() {}
  // After a failure, under the engine's lock: operations that wait for this one need not any more.
  virtual void giveUp() {}
  bool complete() const { return openSteps_ == 0; }
  // Whether a step that may run has to do with slices: what is waited for then is a link, else a rank of the node.
  bool waitsForLinks() const;
  // Whether a step that may run needs something of this rank.
  bool waitsFor(int rank) const;
  // "dispatch 41, waiting for rank 3 (host:pid) to be ready"
  virtual std::string describe() const = 0;
  // Collective operations take turns on the operation slots, transfers have a channel of their own. Known once entered.
  virtual int channel() const = 0;

 protected:
  virtual void takePlace() {}
  virtual void reset() = 0;
  virtual Outcome run(const Step& step) = 0;
  // Whether a step that is not complete still needs something of this rank.
  virtual bool needs(const Step& /*step*/, int /*rank*/) const { return true; }
  Program program_;

 private:
  bool runSteps(int stageOnly);
  bool mayRun(const Step& step) const;

  OperationKind kind_;
  bool entered_ = false;
  std::vector<char> finished_;
  int openOfStage_[kStages] = {};
  int openSteps_ = 0;
};

}  // namespace fusco::engine
