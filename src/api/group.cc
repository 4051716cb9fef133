#include "api/group.h"

#include <fmt/format.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "base/thread.h"
#include "engine/device/transfers.h"

namespace fusco::api {

namespace {

struct CollectiveItem {
  std::shared_ptr<CommState> comm;
  std::unique_ptr<engine::Operation> operation;
  std::function<void()> after;
};

struct TransferItems {
  std::shared_ptr<CommState> comm;
  std::vector<engine::TransferRequest> requests;
};

struct Group {
  int depth = 0;
  std::exception_ptr error;
  std::vector<std::function<void()>> inits;
  std::vector<CollectiveItem> collectives;
  std::vector<TransferItems> transfers;
};

Group& group() { return ofThisThread<Group, struct Collected>(); }

void runInits(const std::vector<std::function<void()>>& inits) {
  runTogether(fmt::format("each of {} inits in a group", inits.size()), inits);
}

struct Running {
  std::shared_ptr<CommState> comm;
  std::shared_ptr<engine::Submission> submission;
  std::function<void()> after;
};

void runOperations(std::vector<Running>& running) {
  std::vector<engine::Engine*> engines;
  for (const Running& r : running) {
    engine::Engine* engine = r.comm->engine.get();
    bool known = false;
    for (const engine::Engine* e : engines) known |= e == engine;
    if (!known) engines.push_back(engine);
  }
  if (engines.size() == 1) {
    for (Running& r : running) {
      try {
        engines[0]->wait(r.submission);
      } catch (...) {
        // Kept by the submission; the others still have to end.
      }
    }
    return;
  }
  // One thread drives several communicators: turn by turn, and a short rest when nothing moves anywhere.
  for (;;) {
    bool open = false;
    for (const Running& r : running) open |= !r.submission->finished;
    if (!open) return;
    const std::uint32_t bell = engines[0]->bell();
    bool moved = false;
    for (engine::Engine* engine : engines) moved |= engine->progress();
    if (!moved) engines[0]->rest(bell, 200);
  }
}

// On GPUs those with other nodes go by links, beside those in the node.
std::vector<std::unique_ptr<engine::Operation>> transferOperations(engine::Engine& engine,
                                                                   std::vector<engine::TransferRequest> requests) {
  std::vector<std::unique_ptr<engine::Operation>> operations;
  if (engine.device() == nullptr) {
    operations.push_back(std::make_unique<engine::Transfers>(engine, std::move(requests)));
    return operations;
  }
  const plan::Topology& topology = engine.topology();
  std::vector<engine::TransferRequest> inNode, across;
  for (engine::TransferRequest& request : requests) {
    const bool same = topology.nodeOf(request.peer) == topology.nodeOf(engine.fabric().rank());
    (same ? inNode : across).push_back(std::move(request));
  }
  if (!inNode.empty()) operations.push_back(std::make_unique<engine::DeviceTransfers>(engine, std::move(inNode)));
  if (!across.empty()) operations.push_back(std::make_unique<engine::Transfers>(engine, std::move(across)));
  return operations;
}

void run(Group& work) {
  runInits(work.inits);
  // All is made, and so checked, before anything is started.
  for (TransferItems& items : work.transfers) {
    for (auto& operation : transferOperations(*items.comm->engine, std::move(items.requests)))
      work.collectives.push_back({items.comm, std::move(operation), {}});
  }
  std::vector<Running> running;
  for (CollectiveItem& item : work.collectives) {
    auto submission = item.comm->engine->submit(std::move(item.operation));
    running.push_back({item.comm, submission, std::move(item.after)});
  }
  std::exception_ptr error;
  runOperations(running);
  for (Running& r : running) {
    if (r.submission->error) {
      if (!error) error = r.submission->error;
    } else if (r.after) {
      r.after();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace

void enqueue(const std::shared_ptr<CommState>& comm, std::unique_ptr<engine::Operation> operation,
             std::function<void()> after) {
  group().collectives.push_back({comm, std::move(operation), std::move(after)});
}

void enqueue(const std::shared_ptr<CommState>& comm, engine::TransferRequest request) {
  std::vector<TransferItems>& transfers = group().transfers;
  for (TransferItems& items : transfers) {
    if (items.comm == comm) {
      items.requests.push_back(std::move(request));
      return;
    }
  }
  transfers.push_back({comm, {}});
  transfers.back().requests.push_back(std::move(request));
}

void enqueueInit(std::function<void()> init) { group().inits.push_back(std::move(init)); }

bool inGroup() { return group().depth > 0; }

void noteGroupError(Code code, const std::string& text) {
  Group& mine = group();
  if (mine.depth > 0 && !mine.error) mine.error = std::make_exception_ptr(Error(code, text));
}

void groupStart() { ++group().depth; }

void asGroup(const std::function<void()>& body) {
  groupStart();
  try {
    body();
  } catch (...) {
    // In an outer group the error sticks, so that what was enqueued before it is not carried out either.
    if (--group().depth == 0) group() = Group{};
    throw;
  }
  groupEnd();
}

void groupEnd() {
  Group& mine = group();
  if (mine.depth == 0) fail(Code::invalidUsage, "fuscoGroupEnd without fuscoGroupStart on this thread");
  if (--mine.depth > 0) return;
  Group work = std::exchange(mine, Group{});
  if (work.error) std::rethrow_exception(work.error);
  run(work);
}

}  // namespace fusco::api
