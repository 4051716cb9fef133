// Device mode: communicators are entered when the real library has made them, and voted on.
#include <poll.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "base/thread.h"
#include "plugin/nccl/children.h"
#include "plugin/nccl/device.h"
#include "plugin/nccl/elsewhere.h"
#include "plugin/nccl/gpu.h"
#include "plugin/nccl/real.h"

namespace fusco::nccl {

namespace {

// A rank that has not come by then, after the real init has brought all ranks together, has no libfusco.
constexpr std::int64_t kPatienceMs = 5000;

// Why this rank must not carry, or cannot; "" if it may.
std::string refusal(const Wishes& wishes) {
  if (!wishes.refused.empty()) return wishes.refused;
  const std::string policy = setting("FUSCO_CTA_POLICY");
  if (policy == "2" || policy == "3" || policy.find("ZERO") != std::string::npos)
    return "NCCL_CTA_POLICY is " + policy + ": NCCL copies without multiprocessors";
  if (setting("FUSCO_P2P_DISABLE") == "1")
    return "NCCL_P2P_DISABLE is 1: ranks are not to reach each other's GPU memory";
  return deviceReason();
}

Decision decideFor(Communicator& communicator, const Making& making) {
  Decision no;
  if (!deviceVotes(making.wishes)) {
    no.reason = setting("FUSCO_CARRY") == "none" ? "FUSCO_CARRY=none" : deviceReason();
    return no;
  }
  try {
    const Tag place = making.grows && making.parent
                          ? growthPlace(*making.parent, making.tag, making.brought, kPatienceMs)
                          : making.tag;
    if (!place.valid()) {
      no.reason = "its id bears no mark of libfusco, or the communicator that it comes from is not carried";
      return no;
    }
    // The place is open already where ranks of other machines can say so, else by rank 0.
    const bool open = place.port != 0;
    if (open && place.machine != machineIdentity()) {
      sayElsewhere(making.id, place, communicator.rank, communicator.ranks);
      no.reason =
          "rank " + std::to_string(communicator.rank) + " is on another machine than the process that made the id";
      return no;
    }
    if (!open && communicator.rank == 0) openMeeting(place);
    return decide(
        place, communicator.rank, communicator.ranks, kPatienceMs, !open, makeRecord(refusal(making.wishes)),
        [&](const fuscoUniqueId& id) { return makeDeviceEngine(communicator, id, static_cast<int>(4 * kPatienceMs)); },
        &communicator.cancelled);
  } catch (const std::exception& error) {
    no.reason = error.what();
    return no;
  }
}

void settle(Communicator& communicator, const Decision& decision, const Wishes& wishes) {
  bool abandoned = false;
  {
    std::lock_guard lock(communicator.endMutex);
    communicator.reason = decision.reason;
    communicator.engine = decision.engine;
    communicator.carried = decision.carried;
    communicator.captures = decision.carried && engineCaptures(decision.engine);
    communicator.state = State::ready;
    abandoned = communicator.cancelled;
  }
  // Who ended it meanwhile saw no engine.
  if (abandoned && decision.engine != nullptr) fuscoCommAbort(decision.engine);
  const std::string text = "rank " + std::to_string(communicator.rank) + " of " + std::to_string(communicator.ranks) +
                           (decision.carried ? ": carried" : ": passed on to NCCL: " + decision.reason);
  if (deviceVotes(wishes) && communicator.rank == 0 && !decision.carried && !abandoned) {
    warn(text);
  } else {
    info(text);
  }
}

void refuse(Communicator& communicator, const Making& making, const std::string& reason) {
  Decision no;
  no.reason = reason;
  settle(communicator, no, making.wishes);
}

// A communicator's vote that is still to be held. Given up, for want of a thread, it is a no: else the communicator
// would never be ready, while NCCL's is.
struct OpenVote {
  CommunicatorRef communicator;
  Making making;

  OpenVote(CommunicatorRef ofWhich, const Making& made) : communicator(std::move(ofWhich)), making(made) {}
  OpenVote(const OpenVote&) = delete;
  ~OpenVote() {
    if (communicator->state != State::starting) return;
    guarded("libfusco", [&] { refuse(*communicator, making, "no thread was left for its vote"); });
  }
  void hold() { settle(*communicator, decideFor(*communicator, making), making.wishes); }
};

bool askRank(ncclComm_t handle, Communicator& made) {
  const bool told = FUSCO_REAL(CommCount, handle, &made.ranks) == ncclSuccess &&
                    FUSCO_REAL(CommUserRank, handle, &made.rank) == ncclSuccess;
  if (told) FUSCO_REAL(CommCuDevice, handle, &made.device);
  return told;
}

// Until the real library is done with a communicator that it makes without blocking, or the user with it.
bool waitForReal(Communicator& communicator) {
  for (;; ::poll(nullptr, 0, 1)) {
    std::lock_guard lock(communicator.endMutex);
    if (communicator.cancelled) return false;
    ncclResult_t state = ncclSuccess;
    if (FUSCO_REAL(CommGetAsyncError, communicator.handle, &state) != ncclSuccess) return false;
    if (state != ncclInProgress) return state == ncclSuccess && askRank(communicator.handle, communicator);
  }
}

void voteBeside(const std::shared_ptr<OpenVote>& vote) {
  guarded("libfusco", [&] {
    startThread("the vote of a communicator", [vote] {
      guarded("libfusco", [&] {
        if (waitForReal(*vote->communicator)) return vote->hold();
        refuse(*vote->communicator, vote->making, "NCCL did not make it");
      });
    }).detach();
  });
}

// Another thread of the real library's may be about to store it.
ncclComm_t storedAt(ncclComm_t* slot) { return slot == nullptr ? nullptr : __atomic_load_n(slot, __ATOMIC_ACQUIRE); }

// Enters what lies at the slot: a blocking one's vote comes back as a job, another one's goes on by itself.
struct Entered {
  CommunicatorRef communicator;
  std::function<void()> job;
};
Entered enterReal(const Making& making, bool goesOn) {
  const ncclComm_t handle = storedAt(making.slot);
  if (handle == nullptr || findCommunicator(handle)) return {};
  auto made = std::make_unique<Communicator>();
  made->tag = making.grows ? Tag{} : making.tag;
  made->wishes = making.wishes;
  if (!goesOn && !askRank(handle, *made)) return {};
  CommunicatorRef communicator = enter(handle, std::move(made));
  const auto vote = std::make_shared<OpenVote>(communicator, making);
  if (goesOn) {
    voteBeside(vote);
    return {communicator, {}};
  }
  return {communicator, [vote] { vote->hold(); }};
}

// One that the real library stores at its slot when the parent is told to be done: looked at then.
void waitForSlot(const Making& making) {
  std::lock_guard lock(making.parent->childMutex);
  making.parent->unfinished.emplace_back([making, child = CommunicatorRef(), seen = false]() mutable {
    if (!std::exchange(seen, true)) {
      Making own = making;
      own.parent = {};  // else the parent would hold itself
      if (making.grows) own.parent = making.parent;
      child = enterReal(own, true).communicator;
    }
    return !child || child->state != State::starting;
  });
}

// True: it goes on by itself.
bool look(const Making& making, ncclResult_t result, std::vector<std::function<void()>>& jobs) {
  const bool goesOn =
      result == ncclInProgress || !making.wishes.blocking || (making.parent && !making.parent->wishes.blocking);
  if (goesOn && making.parent && storedAt(making.slot) == nullptr) {
    // NCCL's split answers ncclSuccess also where it stores the child later: who made it is to ask the parent.
    if (making.childless) return result == ncclInProgress;
    waitForSlot(making);
    return true;
  }
  Entered entered = enterReal(making, goesOn);
  if (goesOn && making.parent && entered.communicator) {
    // Who asks the parent is to hear of it too.
    std::lock_guard lock(making.parent->childMutex);
    making.parent->unfinished.emplace_back([child = entered.communicator] { return child->state != State::starting; });
  }
  if (entered.job) jobs.push_back(std::move(entered.job));
  return goesOn && entered.communicator;
}

Wishes wishesOf(const ncclConfig_t* config, const CommunicatorRef& parent) {
  return config == nullptr && parent ? parent->wishes : readConfig(config);
}

}  // namespace

bool deviceVotes(const Wishes& wishes) {
  const std::string carry = setting("FUSCO_CARRY");
  return wishes.carry || carry == "all" || (carry != "none" && deviceReason().empty());
}

ncclResult_t noteMade(ncclResult_t result, std::vector<Making> makings) {
  if ((result != ncclSuccess && result != ncclInProgress) || makings.empty()) return result;
  bool goesOn = false;
  guarded("libfusco", [&] {
    if (group().depth > 0) {
      for (Making& making : makings) {
        group().later.emplace_back([making](ncclResult_t ended) { return look(making, ended, group().jobs); });
      }
      return;
    }
    std::vector<std::function<void()>> jobs;
    for (const Making& making : makings) goesOn |= look(making, result, jobs);
    if (!jobs.empty()) runSideBySide(jobs);
  });
  return goesOn ? ncclInProgress : result;
}

Making noteInit(const ncclUniqueId* id, ncclComm_t* slot, const ncclConfig_t* config) {
  Making making;
  making.slot = slot;
  if (id != nullptr) {
    making.tag = readTag(*id);
    making.id = *id;
  }
  guarded("libfusco", [&] { making.wishes = readConfig(config); });
  return making;
}

namespace {

Making noteChild(ncclComm_t parent, ncclComm_t* slot, const ncclConfig_t* config,
                 const std::function<Tag(Communicator&)>& place) {
  Making making;
  making.slot = slot;
  guarded("libfusco", [&] {
    const CommunicatorRef known = findCommunicator(parent);
    making.wishes = wishesOf(config, known);
    if (!known || known->state == State::starting || !known->carried) return;
    making.parent = known;
    making.tag = place(*known);
  });
  return making;
}

}  // namespace

Making noteSplit(ncclComm_t parent, int color, ncclComm_t* slot, const ncclConfig_t* config) {
  Making making = noteChild(parent, slot, config, [&](Communicator& known) { return splitPlace(known, color); });
  making.childless = color == NCCL_SPLIT_NOCOLOR;
  return making;
}

Making noteShrink(ncclComm_t parent, const int* excluded, int count, ncclComm_t* slot, const ncclConfig_t* config) {
  if (excluded == nullptr && count > 0) return {};  // which NCCL refuses
  return noteChild(parent, slot, config, [&](Communicator& known) {
    return shrinkPlace(known, std::vector<int>(excluded, excluded + std::max(count, 0)));
  });
}

Making noteGrow(ncclComm_t parent, const ncclUniqueId* id, ncclComm_t* slot, const ncclConfig_t* config) {
  if (parent == nullptr) return noteInit(id, slot, config);
  Making making = noteChild(parent, slot, config, [&](Communicator& known) { return growthMeeting(known); });
  making.grows = static_cast<bool>(making.parent);
  if (id != nullptr) making.brought = readTag(*id);
  return making;
}

void markId(ncclUniqueId& id) {
  guarded("libfusco", [&] {
    // By NCCL_COMM_ID every rank makes the id by itself, each would have a mark of its own, and wait there in vain.
    // Then the id does not begin with a random number.
    constexpr std::uint64_t kMadeByEverybody = 0x0280028002800280;
    std::uint64_t begin = 0;
    std::memcpy(&begin, id.internal, sizeof begin);
    if (begin == kMadeByEverybody) return;
    const bool votes = deviceVotes({});
    // A name that asks to be carried is not known yet: such a mark costs nothing.
    if (!deviceReason().empty() && !votes) return;
    // Looked at before a place is opened: this NCCL may use all of the id.
    ncclUniqueId probe = id;
    if (!writeTag(probe, newTag())) {
      warnOnce("id", "this NCCL uses all 128 bytes of ncclUniqueId, so that no mark fits: nothing is carried");
    } else if (votes) {
      writeTag(id, openWideMeeting());
    } else {
      id = probe;
    }
  });
}

ncclResult_t childrenState(Communicator& parent) {
  std::lock_guard lock(parent.childMutex);
  std::erase_if(parent.unfinished, [](auto& finished) { return finished(); });
  return parent.unfinished.empty() ? ncclSuccess : ncclInProgress;
}

}  // namespace fusco::nccl
