// The outpost of a meeting place on another machine, or in another network namespace of the same one. The first rank
// that comes there opens it, in its own process; the others of that machine find it by a name that the key makes. It
// brings all their records over one TCP connection, and their common answer back.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "comm/frames.h"
#include "comm/handshake.h"
#include "comm/lobby.h"

namespace fusco::comm {

class Relay final : public Lobby {
 public:
  // The listener stays the caller's.
  Relay(const UniqueId& id, int listener, Patience patience);

  // Brings one record, that of a rank of this process, and returns with the answer, or when the deadline passes. Takes
  // one descriptor; no rank finds this relay.
  static void bring(const UniqueId& id, const Record& record, Deadline deadline);

  // Where ranks of a domain find it.
  static std::string nameFor(const UniqueId& id, std::uint64_t domain);

 private:
  enum class Phase { resting, connecting, proving, open, over };

  Deadline addPolled(std::vector<pollfd>* polled) override;
  void onPolled(const pollfd* polled, std::size_t count) override;
  bool finishTurn() override;
  void came(Caller* caller, const Record& record) override;
  void lost(int rank) override;
  void starves() override;
  void differs(Caller* caller, std::uint32_t format) override;

  void begin();
  void proceed();
  // Until the next attempt.
  void pause();
  void retry(const std::string& why, bool mayStillCome);
  void hear(std::uint32_t kind, std::string_view body);
  void giveUp(Code code, const std::string& text);

  const UniqueId id_;
  Phase phase_ = Phase::resting;
  UniqueFd socket_;
  Handshake handshake_;
  Frames frames_;
  Lasting callStarving_;                  // no descriptor for the call to the meeting place
  Deadline next_ = Deadline::never();     // of the attempt, or of the pause between two
  Deadline timeout_ = Deadline::never();  // as the first rank has it
  Deadline progress_ = Deadline::never();
  Deadline end_ = Deadline::never();
  std::int64_t firstCameNs_ = 0;
  int hangUps_ = 0;  // before the handshake was over
  bool anyone_ = false;
  bool alone_ = false;  // without callers
};

}  // namespace fusco::comm
