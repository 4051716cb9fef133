// Where the ranks of one machine come by its Unix socket to hear about each other. What becomes of their records is for
// the two kinds of lobby: the meeting place itself (rendezvous.h) and its outpost on another machine (relay.h).
#pragma once

#include <poll.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/handle.h"
#include "comm/record.h"

namespace fusco::comm {

class Lobby {
 public:
  struct Patience {
    std::int64_t silentCallerMs = 10000;       // for who connects and says nothing
    std::int64_t firstProgressMs = 10000;      // after the first rank; then once a minute
    std::int64_t lateComersMs = 5000;          // after a failure, to tell it also to ranks that come later
    std::int64_t nobodyMs = 24 * 3600 * 1000;  // until the first rank
  };
  // The listener stays the caller's.
  Lobby(const std::uint8_t key[32], int listener, Patience patience) : patience_(patience), listener_(listener) {
    std::memcpy(key_, key, sizeof(key_));
  }
  virtual ~Lobby() = default;

  // What a message of a rank is worth, its key apart; `hello` is what could be read of it.
  enum class Greeting { rank, otherFormat, stranger };
  static Greeting readHello(const void* message, std::size_t bytes, Hello* hello);

  // Returns when all ranks have been answered, the time-out has passed, or `stop` is set and the listener shut down.
  void serve(const std::atomic<bool>& stop);
  // How many of this process have ended so far because it had no descriptors left.
  static unsigned timesStarved();

 protected:
  struct Caller {
    UniqueFd socket;
    Deadline deadline = Deadline::never();
    int rank = -1;  // -1: has not said who it is
    std::vector<std::string> answer;
    std::size_t sent = 0;
    bool answered = false;
    bool gone = false;
  };

  // What a lobby adds to the loop: more descriptors to look at (their deadline is returned), what they had to say, and
  // at the end of each turn whether all is done.
  virtual Deadline addPolled(std::vector<pollfd>* polled) = 0;
  virtual void onPolled(const pollfd* polled, std::size_t count) = 0;
  virtual bool finishTurn() = 0;
  // A rank has come, in a hello whose key, format and texts are right. A lobby sets caller->rank if it takes it.
  virtual void came(Caller* caller, const Record& record) = 0;
  // A rank that was taken has hung up before the verdict.
  virtual void lost(int rank) = 0;
  // For a second now this process has had no descriptors for who comes. The lobby ends, and its door closes.
  virtual void starves() = 0;
  void starve();
  // `who` is this process.
  static std::string starvingText(const std::string& who);
  // Of a turn: whether a caller could not be taken in for that reason, though no strangers hold the room.
  void noteStarving(bool starving);
  // A holder of the key whose messages have another format.
  virtual void differs(Caller* caller, std::uint32_t format) = 0;

  // All records in rank order, or with a code an error's text. Told to all callers, and to those that still come.
  void decide(int code, std::string verdict);
  bool decided() const { return decided_; }
  int code() const { return code_; }
  const std::string& verdict() const { return verdict_; }
  AnswerHead answerHead() const { return {Hello::kMagic, code_, 0, verdict_.size()}; }
  void answer(Caller* caller);
  // Every answer that was given has been sent.
  bool flushed() const;
  // Nobody is at the door, has still to say who it is, or waits for an answer or a part of one.
  bool everyoneHasAnswer();
  bool empty() const { return callers_.empty(); }
  bool isHere(int rank) const;
  std::int64_t answeredCallers() const { return answeredCallers_; }

  static bool wellFormed(const Record& record);

  const Patience patience_;
  std::uint8_t key_[32];

 private:
  // Takes in those who are at the door. False: there were too many of them for one turn.
  bool acceptCallers();
  bool isSilent(Caller* caller);
  void hear(Caller* caller);
  void push(Caller* caller);

  const int listener_;
  Lasting starving_;
  std::deque<Caller> callers_;
  std::vector<pollfd> polled_;
  std::int64_t answeredCallers_ = 0;
  bool decided_ = false;
  int code_ = 0;
  std::string verdict_;
};

}  // namespace fusco::comm
