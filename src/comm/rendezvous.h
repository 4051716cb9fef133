// The meeting place behind a unique id: hears every rank once, then tells all of them about all, or why it cannot be.
// Ranks of its own machine come one by one through its Unix socket; those of another come together, by one TCP
// connection, through the relay that runs there.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "comm/frames.h"
#include "comm/handshake.h"
#include "comm/lobby.h"

namespace fusco::comm {

class Rendezvous final : public Lobby {
 public:
  // Both listeners stay the caller's; `network` may be -1.
  Rendezvous(const UniqueId& id, int listener, int network, Patience patience);

 private:
  // A relay, or a stranger that has yet to prove itself: no more than the handshake is held for those.
  struct Guest {
    UniqueFd socket;
    Deadline deadline = Deadline::never();
    std::unique_ptr<Handshake> handshake;
    std::unique_ptr<Frames> frames;
    std::set<int> ranks;
    std::uint64_t process = 0;  // in which the relay runs
    bool gone = false;
  };

  Deadline addPolled(std::vector<pollfd>* polled) override;
  void onPolled(const pollfd* polled, std::size_t count) override;
  bool finishTurn() override;
  void came(Caller* caller, const Record& record) override;
  void lost(int rank) override;
  void starves() override;
  void differs(Caller* caller, std::uint32_t format) override;

  void acceptGuests();
  void hearGuest(Guest* guest);
  void hearFrame(Guest* guest, std::uint32_t kind, std::string_view body);
  void answerGuest(Guest* guest);
  // True if the rank has been taken; false: it has been, or now is, decided.
  bool take(const Record& record);
  void succeedIfComplete();
  void fail(int code, const std::string& text);
  static std::string skew(const std::string& who, std::uint32_t format);
  std::string disagreement(const Record& first, const Record& other) const;
  std::string missing() const;
  void reportProgress();

  const int network_;
  std::deque<Guest> guests_;
  std::map<int, Record> records_;
  std::int64_t ranks_ = 0;            // as the first one says
  std::int64_t mostRanks_ = 0;        // as anyone says
  std::int64_t answeredByRelay_ = 0;  // or gone
  std::int64_t firstCameNs_ = 0;
  Deadline timeout_ = Deadline::never();
  Deadline progress_ = Deadline::never();
  Deadline end_ = Deadline::never();
};

}  // namespace fusco::comm
