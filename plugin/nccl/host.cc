// Communicators of host mode: made, split, shrunk, grown.
#include "plugin/nccl/host.h"

#include <algorithm>
#include <cstring>

#include "base/thread.h"
#include "plugin/nccl/children.h"

namespace fusco::nccl {

Wishes readConfig(const ncclConfig_t* config) {
  Wishes wishes;
  if (config == nullptr) return wishes;
  if (config->magic != 0xcafebeef)
    fail(Code::invalidArgument, "the ncclConfig_t does not begin as NCCL_CONFIG_INITIALIZER has it");
  if (config->size >= offsetof(ncclConfig_t, blocking) + sizeof config->blocking) {
    if (config->blocking != NCCL_CONFIG_UNDEF_INT && config->blocking != 0 && config->blocking != 1)
      fail(Code::invalidArgument, "blocking is " + std::to_string(config->blocking) + ", must be 0 or 1");
    wishes.blocking = config->blocking != 0;
  }
  const auto reaches = [&](std::size_t end) { return config->size >= end; };
  if (reaches(offsetof(ncclConfig_t, commName) + sizeof config->commName) && config->commName != nullptr) {
    const std::string_view name = config->commName;
    wishes.carry = name.starts_with("fusco");
    if (name.starts_with("nccl")) wishes.refused = "its name begins with nccl";
  }
  if (reaches(offsetof(ncclConfig_t, CTAPolicy) + sizeof config->CTAPolicy) &&
      config->CTAPolicy != NCCL_CONFIG_UNDEF_INT && (config->CTAPolicy & NCCL_CTA_POLICY_ZERO) != 0) {
    wishes.refused = "its CTA policy is zero: NCCL copies without multiprocessors";
  }
  return wishes;
}

namespace {

fuscoComm_t makeEngine(const Communicator& communicator, const fuscoUniqueId& id, std::int64_t patienceMs) {
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  config.device = fuscoDeviceHost;
  config.initTimeoutMs = static_cast<int>(patienceMs);
  fuscoComm_t engine = nullptr;
  check(fuscoCommInitRankConfig(&engine, communicator.ranks, id, communicator.rank, &config));
  return engine;
}

// Until it is ready or failed. Throws when it failed.
void start(Communicator& communicator, bool retry) {
  const std::int64_t patienceMs = numberSetting("FUSCO_INIT_TIMEOUT_MS");
  const Decision decision = decide(
      communicator.tag, communicator.rank, communicator.ranks, patienceMs, retry, makeRecord(""),
      [&](const fuscoUniqueId& id) { return makeEngine(communicator, id, patienceMs); }, &communicator.cancelled);
  if (!decision.carried) {
    communicator.reason = decision.reason;
    communicator.fail(ncclRemoteError, decision.reason);
    communicator.state = State::failed;
    fail(Code::remoteError, "rank " + std::to_string(communicator.rank) + " of " + std::to_string(communicator.ranks) +
                                ": " + decision.reason);
  }
  communicator.engine = decision.engine;
  communicator.carried = true;
  communicator.state = State::ready;
  info("rank " + std::to_string(communicator.rank) + " of " + std::to_string(communicator.ranks) +
       ": carried, on host memory");
  if (communicator.cancelled) revoke(communicator);
}

// Of a communicator that begins, by who makes it.
CommunicatorRef begin(int ranks, int rank, const Tag& tag, Wishes wishes, int device) {
  if (ranks < 1) fail(Code::invalidArgument, "nranks is " + std::to_string(ranks) + ", must be at least 1");
  if (rank < 0 || rank >= ranks)
    fail(Code::invalidArgument, "rank is " + std::to_string(rank) + ", must be 0 to " + std::to_string(ranks - 1));
  if (!tag.valid()) {
    fail(Code::invalidArgument,
         "this id was not made by ncclGetUniqueId of libfusco in host mode: is FUSCO_DEVICE=host set, and libfusco "
         "loaded, where it was made?");
  }
  auto made = std::make_unique<Communicator>();
  made->rank = rank;
  made->ranks = ranks;
  made->device = device;
  made->wishes = wishes;
  made->tag = tag;
  return enter(nullptr, std::move(made));
}

void finish(const CommunicatorRef& communicator, ncclComm_t* slot, bool retry) {
  try {
    start(*communicator, retry);
  } catch (...) {
    takeOut(communicator->handle);
    throw;
  }
  *slot = communicator->handle;
}

std::vector<std::string> everybody(const std::vector<std::optional<std::string>>& table, const char* what) {
  std::vector<std::string> words;
  for (std::size_t r = 0; r < table.size(); ++r) {
    if (!table[r])
      fail(Code::remoteError, "rank " + std::to_string(r) + " of the parent did not come to the " + what + " in time");
    words.push_back(*table[r]);
  }
  return words;
}

}  // namespace

void addInit(ncclComm_t* slot, int ranks, int rank, const Tag& tag, Wishes wishes, int device) {
  if (slot == nullptr) fail(Code::invalidArgument, "comm is NULL");
  *slot = nullptr;
  CommunicatorRef communicator = begin(ranks, rank, tag, wishes, device);
  if (wishes.blocking) {
    group().jobs.emplace_back([communicator, slot] { finish(communicator, slot, false); });
    return;
  }
  try {
    startThread("an init that does not block", [communicator] {
      try {
        start(*communicator, false);
      } catch (const std::exception& error) {
        warn(error.what());
      }
    }).detach();
  } catch (...) {
    takeOut(communicator->handle);
    throw;
  }
  *slot = communicator->handle;
  group().goesOn = true;
}

CommunicatorRef known(ncclComm_t handle) {
  if (handle == nullptr) fail(Code::invalidArgument, "the communicator is NULL");
  CommunicatorRef communicator = findCommunicator(handle);
  if (!communicator) fail(Code::invalidArgument, "there is no such communicator (any more): was it destroyed?");
  return communicator;
}

CommunicatorRef usable(ncclComm_t handle) {
  CommunicatorRef communicator = known(handle);
  requireUsable(*communicator);
  return communicator;
}

void requireUsable(const Communicator& communicator) {
  switch (communicator.state.load()) {
    case State::ready:
      return;
    case State::starting:
      fail(Code::invalidUsage, "the communicator is not ready yet: wait until ncclCommGetAsyncError says ncclSuccess");
    case State::failed:
      fail(static_cast<Code>(communicator.error), "the communicator could not be made: " + communicator.errorText);
    case State::revoked:
      fail(Code::invalidUsage, "the communicator was revoked: it can only be split, shrunk, destroyed or aborted");
    case State::finalized:
      fail(Code::invalidUsage, "the communicator was finalized: it can only be destroyed");
  }
  fail(Code::internalError, "unknown state");
}

std::size_t bytesOf(ncclDataType_t type, std::size_t count) {
  std::size_t element = 0;
  switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2:
      element = 1;
      break;
    case ncclFloat16:
    case ncclBfloat16:
      element = 2;
      break;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      element = 4;
      break;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      element = 8;
      break;
    default:
      fail(Code::invalidArgument, "data type " + std::to_string(static_cast<int>(type)) + " does not exist");
  }
  std::size_t bytes = 0;
  if (__builtin_mul_overflow(count, element, &bytes) || bytes > std::size_t{1} << 62)
    fail(Code::invalidArgument, "count is " + std::to_string(count) + ": so many bytes there are not");
  return bytes;
}

// ---- children ------------------------------------------------------------------------------------------------------

namespace {

// A place that all participants find without a word: by who they are, and how often they have met so.
Tag childTag(Communicator& parent, const std::vector<int>& participants) {
  std::uint64_t who = participants.size();
  for (const int rank : participants) who = (who ^ static_cast<std::uint64_t>(rank + 1)) * 0x100000001b3;
  std::lock_guard lock(parent.childMutex);
  return parent.tag.derived(who ^ parent.children[who]++ << 32);
}

std::vector<int> ranksOf(const Communicator& parent, const std::vector<int>& without) {
  std::vector<int> ranks;
  for (int r = 0; r < parent.ranks; ++r) {
    if (std::find(without.begin(), without.end(), r) == without.end()) ranks.push_back(r);
  }
  return ranks;
}

// The parent's ranks tell each other something.
std::vector<std::string> tellAll(Communicator& parent, const Tag& place, const std::string& words, const char* what,
                                 std::int64_t patienceMs) {
  if (parent.rank == 0) openMeeting(place);
  Meeting meeting(place, parent.rank, parent.ranks, patienceMs, true, &parent.cancelled);
  return everybody(meeting.exchange(words), what);
}

// Makes a child of some of the parent's ranks, of which the first opens the place.
void makeChild(const Tag& place, bool opens, int ranks, int rank, const CommunicatorRef& parent, Wishes wishes,
               ncclComm_t* slot) {
  if (opens) openMeeting(place);
  finish(begin(ranks, rank, place, wishes, parent->device), slot, true);
}

CommunicatorRef parentOf(ncclComm_t handle, ncclComm_t* slot) {
  if (slot == nullptr) fail(Code::invalidArgument, "newcomm is NULL");
  *slot = nullptr;
  CommunicatorRef parent = known(handle);
  return parent->state == State::revoked ? parent : usable(handle);
}

}  // namespace

Tag splitPlace(Communicator& parent, int color) {
  const Tag place = childTag(parent, ranksOf(parent, {}));
  return color < 0 ? place : place.derived(static_cast<std::uint64_t>(color) + 1);
}

Tag shrinkPlace(Communicator& parent, const std::vector<int>& excluded) {
  return childTag(parent, ranksOf(parent, excluded));
}

Tag growthMeeting(Communicator& parent) { return childTag(parent, ranksOf(parent, {})); }

Tag growthPlace(Communicator& parent, const Tag& meeting, const Tag& brought, std::int64_t patienceMs) {
  Tag found;
  const std::string words(reinterpret_cast<const char*>(&brought), sizeof brought);
  for (const std::string& theirs : tellAll(parent, meeting, words, "growth", patienceMs)) {
    Tag tag;
    std::memcpy(&tag, theirs.data(), sizeof tag);
    if (tag.valid()) found = tag;
  }
  return found;
}

void addSplit(ncclComm_t handle, int color, int key, ncclComm_t* slot, const ncclConfig_t* config) {
  CommunicatorRef parent = parentOf(handle, slot);
  if (color < 0 && color != NCCL_SPLIT_NOCOLOR)
    fail(Code::invalidArgument, "color is " + std::to_string(color) + ", must be at least 0 or NCCL_SPLIT_NOCOLOR");
  const Wishes wishes = config != nullptr ? readConfig(config) : parent->wishes;
  const Tag place = childTag(*parent, ranksOf(*parent, {}));
  group().jobs.emplace_back([parent, color, key, slot, wishes, place] {
    struct Wish {
      int color, key;
    };
    const Wish mine{color, key};
    std::vector<std::pair<int, int>> members;  // key, rank of the parent
    const auto table = tellAll(*parent, place, std::string(reinterpret_cast<const char*>(&mine), sizeof mine), "split",
                               numberSetting("FUSCO_INIT_TIMEOUT_MS"));
    for (int r = 0; r < parent->ranks; ++r) {
      Wish wish;
      std::memcpy(&wish, table[static_cast<std::size_t>(r)].data(), sizeof wish);
      if (color >= 0 && wish.color == color) members.emplace_back(wish.key, r);
    }
    if (color < 0) return;
    std::sort(members.begin(), members.end());
    const auto me = std::find(members.begin(), members.end(), std::pair(key, parent->rank)) - members.begin();
    makeChild(place.derived(static_cast<std::uint64_t>(color) + 1), me == 0, static_cast<int>(members.size()),
              static_cast<int>(me), parent, wishes, slot);
  });
}

void addShrink(ncclComm_t handle, const int* excluded, int count, ncclComm_t* slot, const ncclConfig_t* config,
               int flags) {
  if (slot == nullptr) fail(Code::invalidArgument, "newcomm is NULL");
  *slot = nullptr;
  CommunicatorRef parent = known(handle);
  if (count < 0 || (count > 0 && excluded == nullptr))
    fail(Code::invalidArgument, "the list of excluded ranks is NULL");
  if (flags != NCCL_SHRINK_DEFAULT && flags != NCCL_SHRINK_ABORT)
    fail(Code::invalidArgument, "shrinkFlags is " + std::to_string(flags) + ", must be 0 or NCCL_SHRINK_ABORT");
  const std::vector<int> without(excluded, excluded + count);
  for (const int rank : without) {
    if (rank < 0 || rank >= parent->ranks)
      fail(Code::invalidArgument, "excluded rank " + std::to_string(rank) + " is no rank of the communicator");
  }
  const std::vector<int> left = ranksOf(*parent, without);
  const auto me = std::find(left.begin(), left.end(), parent->rank);
  if (me == left.end()) fail(Code::invalidArgument, "a rank that is excluded must not call ncclCommShrink");
  if (flags == NCCL_SHRINK_ABORT) {
    revoke(*parent);
  } else if (parent->state != State::revoked) {
    usable(handle);
  }
  const Wishes wishes = config != nullptr ? readConfig(config) : parent->wishes;
  const Tag place = shrinkPlace(*parent, without);
  const int rank = static_cast<int>(me - left.begin());
  group().jobs.emplace_back([parent, place, rank, ranks = static_cast<int>(left.size()), wishes, slot] {
    makeChild(place, rank == 0, ranks, rank, parent, wishes, slot);
  });
}

void addGrow(ncclComm_t handle, int ranks, const ncclUniqueId* id, int rank, ncclComm_t* slot,
             const ncclConfig_t* config) {
  if (handle == nullptr) {
    if (id == nullptr) fail(Code::invalidArgument, "a rank that joins needs the id of ncclCommGetUniqueId");
    return addInit(slot, ranks, rank, readTag(*id), readConfig(config));
  }
  CommunicatorRef parent = parentOf(handle, slot);
  if (ranks <= parent->ranks) {
    fail(Code::invalidArgument,
         "nRanks is " + std::to_string(ranks) + ", the communicator has " + std::to_string(parent->ranks) + " already");
  }
  const Wishes wishes = config != nullptr ? readConfig(config) : parent->wishes;
  const Tag meeting = growthMeeting(*parent);
  const Tag mine = id != nullptr ? readTag(*id) : Tag{};
  group().jobs.emplace_back([parent, meeting, mine, ranks, wishes, slot] {
    const Tag place = growthPlace(*parent, meeting, mine, numberSetting("FUSCO_INIT_TIMEOUT_MS"));
    makeChild(place, false, ranks, parent->rank, parent, wishes, slot);
  });
}

void revoke(Communicator& communicator) {
  if (communicator.state.exchange(State::revoked) == State::ready) fuscoCommAbort(communicator.engine);
}

}  // namespace fusco::nccl
