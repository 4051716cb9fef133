// The operations of the shuffle, as values to be submitted. Pointers are the caller's and must stay until the end.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "engine/operation.h"
#include "engine/plan_state.h"
#include "exec/executor.h"

namespace fusco::engine {

class Engine;

// On GPUs the caller's stream says when tensors are valid.
struct DispatchRequest {
  void* stream = nullptr;
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::size_t rowBytes = 0;
  const std::byte* input2 = nullptr;
  std::byte* output2 = nullptr;
  std::size_t rowBytes2 = 0;
  bool castToFp8 = false;  // rowBytes is of the BF16 input
  std::byte* outputScales = nullptr;
};

struct CombineRequest {
  void* stream = nullptr;
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::size_t elements = 0;
  exec::RowType type = exec::RowType::bf16;
  const std::byte* bias = nullptr;
  bool weighted = true;
  bool partialsFp32 = false;
};

struct CombineBackwardRequest {
  void* stream = nullptr;
  const std::byte* outputGradient = nullptr;
  const std::byte* expertRows = nullptr;
  std::byte* inputGradient = nullptr;
  float* weightGradient = nullptr;
  std::size_t elements = 0;
  exec::RowType type = exec::RowType::bf16;
};

std::unique_ptr<Operation> makePlanning(Engine& engine, std::shared_ptr<PlanState> plan);
std::unique_ptr<Operation> makeDispatch(Engine& engine, std::shared_ptr<PlanState> plan,
                                        const DispatchRequest& request);
std::unique_ptr<Operation> makeCombine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request);
// Where the counts of a plan on a GPU lie, in its memory; and all of its arena, brought to the host behind what is on
// the plan's stream.
struct DeviceCounts {
  const std::int32_t* localExpertRows;
  const std::int32_t* localExpertStart;
  const std::int64_t* dropped;
  const std::int64_t* receiveRows;
};
// What it holds beside its rows, in GPU memory; null where it was not asked for.
struct DeviceBesideView {
  const std::uint64_t* counters = nullptr;
  const Ticket* tickets = nullptr;
  const std::int32_t* localIds = nullptr;
  const float* weights = nullptr;
};
DeviceBesideView deviceBeside(const PlanState& plan);
// Throws what the planner on the GPU has found wrong, as far as it has come.
void checkPlanned(const PlanState& plan);
DeviceCounts deviceCounts(const PlanState& plan);
// What a plan was made of, brought to the host; the map points into the rest. Throws where the GPU no longer knows.
struct BroughtPlan {
  plan::RoutingMap map;
  plan::Exchanged exchanged;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
};
BroughtPlan bringPlan(const PlanState& plan);
std::vector<std::byte> bringArena(const PlanState& plan);

// On GPUs; `stream` is a cudaStream_t. On those of several nodes these are the operations above.
std::unique_ptr<Operation> makeDevicePlanning(Engine& engine, std::shared_ptr<PlanState> plan, void* stream);
std::unique_ptr<Operation> makeDeviceDispatch(Engine& engine, std::shared_ptr<PlanState> plan,
                                              const DispatchRequest& request, void* stream);
std::unique_ptr<Operation> makeDeviceCombine(Engine& engine, std::shared_ptr<PlanState> plan,
                                             const CombineRequest& request, void* stream);

std::unique_ptr<Operation> makeDeviceBackward(Engine& engine, std::shared_ptr<PlanState> plan,
                                              const CombineBackwardRequest& request, void* stream);

std::unique_ptr<Operation> makeCombineBackward(Engine& engine, std::shared_ptr<PlanState> plan,
                                               const CombineBackwardRequest& request);

}  // namespace fusco::engine
