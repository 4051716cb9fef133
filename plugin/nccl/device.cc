#include "plugin/nccl/device.h"

#include <thread>
#include <utility>

#include "plugin/nccl/real.h"

namespace fusco::nccl {

namespace {

// A rank that has not come by then, after the real init has brought all ranks together, has no libfusco.
constexpr std::int64_t kPatienceMs = 5000;

void vote(Communicator& communicator) {
  if (!deviceVotes()) {
    communicator.reason = setting("FUSCO_CARRY") == "none" ? "FUSCO_CARRY=none" : deviceReason();
  } else if (!communicator.tag.valid()) {
    communicator.reason = "its id bears no mark of libfusco";
  } else {
    const Decision decision = decide(
        communicator.tag, communicator.rank, communicator.ranks, kPatienceMs, false, makeRecord(deviceReason()),
        [](const fuscoUniqueId&) -> fuscoComm_t { fail(Code::systemError, deviceReason()); }, &communicator.cancelled);
    communicator.reason = decision.reason;
    communicator.carried = decision.carried;
  }
  communicator.state = State::ready;
  const std::string text = "rank " + std::to_string(communicator.rank) + " of " + std::to_string(communicator.ranks) +
                           (communicator.carried ? ": carried" : ": passed on to NCCL: " + communicator.reason);
  if (deviceVotes() && communicator.rank == 0 && !communicator.carried) {
    warn(text);
  } else {
    info(text);
  }
}

// Enters the communicator at the slot. What is still to be done for it, if anything.
std::function<void()> enterReal(ncclComm_t* slot, const Tag& tag) {
  const ncclComm_t handle = slot == nullptr ? nullptr : *slot;
  if (handle == nullptr || findCommunicator(handle)) return {};
  auto made = std::make_unique<Communicator>();
  // A non-blocking communicator that is still being made does not tell yet.
  const bool told = FUSCO_REAL(CommCount, handle, &made->ranks) == ncclSuccess &&
                    FUSCO_REAL(CommUserRank, handle, &made->rank) == ncclSuccess;
  if (told) FUSCO_REAL(CommCuDevice, handle, &made->device);
  made->tag = tag;
  if (!told) {
    made->reason = "it was made without blocking";
    made->state = State::ready;
    enter(handle, std::move(made));
    return {};
  }
  return [communicator = enter(handle, std::move(made))] { vote(*communicator); };
}

}  // namespace

std::string deviceReason() { return "this build of libfusco moves no GPU memory"; }

bool deviceVotes() {
  const std::string carry = setting("FUSCO_CARRY");
  return carry == "all" || (carry != "none" && deviceReason().empty());
}

void noteMade(ncclResult_t result, ncclComm_t* slot, const Tag& tag) {
  if (result != ncclSuccess && result != ncclInProgress) return;
  guarded("libfusco", [&] {
    if (group().depth > 0) {
      group().later.emplace_back([slot, tag] {
        if (auto job = enterReal(slot, tag)) group().jobs.push_back(std::move(job));
      });
    } else if (const auto job = enterReal(slot, tag)) {
      job();
    }
  });
}

ncclResult_t deviceGroupStart() {
  const ncclResult_t result = FUSCO_REAL(GroupStart);
  if (result == ncclSuccess) ++group().depth;
  return result;
}

ncclResult_t deviceGroupEnd() {
  const ncclResult_t result = FUSCO_REAL(GroupEnd);
  if (group().depth == 0 || --group().depth > 0) return result;
  const Group ended = std::exchange(group(), Group{});
  if (result == ncclSuccess || result == ncclInProgress) {
    guarded("libfusco", [&] {
      for (const auto& look : ended.later) look();
      // One thread may have made several ranks of one communicator: they vote together.
      const auto jobs = std::exchange(group().jobs, {});
      if (!jobs.empty()) runSideBySide(jobs);
    });
  }
  return result;
}

ncclResult_t deviceGroupSimulateEnd(ncclSimInfo_t* info) {
  const ncclResult_t result = FUSCO_REAL(GroupSimulateEnd, info);
  if (group().depth > 0 && --group().depth == 0) group() = Group{};
  return result;
}

}  // namespace fusco::nccl
