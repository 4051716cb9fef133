#include "plugin/nccl/group.h"

#include <string>
#include <utility>

#include "base/thread.h"

namespace fusco::nccl {

Group& group() { return ofThisThread<Group, struct Collected>(); }

Work& Group::workOf(const CommunicatorRef& communicator) {
  for (Work& known : work) {
    if (known.communicator == communicator) return known;
  }
  work.push_back({communicator, {}, {}});
  return work.back();
}

void Group::note(ncclResult_t code) {
  if (error != ncclSuccess || code == ncclSuccess || code == ncclInProgress) return;
  error = code;
  errorText = lastError();
}

void runSideBySide(const std::vector<std::function<void()>>& jobs) {
  if (jobs.size() == 1) return jobs.front()();
  runTogether("each of " + std::to_string(jobs.size()) + " communicators of a group", jobs);
}

namespace {

ncclResult_t runGroup(const char* name, Group collected) {
  if (collected.error != ncclSuccess) {
    setLastError(collected.errorText);
    return collected.error;
  }
  const ncclResult_t result = guarded(name, [&] {
    if (!collected.jobs.empty()) runSideBySide(collected.jobs);
    if (!collected.work.empty()) runWork(std::move(collected.work));
  });
  return result == ncclSuccess && collected.goesOn ? ncclInProgress : result;
}

}  // namespace

ncclResult_t hostCall(const char* name, const std::function<void()>& body) {
  const ncclResult_t result = guarded(name, body);
  if (group().depth > 0) {
    group().note(result);
    return result;
  }
  Group collected = std::exchange(group(), Group{});
  return result != ncclSuccess ? result : runGroup(name, std::move(collected));
}

ncclResult_t hostGroupStart() {
  ++group().depth;
  return ncclSuccess;
}

ncclResult_t hostGroupEnd(bool simulate) {
  const char* const name = simulate ? "ncclGroupSimulateEnd" : "ncclGroupEnd";
  if (group().depth == 0) {
    return guarded(name, [] { fail(Code::invalidUsage, "there was no ncclGroupStart on this thread"); });
  }
  if (--group().depth > 0) return ncclSuccess;
  Group collected = std::exchange(group(), Group{});
  if (simulate) {
    // Closed, and nothing done; what was wrong in it is told all the same.
    collected.jobs.clear();
    collected.work.clear();
  }
  return runGroup(name, std::move(collected));
}

}  // namespace fusco::nccl
