// The loop of nccl-tests, in its own manner: processes with threads (-t) that drive several ranks each (-g), buffers
// that move on with every iteration, several iterations in a group (-m), registered buffers (-R), and an end that is
// waited for by asking streams and communicators in turn.
#pragma once

#include "nccl/program.h"

namespace fusco::test {

// Where the buffers lie: in host memory, or on GPUs.
class LoopMemory {
 public:
  virtual ~LoopMemory() = default;
  virtual void use(int rank) = 0;  // what this thread asks for next is for that rank
  virtual std::uint8_t* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  virtual void write(std::uint8_t* to, const std::vector<std::uint8_t>& bytes) = 0;
  virtual std::vector<std::uint8_t> read(const std::uint8_t* from, std::size_t bytes) = 0;
  virtual cudaStream_t makeStream() = 0;
  // For ncclCommInitAll; empty: as many as there are ranks.
  virtual std::vector<int> devices(int ranks) = 0;
  virtual bool done(cudaStream_t stream) = 0;
  // Graphs: what is called on a stream from here to the end.
  virtual void capture(cudaStream_t stream) = 0;
  virtual void* endCapture(cudaStream_t stream) = 0;
  virtual void launch(void* graph, cudaStream_t stream) = 0;
  virtual void releaseGraph(void* graph) = 0;
};

struct LoopShape {
  int threads = 1, ranksOfThread = 1;  // in each process
  bool initAll = false;                // one process: by ncclCommInitAll
  bool registered = false;
  bool graphs = false;  // once more, captured (-G)
};
// `how`: all, registered, graph or nothing.
LoopShape loopShape(int threads, int ranksOfThread, const std::string& how);

// In each process: its ranks are those after all ranks of the processes before it. Throws when anything is wrong. The
// number of operations that were checked.
long loop(const Rank& process, const LoopShape& shape, LoopMemory& memory);

}  // namespace fusco::test
