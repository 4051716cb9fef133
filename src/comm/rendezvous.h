// The meeting place behind a unique id: hears every rank once, then tells all of them about all, or why it cannot be.
#pragma once

#include <poll.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/handle.h"
#include "comm/record.h"

namespace fusco::comm {

class Rendezvous {
 public:
  struct Patience {
    std::int64_t silentCallerMs = 10000;       // for who connects and says nothing
    std::int64_t firstProgressMs = 10000;      // after the first rank; then once a minute
    std::int64_t lateComersMs = 5000;          // after a failure, to tell it also to ranks that come later
    std::int64_t nobodyMs = 24 * 3600 * 1000;  // until the first rank
  };
  // The listener stays the caller's.
  Rendezvous(const UniqueId& id, int listener, Patience patience) : id_(id), listener_(listener), patience_(patience) {}

  // Returns when all ranks have been answered, the time-out has passed, or `stop` is set and the listener shut down.
  void serve(const std::atomic<bool>& stop);

 private:
  struct Caller {
    UniqueFd socket;
    Deadline deadline = Deadline::never();
    int rank = -1;  // -1: has not said who it is
    std::vector<std::string> answer;
    std::size_t sent = 0;
    bool answered = false;
    bool gone = false;
  };

  void acceptCallers();
  void hear(Caller& caller);
  void welcome(Caller& caller, const Record& record);
  std::string disagreement(const Record& first, const Record& other) const;
  void failAll(int code, const std::string& text);
  void answer(Caller& caller);
  void push(Caller& caller);
  std::string missing() const;
  void reportProgress();

  const UniqueId id_;
  const int listener_;
  const Patience patience_;
  std::deque<Caller> callers_;
  std::vector<pollfd> polled_;
  std::map<int, Record> records_;
  std::int64_t ranks_ = 0;      // as the first one says
  std::int64_t mostRanks_ = 0;  // as anyone says
  std::int64_t answered_ = 0;
  std::int64_t firstCameNs_ = 0;
  Deadline timeout_ = Deadline::never();
  Deadline progress_ = Deadline::never();
  Deadline end_ = Deadline::never();
  bool decided_ = false;
  int code_ = 0;
  std::string verdict_;  // bytes of the answer
};

}  // namespace fusco::comm
