#include "comm/rendezvous.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/log.h"
#include "base/point.h"
#include "base/status.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm {

namespace {

constexpr std::size_t kMostStrangers = 1024;
constexpr std::size_t kMostNamed = 16;
constexpr int kSilenceMs = 8000;
constexpr std::size_t kFewGuests = 64;
constexpr std::size_t kMostHello = 16 * 1024;  // another version's may be longer than ours

}  // namespace

Rendezvous::Rendezvous(const UniqueId& id, int listener, int network, Patience patience)
    : Lobby(id.key, listener, patience), network_(network) {
  end_ = Deadline::afterMs(patience_.nobodyMs);
}

// ---- guests: relays of other machines

Deadline Rendezvous::addPolled(std::vector<pollfd>* polled) {
  Deadline next = decided() ? end_ : end_.earlier(timeout_).earlier(progress_);
  polled->push_back({network_, POLLIN, 0});
  for (const Guest& guest : guests_) {
    const short events = guest.handshake ? guest.handshake->waitsFor()
                                         : static_cast<short>(POLLIN | (guest.frames->queued() ? POLLOUT : 0));
    polled->push_back({guest.socket.get(), events, 0});
    next = next.earlier(guest.deadline);
  }
  return next;
}

void Rendezvous::onPolled(const pollfd* polled, std::size_t count) {
  for (std::size_t k = 1; k < count; ++k) {
    Guest& guest = guests_[k - 1];
    if (polled[k].revents != 0) hearGuest(&guest);
    if (guest.deadline.passed()) guest.gone = true;
  }
  std::erase_if(guests_, [](const Guest& guest) { return guest.gone; });
  if (polled[0].revents != 0) acceptGuests();
}

void Rendezvous::acceptGuests() {
  for (int turn = 0; turn < transport::kAcceptsAtOnce; ++turn) {
    bool exhausted = false;
    UniqueFd socket = transport::acceptOne(network_, &exhausted);
    if (!socket && !exhausted) return;
    const auto strangers = std::count_if(guests_.begin(), guests_.end(), [](const Guest& g) { return !g.frames; });
    const bool starving = exhausted && (guests_.size() < kFewGuests || strangers == 0);
    noteStarving(starving);
    if (starving) {
      ::poll(nullptr, 0, 10);
      return;
    }
    if (exhausted || static_cast<std::size_t>(strangers) >= kMostStrangers) {
      // The longest silent makes room.
      const auto oldest = std::find_if(guests_.begin(), guests_.end(), [](const Guest& g) { return !g.frames; });
      if (oldest != guests_.end()) guests_.erase(oldest);
      if (oldest == guests_.end() || exhausted) {
        ::poll(nullptr, 0, 10);
        return;
      }
    }
    transport::watchConnection(socket.get(), kSilenceMs);
    guests_.emplace_back();
    guests_.back().socket = std::move(socket);
    guests_.back().deadline = Deadline::afterMs(patience_.silentCallerMs);
    guests_.back().handshake = std::make_unique<Handshake>(Handshake::Side::host, key_);
  }
}

void Rendezvous::hearGuest(Guest* guest) {
  if (guest->handshake) {
    switch (guest->handshake->step(guest->socket.get())) {
      case Handshake::Result::again:
        return;
      case Handshake::Result::proved:
        break;
      default:
        guest->gone = true;
        return;
    }
    const bool wanted = guest->handshake->purpose().kind == Purpose::records;
    guest->process = guest->handshake->purpose().process();
    Handshake::answer(guest->socket.get(), wanted);
    guest->handshake.reset();
    guest->deadline = Deadline::never();
    guest->gone = !wanted;
    guest->frames = std::make_unique<Frames>(kMostHello);
    return;
  }
  Frames::State state = guest->frames->receive(
      guest->socket.get(), [&](std::uint32_t kind, std::string_view body) { hearFrame(guest, kind, body); });
  if (state == Frames::State::open) state = guest->frames->flush(guest->socket.get());
  if (state == Frames::State::open) return;
  guest->gone = true;
  // Whom it has not told comes again, through another one.
  if (decided() || guest->ranks.empty()) return;
  const std::set<int> ranks = guest->ranks;
  const auto isIts = [&](int rank) {
    const auto record = records_.find(rank);
    return record != records_.end() && record->second.process[0] == guest->process;
  };
  // Those of other processes have not gone: they come again, through another relay.
  std::erase_if(guest->ranks, isIts);
  const auto owner = std::find_if(ranks.begin(), ranks.end(), isIts);
  if (owner != ranks.end()) return lost(*owner);
  const auto spokenFor = records_.find(*ranks.begin());
  if (spokenFor == records_.end()) return;
  fail(static_cast<int>(Code::remoteError), "the process that spoke for " + spokenFor->second.describe() +
                                                " has ended at init, before all ranks had come; look at its log");
}

void Rendezvous::hearFrame(Guest* guest, std::uint32_t kind, std::string_view body) {
  Hello hello;
  if (kind == static_cast<std::uint32_t>(RecordFrame::gone) && body.size() == sizeof(std::int32_t)) {
    std::int32_t rank;
    std::memcpy(&rank, body.data(), sizeof(rank));
    if (guest->ranks.erase(rank) == 0) return;
    if (!decided()) lost(rank);
    return;
  }
  if (kind == static_cast<std::uint32_t>(RecordFrame::told) && decided()) {
    answeredByRelay_ += static_cast<std::int64_t>(guest->ranks.size());
    return guest->ranks.clear();
  }
  if (kind != static_cast<std::uint32_t>(RecordFrame::hello)) return;
  const Greeting greeting = readHello(body.data(), body.size(), &hello);
  if (greeting == Greeting::stranger) return;
  if (greeting == Greeting::otherFormat) {
    if (!decided()) fail(static_cast<int>(Code::invalidUsage), skew("a rank of another machine", hello.format));
    return answerGuest(guest);
  }
  guest->ranks.insert(hello.record.rank);
  if (take(hello.record)) {
    succeedIfComplete();
  } else {
    answerGuest(guest);
  }
}

// The relay passes it on to all that it has heard of, and to who still comes. Of a success it tells when they have it:
// should it die before, they come again.
void Rendezvous::answerGuest(Guest* guest) {
  if (code() != 0) {
    answeredByRelay_ += static_cast<std::int64_t>(guest->ranks.size());
    guest->ranks.clear();
  }
  const AnswerHead head = answerHead();
  guest->frames->queue(static_cast<std::uint32_t>(RecordFrame::answer), {bytesOf(head), verdict()});
  guest->frames->flush(guest->socket.get());
}

// ---- ranks

bool Rendezvous::finishTurn() {
  if (!decided()) {
    if (timeout_.passed()) {
      fail(static_cast<int>(Code::remoteError),
           "not all ranks came to init within the time-out of " + std::to_string((nowNs() - firstCameNs_) / 1000000) +
               " ms: " + std::to_string(records_.size()) + " of " + std::to_string(ranks_) +
               " came; missing: " + missing() + "; look whether they were started and got the same id");
      end_ = Deadline::afterMs(200);
    } else if (progress_.passed()) {
      reportProgress();
    }
  }
  if (end_.passed()) return true;
  if (!decided() || answeredCallers() + answeredByRelay_ < mostRanks_ || !flushed()) return false;
  return std::none_of(guests_.begin(), guests_.end(), [](const Guest& g) { return g.frames && g.frames->queued(); });
}

void Rendezvous::came(Caller* caller, const Record& record) {
  if (!take(record)) return answer(caller);
  caller->rank = record.rank;
  succeedIfComplete();
}

bool Rendezvous::take(const Record& record) {
  mostRanks_ = std::max<std::int64_t>(mostRanks_, record.ranks);
  if (records_.empty() && !decided()) {
    ranks_ = record.ranks;
    firstCameNs_ = nowNs();
    timeout_ = Deadline::afterMs(record.initTimeoutMs);
    progress_ = Deadline::afterMs(patience_.firstProgressMs);
    end_ = Deadline::never();
  }
  if (decided()) return false;

  std::string text;
  Code code = Code::invalidUsage;
  if (record.failure[0] != 0) {
    text = record.describe() + " failed at init: " + record.failure;
    code = record.failureCode == static_cast<int>(Code::invalidUsage) ? Code::invalidUsage : Code::remoteError;
  } else if (auto same = records_.find(record.rank); same != records_.end()) {
    // The relay that had brought it has died.
    if (record.member != 0 && same->second.member == record.member) return true;
    text = "two ranks call themselves rank " + std::to_string(record.rank) + ": " + same->second.describe() + " and " +
           record.describe() + "; give each its own number from 0 to " + std::to_string(ranks_ - 1);
  } else if (!records_.empty()) {
    text = disagreement(records_.begin()->second, record);
  }
  if (!text.empty()) {
    fail(static_cast<int>(code), text);
    return false;
  }
  records_.emplace(record.rank, record);
  passPoint("taken", record.rank);
  return true;
}

void Rendezvous::succeedIfComplete() {
  if (decided() || static_cast<std::int64_t>(records_.size()) < ranks_) return;
  std::string all;
  for (const auto& [rank, one] : records_) all.append(reinterpret_cast<const char*>(&one), sizeof(one));
  decide(0, std::move(all));
  end_ = Deadline::afterMs(patience_.lateComersMs);
  for (Guest& guest : guests_) {
    if (guest.frames && !guest.gone) answerGuest(&guest);
  }
}

void Rendezvous::lost(int rank) {
  const auto found = records_.find(rank);
  if (found == records_.end()) return;
  fail(static_cast<int>(Code::remoteError),
       found->second.describe() + " died or gave up at init, before all ranks had come; look at its log");
}

std::string Rendezvous::skew(const std::string& who, std::uint32_t format) {
  return "ranks have different versions of FUSCO: " + who + " speaks format " + std::to_string(format) +
         ", the process that made the id format " + std::to_string(Hello::kFormat) +
         "; use one version of the library on all ranks";
}

void Rendezvous::starves() {
  const std::string text = starvingText("the process of the meeting place at init");
  FUSCO_WARN("{}", text);
  fail(static_cast<int>(Code::systemError), text);
  // Who waits at the door sees it close.
  end_ = Deadline::afterNs(0);
}

void Rendezvous::differs(Caller* caller, std::uint32_t format) {
  fail(static_cast<int>(Code::invalidUsage),
       skew("a process of its machine (pid " + std::to_string(transport::credentialsOf(caller->socket.get()).pid) + ")",
            format));
}

std::string Rendezvous::disagreement(const Record& first, const Record& other) const {
  struct Item {
    const char* name;
    std::uint64_t one, two;
  };
  const Item items[] = {
      {"the number of ranks", static_cast<std::uint64_t>(first.ranks), static_cast<std::uint64_t>(other.ranks)},
      {"lanes per node", static_cast<std::uint64_t>(first.lanesPerNode),
       static_cast<std::uint64_t>(other.lanesPerNode)},
      {"the size of control memory", first.controlBytes, other.controlBytes},
      {"the size of a slot", first.slotBytes, other.slotBytes},
      {"the number of slots", static_cast<std::uint64_t>(first.slots), static_cast<std::uint64_t>(other.slots)},
      {"FUSCO_NET (0: auto, 1: tcp, 2: shm, 3: verbs)", static_cast<std::uint64_t>(first.net),
       static_cast<std::uint64_t>(other.net)},
  };
  // Before sizes, whose defaults follow from the device.
  if (std::strcmp(first.settings, other.settings) != 0) {
    return "ranks disagree on their settings: " + first.describe() + " has " + first.settings + "; " +
           other.describe() + " has " + other.settings + "; give all ranks the same";
  }
  for (const Item& item : items) {
    if (item.one == item.two) continue;
    return std::string("ranks disagree on ") + item.name + ": " + first.describe() + " has " +
           std::to_string(item.one) + ", " + other.describe() + " has " + std::to_string(item.two) +
           "; give all ranks the same";
  }
  return {};
}

void Rendezvous::fail(int code, const std::string& text) {
  if (decided()) return;
  decide(code, text);
  end_ = Deadline::afterMs(patience_.lateComersMs);
  // Whoever has gone needs no answer.
  std::set<int> behindRelays;
  for (Guest& guest : guests_) {
    behindRelays.insert(guest.ranks.begin(), guest.ranks.end());
    if (guest.frames && !guest.gone) answerGuest(&guest);
  }
  for (const auto& [rank, record] : records_) answeredByRelay_ += isHere(rank) || behindRelays.contains(rank) ? 0 : 1;
}

std::string Rendezvous::missing() const {
  std::string names;
  std::size_t named = 0, unnamed = 0;
  for (int rank = 0; rank < ranks_; ++rank) {
    if (records_.contains(rank)) continue;
    if (named++ < kMostNamed) {
      names += (names.empty() ? "rank " : ", rank ") + std::to_string(rank);
    } else {
      ++unnamed;
    }
  }
  if (unnamed > 0) names += " and " + std::to_string(unnamed) + " more";
  return names;
}

void Rendezvous::reportProgress() {
  FUSCO_WARN("init has waited for {} s: {} of {} ranks have come; missing: {}", (nowNs() - firstCameNs_) / 1000000000,
             records_.size(), ranks_, missing());
  progress_ = Deadline::afterMs(60000);
}

}  // namespace fusco::comm
