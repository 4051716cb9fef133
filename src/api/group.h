// Groups: calls collected by a thread and carried out together by the outermost fuscoGroupEnd. A call outside a group
// is a group of one.
#pragma once

#include <functional>
#include <memory>

#include "api/state.h"
#include "engine/transfers.h"

namespace fusco::api {

// Collective operation on a communicator; `after` runs when it has completed.
void enqueue(const std::shared_ptr<CommState>& comm, std::unique_ptr<engine::Operation> operation,
             std::function<void()> after = {});
void enqueue(const std::shared_ptr<CommState>& comm, engine::TransferRequest request);
// Joining a communicator: run side by side with the others of the group.
void enqueueInit(std::function<void()> init);
bool inGroup();
// An error inside a group sticks; groupEnd returns it.
void noteGroupError(Code code, const std::string& text);

void groupStart();
void groupEnd();
// Enqueues what `body` enqueues, as a group of its own or as part of the one that is open; whatever it throws, the
// depth is as before.
void asGroup(const std::function<void()>& body);

}  // namespace fusco::api
