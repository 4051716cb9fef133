// Routing maps for the benchmark: synthetic ones and recorded ones. Everything is a pure function of the specification
// and the rank, so that every rank can make every other rank's map.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fusco::bench {

// A small generator of our own: the same numbers with every compiler and library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next();                      // splitmix64
  std::uint64_t below(std::uint64_t bound);  // uniform in [0, bound)
  double unit();                             // uniform in [0, 1)

 private:
  std::uint64_t state_;
};
std::uint64_t mix(std::uint64_t value);

struct RoutingOptions {
  std::string text = "uniform";  // as --routing takes it
  int ranks = 1, nodes = 1;
  int topk = 1, experts = 1;
  bool topkGiven = false, expertsGiven = false;
  std::uint64_t seed = 1;
};

struct Routing {
  std::int64_t tokens = 0;
  std::vector<std::int32_t> ids;  // [tokens, topk], -1: not routed
  std::vector<float> weights;     // [tokens, topk], positive, a token's add up to about 1
};

// Experts lie on ranks in contiguous blocks; the first (experts % ranks) ranks hold one more.
int firstExpertOf(int rank, int ranks, int experts);
int rankOfExpert(int expert, int ranks, int experts);
int nodeOfRank(int rank, int ranks, int nodes);

class RoutingSource {
 public:
  // Reads files. Throws std::runtime_error that says what is wrong with the specification or the file.
  explicit RoutingSource(const RoutingOptions& options);

  int topk() const { return topk_; }
  int experts() const { return experts_; }
  // What the reader of a result must know about this routing; may be empty.
  const std::string& remark() const { return remark_; }
  std::int64_t tokensOf(std::int64_t tokens, int rank) const;
  Routing make(std::int64_t tokens, int rank) const;

 private:
  enum class Kind { uniform, singleNode, weighted, masked, oneExpert, trace };

  void readCounts(const std::string& specification);
  void readTrace(const std::string& specification);
  void setPopularity(const std::vector<double>& weights);
  void drawUniform(Random& random, int first, int count, std::int32_t* ids) const;
  void drawWeighted(Random& random, std::int32_t* ids) const;

  RoutingOptions options_;
  Kind kind_ = Kind::uniform;
  bool imbalanced_ = false;
  bool otherNode_ = false;  // single node, never the own
  int topk_ = 1, experts_ = 1;
  std::string remark_;
  std::vector<double> popularity_, cumulative_;  // of each expert
  std::vector<std::int32_t> trace_;              // [recorded tokens, topk]
};

}  // namespace fusco::bench
