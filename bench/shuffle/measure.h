// Runs a case: prepares and checks every implementation, lets them take turns, and makes rows of what was seen.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "shuffle/harness.h"
#include "shuffle/implementation.h"

namespace fusco::bench {

struct Row {
  std::string impl;
  Case which;
  std::int64_t bytes = 0;  // delivered to the busiest rank
  std::int64_t count = 0;  // of rows (dispatch, combine) or elements in them
  double p50Us = 0, p99Us = 0;
  double algbw = 0, busbw = 0;    // GB/s
  double limit = 0, ofLimit = 0;  // the limit's algbw; this row's share of it
  std::uint64_t wrong = 0;
  bool checked = false;
  double planUs = 0, extractUs = 0, wireUs = 0, placeUs = 0, sumUs = 0,
         waitUs = 0;                                 // of the slowest rank, an iteration
  double wireBytes = 0;                              // of all ranks, an iteration
  std::uint64_t acrossBytes = 0, acrossBusiest = 0;  // see CaseSize
  std::vector<double> roundP50Us;
  // Rows of the limit only.
  std::string stores;                                // which stores were the best
  double readGbps = 0, writeGbps = 0, fillGbps = 0;  // of all ranks together; of the plain non-temporal fill
  double wireAloneUs = 0;                            // with --net tcp: what crosses between nodes, and nothing else
  // Rows of GPUs only: figures by name (parts in microseconds, rates), and what a reader must know.
  std::vector<std::pair<std::string, double>> figures;
  std::string remark;
};

struct CaseResult {
  std::vector<Row> rows;             // the limit first
  std::vector<std::string> remarks;  // what could not run, and why
  bool failed = false;               // something that was there has failed
};

// What the size columns of a case say, from the naive shuffle alone.
struct CaseSize {
  std::int64_t bytes = 0, count = 0;
  double remoteShare = 0;                          // of the busiest rank's bytes: from other ranks
  std::uint64_t windowBytes = 0, outputBytes = 0;  // a rank's, for the limit
  std::uint64_t readBytes = 0, writtenBytes = 0;   // by all ranks together
  std::uint64_t memoryBytes = 0;                   // of all implementations together, an upper estimate
  // One row for each token and other node that it goes to: by all ranks together; out of or into the busiest node.
  std::uint64_t acrossBytes = 0, acrossBusiest = 0;
};
CaseSize sizeOf(const CaseContext& context, const std::vector<std::string>& impls);

// Whether an implementation can carry out an operation.
bool carriesOut(const std::string& impl, Op op);
double percentile(std::vector<double> values, double share);
double machineFreeBytes();

class Measurer {
 public:
  Measurer(Harness& harness, const Options& options) : harness_(harness), options_(options) {}
  // Of `options.impls`, those that are there.
  void setImpls(std::vector<std::string> impls) { impls_ = std::move(impls); }
  CaseResult measure(std::uint32_t caseIndex, const Case& which, const CaseSize& size);

 private:
  struct Sample {
    std::string impl;
    int group;
    std::vector<double> us;
    std::vector<double> roundP50;
    std::vector<Stages> stages;  // [ranks], summed over rounds
    std::uint64_t wrong = 0;
    bool dead = false;
  };
  // Runs a step for one implementation; a failure of the peers is noted, one of our own ranks is thrown on.
  bool step(Sample& sample, Step what, std::uint32_t caseIndex, CaseResult& result);
  void collect(Sample& sample);
  Row rowOf(const Sample& sample, const Case& which, const CaseSize& size) const;

  Harness& harness_;
  const Options& options_;
  std::vector<std::string> impls_;
  bool peersDead_ = false;
};

}  // namespace fusco::bench
