// The caller's tensors as operations that the host drives see them (several nodes): in host memory, or on GPUs, where
// ranks in other processes reach them by handles and the caller's stream says when they are valid.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <utility>

#include "engine/control.h"
#include "engine/meeting.h"
#include "engine/operation.h"
#include "engine/plan_state.h"

namespace fusco::engine {

class Engine;

// Announces a tensor under kRows or kRows2.
void describeTensor(Engine& engine, Meeting::Announcement& announcement, MemoryRole role, const void* pointer,
                    std::size_t bytes);
// Where this rank reaches it, or null.
std::byte* reachTensor(Engine& engine, int localIndex, const ReadyCell& cell, MemoryRole role);

// Before an operation reads or writes what it was given: on a GPU all that is on the stream has ended. Throws while the
// stream is being captured, and where the GPU does not reach a pointer.
void settleTensors(Engine& engine, void* stream, const char* operation,
                   std::initializer_list<std::pair<const char*, const void*>> tensors);

// Counters of complete rows in GPU memory begin at zero, before any row of this dispatch is written.
void clearCounters(PlanState& plan);
// What a dispatch has brought beside the rows, from library memory on the host to where a plan on a GPU shows it.
void bringBeside(PlanState& plan);
// Planning on the host of what lies on GPUs.
std::unique_ptr<Operation> makeNodesPlanning(Engine& engine, std::shared_ptr<PlanState> plan, void* stream);
// The head of a plan that the host has made, to the GPU.
void bringCounts(PlanState& plan);

}  // namespace fusco::engine
