// One way to carry out an operation, as a rank sees it. The same interface for fusco, the limit and the peers.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <utility>

#include "shuffle/options.h"
#include "shuffle/oracle.h"
#include "shuffle/session.h"

namespace fusco::bench {

// Everything that is the same for all implementations of a case.
struct CaseContext {
  const Options* options = nullptr;
  Session* session = nullptr;
  int group = kOwnGroup;
  int rank = 0;
  Case which;
  std::size_t rowBytes = 0;
  ShuffleMap map;  // dispatch, combine
  MoveMap moves;   // the others

  // Bytes that this rank brings and gets.
  std::size_t inputBytes() const { return inputBytes(rank); }
  std::size_t outputBytes() const { return outputBytes(rank); }
  std::size_t inputBytes(int of) const;
  std::size_t outputBytes(int of) const;
  // Fills this rank's input; compares this rank's output: wrong elements.
  void fillInput(std::byte* input) const;
  std::uint64_t wrongIn(const std::byte* output, int levels) const;
};
CaseContext makeCase(const Options& options, const RoutingSource* routing, const Case& which, int rank);
RoutingSource makeRoutingSource(const Options& options);

class Implementation {
 public:
  virtual ~Implementation() = default;
  // Once, all ranks together, data in and out as the case says.
  virtual void run() = 0;
  virtual std::span<std::byte> output() = 0;
  // Where the output is not what output() shows (it lies on a GPU): makes it unlike any result, and brings it there.
  virtual void poisonOutput();
  virtual void fetchOutput() {}
  // Roundings of a sum on its way home.
  virtual int levels() const { return 1; }
  // Since the beginning; ever growing.
  virtual Stages stages() const { return {}; }
};

// Makes the implementation of that name for a case. Called by all ranks of a group together.
using Factory = std::function<std::unique_ptr<Implementation>(const std::string& name, const CaseContext& context)>;

// Carries out the coordinator's commands until it says quit. `group` and `rank` must be this caller's own.
// Returns 0, or 1 when the run was given up.
int serveRank(Session& session, const Options& options, int group, int rank, const Factory& factory);

// Memory of a rank's own.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes) : bytes_(bytes) {
    data_ = static_cast<std::byte*>(std::aligned_alloc(4096, (bytes + 4096) / 4096 * 4096));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace fusco::bench
