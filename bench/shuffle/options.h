// What the user asked for, and the list of cases that follows from it. Every rank and every peer program parses the
// same words, so that all of them hold the same cases.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fusco::bench {

enum class Op { dispatch, combine, alltoallv, gathersend, sendrecv };
enum class Type { u8, fp8, bf16, f16, f32 };
enum class Memory { window, privately };
enum class RankKind { processes, threads };

const char* nameOf(Op op);
const char* nameOf(Type type);
const char* nameOf(Memory memory);
std::size_t bytesOf(Type type);
inline bool isShuffle(Op op) { return op == Op::dispatch || op == Op::combine; }

struct Sweep {
  std::int64_t from = 0, to = 0;
  double factor = 2;
};
std::vector<std::int64_t> valuesOf(const Sweep& sweep);

struct Options {
  int ranks = 2;
  int nodes = 1;
  Sweep tokens{1024, 1024, 2};
  std::int64_t hidden = 7168;
  Type type = Type::bf16;
  int topk = 8;
  int experts = 64;
  bool topkGiven = false, expertsGiven = false;
  std::vector<Op> ops{Op::dispatch, Op::combine};
  Sweep bytes{1 << 20, 64 << 20, 4};
  Memory memory = Memory::window;
  std::vector<std::string> impls{"fusco", "mpi-alltoallv", "mpi-alltoallw", "mpi-sendrecv"};
  std::string routing = "uniform";
  std::string device = "host";
  std::string balance = "none";
  std::string dedup = "auto";
  std::string net = "auto";
  std::string hca;       // of each node, parted by /
  std::string netns;     // network namespaces of the nodes: this and the number of the node
  std::string emulated;  // what bench/cluster has made, in words
  bool planOnce = false;
  RankKind kind = RankKind::processes;
  std::uint64_t seed = 1;
  int warmup = 2;
  int iterations = 10;
  int rounds = 5;
  bool check = true;
  int timeoutSeconds = 120;
  bool verbose = false;
  std::string jsonFile;
  std::string mpiPeer;
  // --device cuda only.
  int gpus = 0;             // that ranks are dealt to; 0: all that there are, at most one a rank
  std::vector<int> sms{0};  // multiprocessors of a GPU, in turn; 0: all
  bool graph = false;       // plan without the host (capacity), captured and replayed
  bool scales = false;      // dispatch brings FP32 scales of 128 elements each beside the rows
  std::string corrupt;      // tests only: the implementation whose output gets one wrong byte
};

// One row group of the table: an operation at one size.
struct Case {
  Op op = Op::dispatch;
  std::int64_t tokens = 0;  // dispatch, combine: T before the routing scales it
  std::int64_t bytes = 0;   // the others: bytes of a rank's send buffer
  int sms = 0;              // of a GPU, for fusco's kernels; 0: all
};

struct ParsedOptions {
  Options options;
  bool leave = false;  // --help, or an error: the text has been printed
  int exitCode = 0;
};

// `argv[0]` included. Prints help and errors by itself.
ParsedOptions parseOptions(const std::vector<std::string>& words);
std::vector<Case> casesOf(const Options& options);
std::vector<std::string> splitList(const std::string& text, char separator = ',');

}  // namespace fusco::bench
