// The stream driver: operations encoded on a stream as kernels, one launch for each stage of a program. Whoever encodes
// never waits and never sees a count: plans are made on the stream as well, and all memory follows capacities. What was
// encoded can be recorded and replayed; sequences are taken when an operation begins on the stream, so that replay
// advances them.
//
// The stream here is a thread that does what a GPU's stream would do, with mapped memory and the host executor. A
// device encodes the same launches.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/operation.h"

namespace fusco::engine {

// Runs what was enqueued strictly in order, on a thread of its own.
class FakeStream {
 public:
  FakeStream();
  ~FakeStream();  // after all that was enqueued has run
  FakeStream(const FakeStream&) = delete;
  FakeStream& operator=(const FakeStream&) = delete;

  void enqueue(std::function<void()> kernel);
  // Returns when all that was enqueued has run. Kernels wait only so long as their driver allows, so this is bounded.
  void synchronize();

 private:
  void runThread();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> kernels_;
  bool running_ = false;
  bool stop_ = false;
  std::thread thread_;
};

// Encodes the operations of one communicator on one stream. All operations of a stream use one operation slot
// (PlanRequest::slot), so that two streams of a communicator, one for each micro-batch, need not be ordered against
// each other. Engine and stream must outlive the driver, and the driver what it has launched.
class StreamDriver {
 public:
  // A kernel launch: a stage of an operation, or work of the caller's (a router, the experts).
  struct Launch {
    std::shared_ptr<Operation> operation;
    int stage = 0;
    bool begins = false;  // the operation takes its sequence first
    std::function<void()> work;
  };
  using Graph = std::vector<Launch>;

  StreamDriver(Engine& engine, FakeStream& stream) : engine_(engine), stream_(stream) {}
  ~StreamDriver() { stream_.synchronize(); }

  // Launches the stages of an operation. Throws the communicator's sticky error; else returns at once.
  void encode(const std::shared_ptr<Operation>& operation);
  // Launches work of the caller's, which must not throw. It runs after a failure as well, as kernels behind a failed
  // one would; it reads status().
  void call(std::function<void()> work);

  // Between the two, launches are recorded and not run.
  void beginCapture();
  Graph endCapture();
  void replay(const Graph& graph);

  // What work on the stream can read: 0, or the Code with which an operation has failed. Everything behind it was
  // drained.
  const std::atomic<std::uint32_t>& status() const { return status_; }

 private:
  void launch(Launch launch);
  void run(const Launch& launch);
  void runStage(const Launch& launch);
  void checkDeadline(const Operation& operation) const;

  Engine& engine_;
  FakeStream& stream_;
  bool capturing_ = false;
  Graph captured_;
  std::atomic<std::uint32_t> status_{0};
  std::int64_t deadlineNs_ = 0;  // of the operation that runs; the stream's own
};

}  // namespace fusco::engine
