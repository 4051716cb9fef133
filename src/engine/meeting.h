// The ready and done words of one operation among the ranks of a node.
#pragma once

#include <cstdint>
#include <string>

#include "engine/control.h"
#include "engine/program.h"

namespace fusco::engine {

class Engine;

class Meeting {
 public:
  Meeting(Engine& engine, int channel) : engine_(engine), channel_(channel) {}

  void setChannel(int channel) { channel_ = channel; }
  // Takes the channel's next sequence.
  void begin();
  std::uint64_t sequence() const { return sequence_; }
  int channel() const { return channel_; }

  // What this rank says: fill in, then announce() writes it to every rank of the node (itself included).
  struct Announcement {
    std::uint32_t flags = 0;
    std::uint32_t status = 0;
    std::uint64_t bytes = 0;
    std::uint64_t rows = 0;
    Parameters parameters;
    transport::MemoryRef memory[kMemoryRoles];
  };
  void announce(const Announcement& announcement);
  // True once every rank of the node has announced. Throws invalidUsage with both values when parameters differ.
  bool allReady(OperationKind kind);
  const ReadyCell& ready(int localIndex) const;

  void sayDone();
  bool allDone();
  // Of a rank of the node: whether it has yet to say so.
  bool awaitsReady(int rank) const;
  bool awaitsDone(int rank) const;
  // The rank that is waited for, or -1.
  int missing() const { return missing_; }

 private:
  Engine& engine_;
  int channel_;
  std::uint64_t sequence_ = 0;
  int missing_ = -1;
};

std::uint64_t hashOf(const Parameters& parameters);

// The first field in which two ranks differ, with both values; empty if none.
std::string differingParameter(const Parameters& mine, const Parameters& theirs, int myRank, int theirRank);

}  // namespace fusco::engine
