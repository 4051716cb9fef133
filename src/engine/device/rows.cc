#include "engine/device/rows.h"

#include <fmt/format.h>

#include <cstring>

#include "engine/device/plan_memory.h"
#include "engine/engine.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {
// Handles of other processes' memory follow the roles.
int handleOf(MemoryRole role) { return 6 + 2 * static_cast<int>(role); }
static_assert(6 + 2 * kRows2 + 2 <= kMemoryRoles);
}  // namespace

void describeTensor(Engine& engine, Meeting::Announcement& announcement, MemoryRole role, const void* pointer,
                    std::size_t bytes) {
  if (bytes == 0) return;
  if (engine.device() == nullptr) {
    announcement.memory[role] = engine.fabric().describe(pointer, bytes);
  } else {
    announcement.memory[role] = engine.device()->describe(pointer, bytes, &announcement.memory[handleOf(role)]);
  }
}

std::byte* reachTensor(Engine& engine, int localIndex, const ReadyCell& cell, MemoryRole role) {
  const bool ofCaller = role == kRows || role == kRows2;
  if (engine.device() == nullptr || !ofCaller)
    return engine.fabric().reach(engine.nodeRank(localIndex), cell.memory[role]);
  return engine.device()->reach(localIndex, cell.memory[role], &cell.memory[handleOf(role)]);
}

void settleTensors(Engine& engine, void* stream, const char* operation,
                   std::initializer_list<std::pair<const char*, const void*>> tensors) {
  if (engine.device() == nullptr) return;
  const cuda::OnDevice on(engine.device()->device());
  if (cuda::capturing(stream)) {
    fail(
        Code::invalidUsage,
        fmt::format("rank {}: {} cannot be captured: its ranks are on {} nodes, and the host sends what passes between "
                    "them",
                    engine.fabric().rank(), operation, engine.topology().nodes()));
  }
  for (const auto& [name, pointer] : tensors) engine.device()->checkPointer(name, pointer);
  cuda::synchronize(stream);
}

void clearCounters(PlanState& plan) {
  if (plan.device == nullptr || plan.device->beside() == nullptr) return;
  const kernels::BesideBoard board = plan.device->beside()->rows().board;
  plan.engine.executor().fill(board.counters, static_cast<std::size_t>(board.localExperts) * sizeof(std::uint64_t));
}

void bringBeside(PlanState& plan) {
  if (plan.device == nullptr || plan.device->beside() == nullptr) return;
  const kernels::BesideRows there = plan.device->beside()->rows();
  exec::CudaExecutor& executor = *plan.engine.deviceExecutor();
  const auto rows = static_cast<std::size_t>(plan.receiveRows());
  const auto slots = rows * static_cast<std::size_t>(plan.request.map.topk);
  if (plan.tickets.data() != nullptr) executor.copy(there.tickets, plan.tickets.data(), rows * sizeof(Ticket));
  if (plan.counters.data() != nullptr) {
    auto* board = plan.counters.as<CounterBoard>();
    executor.copy(there.board.counters, board->counters(), board->localExperts * sizeof(std::uint64_t));
  }
  if (there.localIds != nullptr) {
    executor.copy(there.localIds, plan.rankOrderIds.data(), slots * sizeof(std::int32_t));
    executor.copy(there.weights, plan.rankOrderWeights.data(), slots * sizeof(float));
  }
  executor.fence();
}

void bringCounts(PlanState& plan) {
  DevicePlan& device = *plan.device;
  std::memcpy(device.head(), plan.arena.data(), device.headBytes());
  exec::CudaExecutor& executor = *plan.engine.deviceExecutor();
  executor.copy(device.arena(), device.head(), device.headBytes());
  executor.fence();
}

}  // namespace fusco::engine
