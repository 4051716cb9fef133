// A random shuffle, its oracle, and how it is run by ranks that are threads of this process.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fusco/fusco.h"

namespace fusco::test {

// What is shuffled. Everything follows from the seed and the shape.
struct Case {
  std::uint64_t seed = 0;
  int ranks = 2;
  int experts = 8;
  int topk = 2;
  std::vector<std::int64_t> tokens;            // by rank
  std::vector<std::vector<std::int64_t>> ids;  // by rank [tokens * topk]
  std::vector<std::vector<float>> weights;
  bool int32Ids = false;
  int layout = fuscoLayoutExpertOrder;
  int alignment = 1;
  int zeroFill = 0;
  int dedup = fuscoDedupAuto;
  std::int64_t maxTokens = 0;
  std::int64_t capacityRows = 0;  // what is beyond it is dropped
  std::size_t rowBytes = 64;
  std::size_t rowBytes2 = 0;
  bool tickets = false;
  bool counters = false;
  bool privateMemory = false;

  std::string describe() const;
  int firstExpert(int rank) const;
  int localExperts(int rank) const;
  int rankOfExpert(int expert) const;
};

Case randomCase(std::uint64_t seed, int ranks, std::int64_t mostTokens = 40);
// One whose routing maps are long, so that many blocks of a GPU plan them; its rows are short.
Case longCase(std::uint64_t seed, int ranks);
// What tests on GPUs run: every eighth is long.
Case gpuCase(std::uint64_t seed, int ranks);

// A row that arrives: who sent it, and where it belongs. Computed naively from all routing maps.
struct Arrival {
  int source;
  std::int64_t token;
  int slot;
  std::int64_t row;
  int localExpert;
};
struct Expected {
  std::int64_t rows = 0;  // of the output
  std::vector<Arrival> arrivals;
  std::vector<std::int64_t> rowsOfExpert;  // by local expert
  std::vector<std::int64_t> dropped;       // by source: rows beyond the capacity of this rank
};
Expected expectedAt(const Case& c, int rank);

// The bytes of row `row` of a rank in a tensor of the test: 0 and 1 are what is sent, others are the tests' own.
void fillRow(std::uint64_t seed, int tensor, int rank, std::int64_t row, std::uint8_t* bytes, std::size_t count);

// Runs body(rank) in as many threads; rethrows the first failure.
void runThreads(int ranks, const std::function<void(int)>& body);

struct CallFailed : std::runtime_error {
  CallFailed(fuscoResult_t result, const std::string& text) : std::runtime_error(text), code(result) {}
  fuscoResult_t code;
};
// Throws CallFailed with the library's text unless fuscoSuccess.
void ok(fuscoResult_t result, const char* what);
#define FUSCO_OK(call) ::fusco::test::ok((call), #call)

// Where the tensors of a case lie. What the host cannot look at (direct() is false) is copied there and back.
class Space {
 public:
  virtual ~Space() = default;
  virtual void* allocate(std::size_t bytes, bool isPrivate);
  virtual void release(void* pointer, bool isPrivate);
  virtual cudaStream_t stream() { return nullptr; }
  virtual void settle() {}
  virtual void read(void* to, const void* from, std::size_t bytes);
  virtual void write(void* to, const void* from, std::size_t bytes);
  virtual bool direct() const { return true; }
  virtual bool gpu() const { return false; }
  // Whether the ranks are on different GPUs, and launch together: sums may cross the link instead of rows.
  virtual bool apart(int, int) const { return false; }
};

// One rank's part of a case on a communicator: plan, dispatch, combine, backward, all checked. Returns an empty string
// or what is wrong.
std::string runRank(const Case& c, fuscoComm_t comm, int rank);
std::string runRank(const Case& c, fuscoComm_t comm, int rank, Space& space);
// How many cases of a shape or world a test runs, and from which number on. FUSCO_TEST_SEED repeats one of them; else
// FUSCO_TEST_CASES and FUSCO_TEST_FIRST say it, else `cases` from 0. Prints the seeds.
struct Cases {
  Cases(std::int64_t cases, int offset);
  std::uint64_t seed(std::int64_t i) const;
  std::int64_t count;

 private:
  std::int64_t first_;
  std::int64_t only_;
  int offset_;
};

// Two cases at once, as two micro-batches: each one's dispatch and combine are started while the other's are under way.
std::string runTwo(const Case& first, const Case& second, fuscoComm_t comm, int rank);

// One case whose plan is used again after others were planned and run.
std::string runAround(const Case& kept, const std::vector<Case>& between, fuscoComm_t comm, int rank);

}  // namespace fusco::test
